"""rl_zoo3 with SDAC: the embedded hyperparameters, the search space, and the commands as a user types them."""

import argparse
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from helpers.hub_standin import Hub
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_sdac import DPMD, PAPER_DPMD, PAPER_SDAC, SDAC, zoo
from sb3_sdac.checkpoint import load_checkpoint

rl_zoo3 = pytest.importorskip("rl_zoo3", reason='needs pip install ".[zoo]"')
hook = importlib.import_module("sb3_sdac_zoo_hook")

ROOT = Path(__file__).parents[1]
MUJOCO_TASKS = [
    *["Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum"],
    *["InvertedPendulum", "Pusher", "Reacher", "Swimmer", "Walker2d"],
]
MUJOCO = [f"{task}-{version}" for task in MUJOCO_TASKS for version in ("v4", "v5")]
OTHERS = ["Pendulum-v1", "MountainCarContinuous-v0", "LunarLanderContinuous-v3", "BipedalWalker-v3"]
CONFIGS = {
    "sdac.yml": {"default", *OTHERS, *MUJOCO},
    "sdac_paper.yml": {"default", "Pendulum-v1", *MUJOCO},
    "dpmd.yml": {"default", "Pendulum-v1"},
    "dpmd_paper.yml": {"default", "Pendulum-v1", *MUJOCO},
}
#: What the entries hold besides arguments of the constructor
ZOO_KEYS = {"n_timesteps", "n_envs"}
ALGORITHMS: dict[str, type[SDAC]] = {"sdac": SDAC, "dpmd": DPMD}
DEFAULTS: dict[type[SDAC], dict[str, Any]] = {}
for _algorithm in ALGORITHMS.values():  # DPMD hands SDAC's on
    _parameters = dict(inspect.signature(SDAC).parameters) | dict(inspect.signature(_algorithm).parameters)
    _names = _algorithm._constructor_arguments()
    DEFAULTS[_algorithm] = {name: _parameters[name].default for name in _parameters if name in _names}
PENDULUM = ["--algo", "sdac", "--env", "Pendulum-v1"]
SMALL = ["-params", "learning_starts:100", "batch_size:16", "policy_kwargs:dict(net_arch=[16])"]
TRAIN = [*PENDULUM, "-n", "150", "--num-threads", "1", "--eval-freq", "100", "--eval-episodes", "1", *SMALL]
ENJOY = [*PENDULUM, "-f", "logs", "--no-render", "-n", "200"]


def load(config: str) -> dict[str, dict]:
    return yaml.safe_load((zoo.HYPERPARAMS / config).read_text(encoding="utf-8"))


def algorithm_of(config: str) -> type[SDAC]:
    return ALGORITHMS[re.split(r"[_.]", config)[0]]


def arguments_of(entry: dict) -> dict:
    """The entry's arguments of the constructor, with rl_zoo3's schedules and its names where they are strings."""
    arguments = {key: entry[key] for key in entry.keys() - ZOO_KEYS}
    exp_manager = importlib.import_module("rl_zoo3.exp_manager")
    if isinstance(arguments.get("policy_kwargs"), str):
        arguments["policy_kwargs"] = eval(arguments["policy_kwargs"], dict(vars(exp_manager)))
    if isinstance(arguments.get("learning_rate"), str):
        arguments |= exp_manager.ExperimentManager._preprocess_schedules({"learning_rate": arguments["learning_rate"]})
    return arguments


def run_module(*arguments: str, cwd: Path, expect: int = 0) -> str:
    """What ``python -m ...`` prints, in a folder that is not ours."""
    command, env = [sys.executable, "-m", *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == expect, result.stdout
    return result.stdout


def hook_is_installed() -> bool:
    code = "import sys; sys.exit('sb3_sdac_zoo_hook' not in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], cwd=tempfile.gettempdir()).returncode == 0


needs_hook = pytest.mark.skipif(not hook_is_installed(), reason='no start-up hook: pip install ".[tests]", without -e')


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """Makes rl_zoo3's ExperimentManager for an algorithm and a ``-conf``, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    zoo.register()
    from rl_zoo3.exp_manager import ExperimentManager

    return lambda algo="sdac", config=None: ExperimentManager(
        argparse.Namespace(), algo, "Pendulum-v1", str(tmp_path), config=config
    )


# === The embedded hyperparameters ===


@pytest.mark.parametrize("config", CONFIGS)
def test_config_has_its_entries(config):
    entries = load(config)
    assert entries.keys() == CONFIGS[config]
    assert entries.keys() - {"default"} <= gym.registry.keys()
    for entry in entries.values():
        assert {"policy", "n_timesteps"} <= entry.keys() <= DEFAULTS[algorithm_of(config)].keys() | ZOO_KEYS


@pytest.mark.parametrize("config", CONFIGS)
def test_config_labels_its_entries(config):
    keys = [line for line in (zoo.HYPERPARAMS / config).read_text(encoding="utf-8").splitlines() if re.match(r"\S+:", line)]
    assert len(keys) == len(CONFIGS[config])
    assert [line for line in keys if not re.search(r" # (tuned|from the paper|untuned)$", line)] == []


@pytest.mark.parametrize("config", ["sdac.yml", "dpmd.yml"])
def test_config_states_differences_only(config):
    for env_id, entry in load(config).items():
        same = [key for key in entry.keys() - ZOO_KEYS if entry[key] == DEFAULTS[algorithm_of(config)][key]]
        assert same == [], f"{env_id} repeats defaults of the constructor"


@pytest.mark.parametrize("config", CONFIGS)
def test_config_is_accepted_by_the_constructor(config):
    for entry in {str(entry): entry for entry in load(config).values()}.values():
        algorithm_of(config)(env="Pendulum-v1", **arguments_of(entry))


@pytest.mark.parametrize("config, preset", [("sdac_paper.yml", PAPER_SDAC), ("dpmd_paper.yml", PAPER_DPMD)])
def test_paper_config_is_the_paper_preset(config, preset):
    entries = load(config)
    for env_id in ["default", *MUJOCO]:
        assert {key: entries[env_id][key] for key in ZOO_KEYS} == {"n_envs": 5, "n_timesteps": 1e6}
        arguments = arguments_of(entries[env_id])
        assert arguments.pop("policy") == "MlpPolicy"
        arguments["actor_lr_decay"] = tuple(arguments["actor_lr_decay"])
        defaults = DEFAULTS[algorithm_of(config)]
        assert defaults | arguments == defaults | preset, env_id
        assert "policy_kwargs" in arguments and "mixed_precision" not in arguments


# === Registration ===


def test_register_is_idempotent():
    zoo.register()
    from rl_zoo3 import exp_manager, hyperparams_opt

    read_hyperparameters = exp_manager.ExperimentManager.read_hyperparameters
    zoo.register()
    assert ALGORITHMS.items() <= rl_zoo3.ALGOS.items()
    assert hyperparams_opt.HYPERPARAMS_SAMPLER["sdac"] is zoo.sample_sdac_params
    assert hyperparams_opt.HYPERPARAMS_SAMPLER["dpmd"] is zoo.sample_dpmd_params
    assert exp_manager.ExperimentManager.read_hyperparameters is read_hyperparameters


def test_register_without_rl_zoo3(monkeypatch):
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "sb3_sdac[zoo]"')):
        zoo.register()


def test_register_with_incomplete_rl_zoo3(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'optuna'", name="optuna")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="optuna"):
        zoo.register()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_default_config(manager, algo):
    experiment = manager(algo)
    parameters, _ = experiment.read_hyperparameters()
    assert parameters == load(f"{algo}.yml")["Pendulum-v1"]
    assert Path(experiment.config) == zoo.HYPERPARAMS / f"{algo}.yml"


def test_default_config_with_a_checkout_of_rl_zoo3(manager):
    """There the hyperparameters lie beside the package."""
    experiment = manager()
    experiment.config = str(Path(rl_zoo3.__file__).parents[1] / "hyperparams" / "sdac.yml")
    parameters, _ = experiment.read_hyperparameters()
    assert parameters == load("sdac.yml")["Pendulum-v1"]


@pytest.mark.parametrize("algo, preset", [("sdac", PAPER_SDAC), ("dpmd", PAPER_DPMD)])
def test_embedded_config_by_name(manager, algo, preset):
    experiment = manager(algo, config=f"{algo}_paper.yml")
    parameters, _ = experiment.read_hyperparameters()
    assert parameters == load(f"{algo}_paper.yml")["Pendulum-v1"]
    assert experiment._preprocess_hyperparams(parameters)[0]["policy_kwargs"] == preset["policy_kwargs"]


def test_own_config_comes_first(manager):
    Path("sdac.yml").write_text("default: {n_timesteps: 7, policy: MlpPolicy}", encoding="utf-8")
    parameters, _ = manager(config="sdac.yml").read_hyperparameters()
    assert parameters["n_timesteps"] == 7


@pytest.mark.parametrize("config", ["elsewhere/sdac.yml", "nothing.yml"])
def test_missing_config_is_an_error(manager, config):
    with pytest.raises(FileNotFoundError, match=config):
        manager(config=config).read_hyperparameters()


def test_other_algorithms_keep_their_config(manager):
    experiment = manager("sac")
    experiment.read_hyperparameters()
    assert Path(experiment.config) == Path(rl_zoo3.__file__).parent / "hyperparams" / "sac.yml"


# === The search space ===


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("her_kwargs", [None, {"copy_info_dict": True}], ids=["plain", "HER"])
def test_search_space(her_kwargs, algo):
    hyperparams_opt = importlib.import_module("rl_zoo3.hyperparams_opt")
    zoo.register()
    sample, convert = hyperparams_opt.HYPERPARAMS_SAMPLER[algo], hyperparams_opt.HYPERPARAMS_CONVERTER[algo]
    optuna = importlib.import_module("optuna")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        trial = study.ask()
        additional_args = {"using_her_replay_buffer": her_kwargs is not None, "her_kwargs": her_kwargs or {}}
        sampled = sample(trial, 1, 1, additional_args)
        loaded = convert(trial.params)  # as rl_zoo3.train --trial-id does
        assert trial.user_attrs == {"gamma": sampled["gamma"], "batch_size": sampled["batch_size"]}
        if her_kwargs is not None:
            assert sampled.pop("replay_buffer_kwargs") == her_kwargs | loaded.pop("replay_buffer_kwargs")
        assert loaded == sampled
        policy = ALGORITHMS[algo]("MlpPolicy", "Pendulum-v1", **sampled).policy
        searched = {"n_train_particles", "n_sampling_steps", "exploration_noise"}
        assert {name: getattr(policy, name) for name in searched} == {name: trial.params[name] for name in searched}
    if algo != "sdac":
        return
    # The corner that the constructor might refuse
    fixed = optuna.trial.FixedTrial({**trial.params, "target_ess": 0.3, "n_reverse_samples": 4})
    corner = sample(fixed, 1, 1, additional_args)
    corner.pop("replay_buffer_kwargs", None)  # of a buffer that Pendulum-v1 cannot have
    SDAC("MlpPolicy", "Pendulum-v1", **corner)


# === The start-up hook, in this process ===


def test_hook_knows_what_to_watch():
    assert set(hook.WATCHED) == zoo.REGISTRATIONS.keys()


def test_hook_registers_after_import(tmp_path, monkeypatch):
    (tmp_path / "watched.py").write_text("ALGOS = {}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hook, "WATCHED", ("watched", "absent"))
    other_finders = [finder for finder in sys.meta_path if finder is not hook.ZooFinder]
    monkeypatch.setattr(sys, "meta_path", [hook.ZooFinder, *other_finders])
    monkeypatch.setitem(zoo.REGISTRATIONS, "watched", lambda module: module.ALGOS.update(sdac=SDAC))
    watched = importlib.import_module("watched")
    monkeypatch.delitem(sys.modules, "watched")
    assert watched.ALGOS == {"sdac": SDAC}
    assert hook.ZooFinder.find_spec("absent") is None


def test_hook_failure_is_a_warning(monkeypatch):
    monkeypatch.setitem(zoo.REGISTRATIONS, "rl_zoo3.utils", lambda module: module.ALGOS.update(sdac=SDAC))
    with pytest.warns(UserWarning, match=r"SDAC could not be registered in rl_zoo3\.utils.*ALGOS"):
        hook.register(ModuleType("rl_zoo3.utils"))


def test_hook_is_silent_without_the_package(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sb3_sdac"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [hook.ZooFinder])  # there is no one to find it
    hook.register(ModuleType("rl_zoo3.utils"))


# === Patches of rl_zoo3 ===


def test_benchmark_finds_enjoy(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "call", calls.append)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "rl_zoo3.benchmark"])
    zoo.add_algorithm(rl_zoo3.utils)
    subprocess.call(["python", "enjoy.py", "--algo", "sdac"])
    subprocess.call(["python", "-m", "rl_zoo3.record_video", "--algo", "sdac"])
    Path("enjoy.py").touch()
    subprocess.call(["python", "enjoy.py"])
    ours = [sys.executable, "-m", "sb3_sdac.zoo"]
    assert calls == [[*ours, "enjoy", "--algo", "sdac"], [*ours, "record_video", "--algo", "sdac"], ["python", "enjoy.py"]]


def test_hub_patches_touch_nothing_else(tmp_path):
    zoo.patch_hub()
    zoo.patch_hub()
    hub = importlib.import_module("huggingface_sb3.push_to_hub")
    assert "Pendulum-v1" in hub.generate_metadata("SDAC", "Pendulum-v1", -150.0, 10.0)["tags"]
    (tmp_path / "README.md").write_text("# **SAC** Agent playing **Pendulum-v1**\npip install rl_zoo3", encoding="utf-8")
    zoo.add_usage(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text(encoding="utf-8").endswith("pip install rl_zoo3")
    importlib.import_module("huggingface_hub.repocard").metadata_save(tmp_path / "new.md", {"tags": ["mine"]})
    assert "mine" in (tmp_path / "new.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_card_names_the_file_that_was_pushed(tmp_path, algo):
    """Of an environment with a slash, as rl_zoo3 names it."""
    name = ALGORITHMS[algo].__name__
    card = f"# **{name}** Agent playing **dm_control/cheetah-run-v0**\n-orga someone\n## Usage (with SB3 RL Zoo)"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    zoo.add_usage(tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f'"{algo}-dm_control-cheetah-run-v0.zip"' in card and f"model = {name}.load(" in card


# === The commands ===


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_train_and_enjoy_in_this_process(tmp_path, monkeypatch, capsys, algo):
    monkeypatch.chdir(tmp_path)
    train, enjoy = ([algo if argument == "sdac" else argument for argument in command] for command in (TRAIN, ENJOY))
    monkeypatch.setattr(sys, "argv", ["zoo", "train", *train])
    zoo.main()
    assert Path(f"logs/{algo}/Pendulum-v1_1/Pendulum-v1.zip").is_file()
    monkeypatch.setattr(sys, "argv", ["zoo", "enjoy", *enjoy])
    zoo.main()
    assert "Mean reward" in capsys.readouterr().out


def test_unknown_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zoo", "trian"])
    with pytest.raises(SystemExit):
        zoo.main()
    assert re.search("'trian'.*train.*enjoy.*benchmark", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["benchmark", "record_training"])
def test_commands_that_start_others_are_patched(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["zoo", command, "--help"])
    monkeypatch.setattr(subprocess, "call", subprocess.call)  # to be restored
    with pytest.raises(SystemExit):
        zoo.main()
    assert "call_registered" in repr(subprocess.call)


def test_unknown_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["zoo", "train", "--algo", "sdac", "--env", "Pendulom-v1"])
    with pytest.raises(ValueError, match=r"Pendulom-v1 not found.*Pendulum-v1"):
        zoo.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the installed package was trained, by rl_zoo3's own command."""
    folder = tmp_path_factory.mktemp("foreign")
    printed = run_module("rl_zoo3.train", *TRAIN, cwd=folder)
    assert "hyperparams/sdac.yml" in printed
    assert (folder / "logs/sdac/Pendulum-v1_1/best_model.zip").is_file()
    return folder


@needs_hook
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["rl_zoo3.enjoy", *ENJOY], "Mean reward"),
        (["rl_zoo3.record_video", *ENJOY, "-n", "10"], "Loading"),
        (["rl_zoo3.push_to_hub", "--help"], "sdac"),
        (["rl_zoo3.benchmark", "--no-hub", "--test-mode", "--log-dir", "logs", "-n", "200"], "Mean reward"),
        (["rl_zoo3.train", *PENDULUM, "-n", "1", "-conf", "sdac_paper.yml"], "'ent_coef', 'paper'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_zoo_command(trained, command, expected):
    assert expected in run_module(*command, cwd=trained)


@needs_hook
@pytest.mark.slow
def test_zoo_optimize(tmp_path):
    train = ["rl_zoo3.train", *PENDULUM, "-n", "60", "--storage", "sqlite:///study.db", "--study-name", "study"]
    search = ["-optimize", "--n-trials", "2", "--n-startup-trials", "1", "--n-evaluations", "1", "--no-optim-plots"]
    printed = run_module(*train, *search, "-params", "learning_starts:50", cwd=tmp_path)
    assert "Best trial" in printed and "target_ess" in printed
    printed = run_module(*train, "--trial-id", "1", cwd=tmp_path)
    assert "'target_ess'" in printed and "Saving to logs/sdac" in printed


@needs_hook
@pytest.mark.slow
def test_zoo_hook_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("SB3_SDAC_NO_ZOO_HOOK", "1")
    assert "invalid choice: 'sdac'" in run_module("rl_zoo3.train", "--algo", "sdac", cwd=tmp_path, expect=2)
    assert "sdac" in run_module("sb3_sdac.zoo", "train", "--help", cwd=tmp_path)


# === Checkpoints ===


class Walk(gym.Env):
    """Episodes of 20 steps that always begin in the same state and draw from the generator on every step."""

    observation_space = gym.spaces.Box(-99, 99, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    interrupt_at = 10**9
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = np.zeros(1, np.float32)
        return self.place, {}

    def step(self, action):
        self.steps += 1
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt
        self.place = self.place + action.astype(np.float32) + self.np_random.standard_normal(1, np.float32)
        return self.place, -abs(self.place.item()), False, self.steps % 20 == 0, {}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``python -m rl_zoo3.train --algo sdac`` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gym.registry, "Walk-v0", gym.envs.registration.EnvSpec("Walk-v0", f"{__name__}:Walk"))
    # rl_zoo3 leaves the environments of a refused run, and their monitor files, open
    manager = importlib.import_module("rl_zoo3.exp_manager").ExperimentManager
    create_envs, created = manager.create_envs, []

    def create_and_remember(*args, **kwargs):
        created.append(create_envs(*args, **kwargs))
        return created[-1]

    monkeypatch.setattr(manager, "create_envs", create_and_remember)

    def run(*arguments, env="Walk-v0", params=("learning_starts:20",), algo="sdac"):
        command = ["zoo", "train", "--algo", algo, "--env", env, "--num-threads", "1", "--eval-freq", "-1", *arguments]
        small = ["batch_size:16", "buffer_size:200", "policy_kwargs:dict(net_arch=[8])"]
        monkeypatch.setattr(sys, "argv", [*command, "-params", *small, *params])
        zoo.main()

    yield run
    for env in created:
        env.close()


def test_resumed_zoo_run_is_bit_equal(train, monkeypatch, capsys):
    """Interrupted between two checkpoints, and continued by the same command with another seed, against a run in one piece."""
    command = ["-n", "100", "--save-freq", "60"]
    train(*command, "--seed", "1")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Walk, "interrupt_at", 75)
        train(*command, "--seed", "1")
    assert Path("logs/sdac/Walk-v0_2/rl_model_60_steps.zip").is_file()  # SB3's own, as ever
    train(*command, "--seed", "2", "-i", "logs/sdac/Walk-v0_2/checkpoint.zip")
    assert "Going on at 60 of 100 steps" in capsys.readouterr().out

    whole, resumed = (load_checkpoint(f"logs/sdac/Walk-v0_{run}/checkpoint.zip", make_vec_env(Walk)) for run in (1, 3))
    assert resumed.num_timesteps == whole.num_timesteps == 100 and resumed._n_updates == whole._n_updates == 80
    assert SDAC.load("logs/sdac/Walk-v0_3/Walk-v0.zip").num_timesteps == 100
    for name, part in whole.get_parameters().items():
        th.testing.assert_close(resumed.get_parameters()[name], part, rtol=0, atol=0)
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(resumed.replay_buffer, name), getattr(whole.replay_buffer, name))


def test_zoo_checkpoint_or_model(train):
    """A checkpoint goes on with what the command says, or refuses it; a model begins a new run, as ever in rl_zoo3."""
    train("-n", "60", "--save-freq", "30")
    checkpoint = "logs/sdac/Walk-v0_1/checkpoint.zip"
    train("-n", "30", "-i", "logs/sdac/Walk-v0_1/rl_model_30_steps.zip")
    assert SDAC.load("logs/sdac/Walk-v0_2/Walk-v0.zip").num_timesteps == 30
    train("-n", "70", "-i", checkpoint, params=["tau:0.5"])
    changed = SDAC.load("logs/sdac/Walk-v0_3/Walk-v0.zip")
    assert (changed.num_timesteps, changed.tau, changed.learning_starts) == (70, 0.5, 20)
    with pytest.raises(ValueError, match=r"checkpoint\.zip is at 60 steps, and the whole run has 60.*larger -n"):
        train("-n", "60", "-i", checkpoint)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        train("-n", "70", "-i", checkpoint, env="Pendulum-v1")
    with pytest.raises(ValueError, match="of 1 environments with a replay buffer of 200 rows, but here are 2 and 100"):
        train("-n", "70", "-i", checkpoint, params=["n_envs:2"])
    with pytest.raises(ValueError, match="of a run with no VecNormalize"):
        train("-n", "70", "-i", checkpoint, params=["normalize:True"])


def test_no_zoo_checkpoint_of_what_has_none(train, manager):
    train("-n", "30", "--save-freq", "30", algo="sac")
    assert {path.name for path in Path("logs/sac/Walk-v0_1").glob("*.zip")} == {"Walk-v0.zip", "rl_model_30_steps.zip"}

    experiment = manager()
    experiment.save_freq, experiment.n_timesteps = 10, 0
    buffer, env = SimpleNamespace(copy_info_dict=True), SimpleNamespace(close=lambda: None)
    experiment.learn(SimpleNamespace(replay_buffer=buffer, env=env, learn=lambda n_timesteps, **kwargs: None))
    assert experiment.callbacks == []


@pytest.mark.slow
def test_zoo_run_goes_on_after_sigkill(tmp_path):
    """Killed while it trains, with two environments and VecNormalize; the same command with -i comes to the end."""
    params = ["n_envs:2", "normalize:True", "learning_starts:50", "batch_size:16", "policy_kwargs:dict(net_arch=[8])"]
    command = [sys.executable, "-m", "sb3_sdac.zoo", "train", *PENDULUM, "-n", "1000", "--save-freq", "100"]
    command += ["--eval-freq", "400", "--eval-episodes", "1", "--num-threads", "1", "-params", *params]
    settings = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    checkpoints = [tmp_path / f"logs/sdac/Pendulum-v1_{run}/checkpoint.zip" for run in (1, 2)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings) as process:
        while not checkpoints[0].exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed

    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2))
    model: Any = load_checkpoint(checkpoints[0], env)
    reached = model.num_timesteps
    assert 100 <= reached < 1000
    assert model.replay_buffer.size() * 2 == round(env.ret_rms.count) == reached  # nothing lost, nothing twice
    resume = subprocess.run([*command, "-i", checkpoints[0]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)
    assert resume.returncode == 0, resume.stdout
    assert f"Going on at {reached} of 1000 steps" in resume.stdout
    model = load_checkpoint(checkpoints[1], env)
    assert model.replay_buffer.size() * 2 == round(env.ret_rms.count) == model.num_timesteps == 1000
    assert SDAC.load(tmp_path / "logs/sdac/Pendulum-v1_2/Pendulum-v1.zip").num_timesteps == 1000


@pytest.mark.slow
def test_two_processes_search_together(tmp_path, train, capsys):
    """Each adds its trials to the study in the journal file, and any of them can be trained with."""
    study = ["--storage", "study/journal.log", "--study-name", "pendulum"]
    search = ["-optimize", "--n-trials", "1", "--n-startup-trials", "1", "--n-evaluations", "1", "--pruner", "none"]
    command = [sys.executable, "-m", "sb3_sdac.zoo", "train", *PENDULUM, "-n", "60", "--eval-episodes", "1", *study, *search]
    command += ["--no-optim-plots", "-params", "learning_starts:50"]
    settings = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    processes: list[Any] = []
    for _ in range(2):
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings))
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert sorted(re.findall(r"Trial (\d) finished", output) for output in printed) == [["0"], ["1"]]

    train("-n", "30", *study, "--trial-id", "1", env="Pendulum-v1")
    assert "Loading from Optuna study" in capsys.readouterr().out
    config = Path("logs/sdac").glob("Pendulum-v1_*/Pendulum-v1/config.yml")
    assert any("target_ess" in path.read_text(encoding="utf-8") for path in config)


# === The hub ===


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, which huggingface_hub takes for the real one."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        constants = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_standin")
        monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
        yield server
        server.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy, for the second command in a process
@pytest.mark.parametrize("normalize", [False, True])
def test_push_to_hub_and_load_from_hub(train, hub, monkeypatch, capsys, normalize):
    """What one user pushes, another loads and sees play; the card's own lines load it, too."""
    train("-n", "60", env="Pendulum-v1", params=["learning_starts:20", f"normalize:{normalize}"])
    share = ["--algo", "sdac", "--env", "Pendulum-v1", "-orga", "someone"]
    monkeypatch.setattr(sys, "argv", ["zoo", "push_to_hub", *share, "-f", "logs", "--no-render", "-m", "The first"])
    zoo.main()
    files = hub.files["someone/sdac-Pendulum-v1"]
    assert hub.messages == ["The first"] and ("vec_normalize.pkl" in files) == normalize

    card, results = files["README.md"].decode(), json.loads(files["results.json"])
    assert "# **SDAC** Agent playing **Pendulum-v1**" in card and "'learning_starts', 20" in card
    assert f"value: {results['mean_reward']:.2f} +/- {results['std_reward']:.2f}" in card
    assert card.count('pip install ".[zoo]"') == 2 and "pip install rl_zoo3" not in card
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["model"].num_timesteps == 60

    monkeypatch.setattr(sys, "argv", ["zoo", "load_from_hub", *share, "-f", "loaded"])
    zoo.main()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["zoo", "enjoy", *PENDULUM, "-f", "loaded", "--no-render", "-n", "200"])
    zoo.main()
    assert "Mean reward" in capsys.readouterr().out
    assert Path("loaded/sdac/Pendulum-v1_1/Pendulum-v1/vecnormalize.pkl").is_file() == normalize
