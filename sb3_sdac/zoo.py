"""
Everything that touches rl_zoo3: our algorithms in its list, their search spaces, the embedded hyperparameters, checkpoints.

An installed package registers itself, see :mod:`sb3_sdac_zoo_hook`. Where that start-up hook is not at work (an editable
install, a checkout), this is ``python -m rl_zoo3.train --algo sdac --env Pendulum-v1`` after :func:`register`::

    python -m sb3_sdac.zoo train --algo sdac --env Pendulum-v1
"""

import argparse
import functools
import importlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from sb3_sdac.arguments import require
from sb3_sdac.checkpoint import SaveCheckpoint, is_checkpoint, load_checkpoint
from sb3_sdac.dpmd import DPMD
from sb3_sdac.sdac import SDAC

if TYPE_CHECKING:
    import optuna
    from stable_baselines3.common.vec_env import VecEnv

#: What ``--algo`` can be
ALGORITHMS: dict[str, type[SDAC]] = {"sdac": SDAC, "dpmd": DPMD}
#: What is searched and belongs to the policy
_POLICY_ARGUMENTS = ("n_train_particles", "n_sampling_steps", "exploration_noise")
_INSTALLED = Path(__file__).with_name("hyperparams")
#: The folder with ``sdac.yml``, ``dpmd.yml`` and the two of the authors: inside the installed package, beside it in a checkout
HYPERPARAMS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "hyperparams"
#: What can be run with ``python -m sb3_sdac.zoo``, and the module that does it
COMMANDS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record_video": "rl_zoo3.record_video",
    "record_training": "rl_zoo3.record_training",
    "push_to_hub": "rl_zoo3.push_to_hub",
    "load_from_hub": "rl_zoo3.load_from_hub",
    "benchmark": "rl_zoo3.benchmark",
    "plot_train": "rl_zoo3.plots.plot_train",
    "plot_from_file": "rl_zoo3.plots.plot_from_file",
    "all_plots": "rl_zoo3.plots.all_plots",
}


def sample_sdac_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Search space of SDAC, for ``rl_zoo3.train --algo sdac -optimize``.

    Trials are compared by return and not by time, so it leaves out what would make an update many times slower.

    :param trial: the trial that the values are suggested to
    :param n_actions: dimension of the action space (not used, as in the search spaces of rl_zoo3)
    :param n_envs: number of environments (not used)
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``
    :return: arguments of :class:`~sb3_sdac.SDAC`
    """
    params = {
        "target_ess": trial.suggest_float("target_ess", 0.26, 0.6),
        "n_reverse_samples": trial.suggest_categorical("n_reverse_samples", [4, 8, 16]),  # target_ess > 1/4
    }
    return _sample_common_params(trial, params, additional_args)


def sample_dpmd_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Search space of DPMD, see :func:`sample_sdac_params`.

    :param trial: the trial that the values are suggested to
    :param n_actions: dimension of the action space (not used)
    :param n_envs: number of environments (not used)
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``
    :return: arguments of :class:`~sb3_sdac.DPMD`
    """
    params = {
        "ent_coef": trial.suggest_float("ent_coef", 0.1, 10, log=True),
        "critic_steps": trial.suggest_int("critic_steps", 1, 2),
    }
    return _sample_common_params(trial, params, additional_args)


def _sample_common_params(trial: "optuna.Trial", own: dict[str, Any], additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    :param trial: the trial that the values are suggested to
    :param own: what was sampled for this algorithm alone
    :param additional_args: ``using_her_replay_buffer`` and ``her_kwargs``
    :return: arguments of the algorithm
    """
    from rl_zoo3.hyperparams_opt import sample_her_params

    params: dict[str, Any] = {
        **own,
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.03, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 9),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "large"]),
        # Not n_particles, which a trained model can be given anew
        "n_train_particles": trial.suggest_categorical("n_train_particles", [1, 2, 4]),
        "n_sampling_steps": trial.suggest_categorical("n_sampling_steps", [3, 5, 10]),
        "policy_delay": trial.suggest_int("policy_delay", 1, 3),
        "exploration_noise": trial.suggest_float("exploration_noise", 0.02, 0.5, log=True),
    }
    # What rl_zoo3 displays of a trial: the true values
    trial.set_user_attr("gamma", 1 - params["one_minus_gamma"])
    trial.set_user_attr("batch_size", 2 ** params["batch_size_pow"])
    if additional_args["using_her_replay_buffer"]:
        params = sample_her_params(trial, params, additional_args["her_kwargs"])
    return convert_params(params)


def convert_params(params: dict[str, Any]) -> dict[str, Any]:
    """
    What was sampled, or loaded from a trial, as arguments of the constructor.

    :param params: as sampled, or ``trial.params``, which has the policy's and HER's arguments on the top level
    :return: arguments of :class:`~sb3_sdac.SDAC` or :class:`~sb3_sdac.DPMD`
    """
    from rl_zoo3.hyperparams_opt import convert_offpolicy_params

    params = convert_offpolicy_params(params)
    params["policy_kwargs"] |= {name: params.pop(name) for name in _POLICY_ARGUMENTS if name in params}
    her_kwargs = {name: params.pop(name) for name in ("n_sampled_goal", "goal_selection_strategy") if name in params}
    return {**params, "replay_buffer_kwargs": her_kwargs} if her_kwargs else params


def add_algorithm(utils: ModuleType) -> None:
    """
    Makes SDAC and DPMD choices for ``--algo``.

    :param utils: ``rl_zoo3.utils``, whose dict of algorithms all of rl_zoo3 shares
    """
    utils.ALGOS.update(ALGORITHMS)
    patch_hub()
    if COMMANDS["benchmark"] in sys.orig_argv:
        patch_calls()


def add_search_space(hyperparams_opt: ModuleType) -> None:
    """
    Makes ``-optimize`` work, and training with the parameters of a trial.

    :param hyperparams_opt: ``rl_zoo3.hyperparams_opt``
    """
    hyperparams_opt.HYPERPARAMS_SAMPLER.update(sdac=sample_sdac_params, dpmd=sample_dpmd_params)
    hyperparams_opt.HYPERPARAMS_CONVERTER.update(dict.fromkeys(ALGORITHMS, convert_params))


def add_config(exp_manager: ModuleType) -> None:
    """
    Makes our hyperparameters the default for our algorithms, and lets ``-conf sdac_paper.yml`` find the file from any folder.

    :param exp_manager: ``rl_zoo3.exp_manager``
    """
    manager = exp_manager.ExperimentManager
    original = manager.read_hyperparameters
    if hasattr(original, "finds_sdac"):
        return
    package = Path(exp_manager.__file__ or "").parent
    zoo_folders = (package / "hyperparams", package.parent / "hyperparams")  # where rl_zoo3, or its checkout, has its own

    @functools.wraps(original)
    def read_hyperparameters(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config = Path(self.config)
        if self.algo in ALGORITHMS and not config.exists() and config.parent in (*zoo_folders, Path(".")):
            embedded = HYPERPARAMS / config.name
            self.config = str(embedded) if embedded.exists() else self.config
        return original(self)

    read_hyperparameters.finds_sdac = True  # type: ignore[attr-defined]
    manager.read_hyperparameters = read_hyperparameters


def add_checkpoints(exp_manager: ModuleType) -> None:
    """
    Makes ``--save-freq`` keep a ``checkpoint.zip`` beside the models, and ``-i .../checkpoint.zip`` go on from it.

    What rl_zoo3 does with ``-i`` and a model is another thing, and stays as it is: a new run of ``-n`` steps that begins with
    the model's networks. With a checkpoint ``-n`` is the length of the whole run, so the interrupted command is repeated.

    :param exp_manager: ``rl_zoo3.exp_manager``
    """
    manager = exp_manager.ExperimentManager
    load_agent, learn = manager._load_pretrained_agent, manager.learn
    if hasattr(learn, "keeps_checkpoints"):
        return

    @functools.wraps(load_agent)
    def load_agent_or_checkpoint(self: Any, hyperparams: dict[str, Any], env: "VecEnv") -> Any:
        if self.algo not in ALGORITHMS or not is_checkpoint(self.trained_agent):
            return load_agent(self, hyperparams, env)
        # As rl_zoo3 treats a model: the architecture is the file's, the other hyperparameters are the command's. Its seed is
        # not used, as the random states are the file's
        changed = {name: value for name, value in hyperparams.items() if name not in ("policy", "policy_kwargs")}
        changed |= {"tensorboard_log": self.tensorboard_log, "verbose": self.verbose}
        model = load_checkpoint(self.trained_agent, env, ALGORITHMS[self.algo], self.device, **changed)
        if model.num_timesteps >= self.n_timesteps:
            raise ValueError(
                f"{self.trained_agent} is at {model.num_timesteps} steps, and the whole run has {self.n_timesteps}: there is "
                "nothing left to train. Give a larger -n, or the model instead of the checkpoint to begin a new run with it"
            )
        print(f"Going on at {model.num_timesteps} of {self.n_timesteps} steps")
        return model

    @functools.wraps(learn)
    def learn_with_checkpoints(self: Any, model: Any) -> None:
        if self.algo not in ALGORITHMS:
            return learn(self, model)
        # With copied infos the buffer holds Python objects, which no checkpoint can
        if self.save_freq > 0 and not getattr(model.replay_buffer, "copy_info_dict", False):
            steps = self.save_freq * self.n_envs  # rl_zoo3 has made steps of all environments of it
            self.callbacks.append(SaveCheckpoint(Path(self.save_path) / "checkpoint.zip", steps))
        if is_checkpoint(self.trained_agent):
            self.n_timesteps -= model.num_timesteps
            model = SimpleNamespace(learn=functools.partial(model.learn, reset_num_timesteps=False), env=model.env)
        return learn(self, model)

    learn_with_checkpoints.keeps_checkpoints = True  # type: ignore[attr-defined]
    manager._load_pretrained_agent, manager.learn = load_agent_or_checkpoint, learn_with_checkpoints


def patch_manager(exp_manager: ModuleType) -> None:
    """:param exp_manager: ``rl_zoo3.exp_manager``"""
    add_config(exp_manager)
    add_checkpoints(exp_manager)


def patch_hub() -> None:
    """
    Lets rl_zoo3 2.9.2 push and load with today's clients of the hub, and completes its model card.

    A function has another name and type since sb3-team-hf-integration 3.2, and since huggingface_hub 1.0 a missing file (of an
    agent without VecNormalize) is no longer the error that is waited for. The card says what to install.
    """
    names = ("huggingface_sb3", "huggingface_sb3.push_to_hub", "huggingface_hub.repocard")
    sb3_hub, push, repocard = (vars(importlib.import_module(name)) for name in names)
    load, save_metadata = sb3_hub["load_from_hub"], repocard["metadata_save"]
    if hasattr(load, "knows_sdac"):
        return

    @functools.wraps(load)
    def load_from_hub(*args: Any, **kwargs: Any) -> str:
        from huggingface_hub.errors import EntryNotFoundError
        from requests.exceptions import HTTPError

        try:
            return load(*args, **kwargs)
        except EntryNotFoundError as error:
            raise HTTPError(*error.args) from error

    @functools.wraps(save_metadata)
    def save_metadata_and_usage(path: str | Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).exists():
            add_usage(Path(path))
        save_metadata(path, *args, **kwargs)

    load_from_hub.knows_sdac = True  # type: ignore[attr-defined]
    sb3_hub["load_from_hub"], repocard["metadata_save"] = load_from_hub, save_metadata_and_usage
    push.setdefault("generate_metadata", lambda *args: push["_generate_metadata"](*args).to_dict())


def add_usage(path: Path) -> None:
    """
    Puts what to install for our algorithms, and how to load the model in Python, into a model card of rl_zoo3.

    :param path: the card, in the folder that is named like the repository; of another algorithm it stays as it is
    """
    card = path.read_text(encoding="utf-8")
    title = re.search(r"^# \*\*(SDAC|DPMD)\*\* Agent playing \*\*(.+)\*\*$", card, re.MULTILINE)
    if title is None:
        return
    algorithm, env_id = title.groups()
    (organization,) = set(re.findall(r"-orga (\S+)", card))
    naming = importlib.import_module("huggingface_sb3.naming_schemes")
    file_name = naming.ModelName(algorithm.lower(), naming.EnvironmentName(env_id)).filename  # no slash and no namespace in it
    usage = f"""## Usage (in Python)
```python
from huggingface_sb3 import load_from_hub
from sb3_sdac import {algorithm}

model = {algorithm}.load(load_from_hub("{organization}/{path.parent.name}", "{file_name}"))
```
Loading runs what the file contains, so it has to be allowed: `export TRUST_REMOTE_CODE=True`. If there is a
`vec_normalize.pkl`, the model expects observations normalised by it, which `rl_zoo3.enjoy` sees to.

## Usage (with SB3 RL Zoo)"""
    card = card.replace("## Usage (with SB3 RL Zoo)", usage)
    card = card.replace("pip install rl_zoo3", 'pip install ".[zoo]"  # in a checkout of sb3_sdac')
    path.write_text(card, encoding="utf-8")


def patch_calls() -> None:
    """
    Patches commands of rl_zoo3 that start others. ``benchmark`` starts ``python enjoy.py``, a file of rl_zoo3's repository, so
    that elsewhere it would skip every agent; ``record_training`` starts a ``python -m`` that may not know SDAC.
    """
    call = subprocess.call

    def call_registered(command: list[str], *args: Any, **kwargs: Any) -> int:
        if command[:2] == ["python", "enjoy.py"] and not os.path.exists("enjoy.py"):
            command = [sys.executable, "-m", "sb3_sdac.zoo", "enjoy", *command[2:]]
        elif command[:3] == ["python", "-m", COMMANDS["record_video"]]:
            command = [sys.executable, "-m", "sb3_sdac.zoo", "record_video", *command[3:]]
        return call(command, *args, **kwargs)

    subprocess.call = call_registered  # type: ignore[assignment]


#: What to do to which module of rl_zoo3, once that has been imported. Each may be called more than once.
REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": add_algorithm,
    "rl_zoo3.hyperparams_opt": add_search_space,
    "rl_zoo3.exp_manager": patch_manager,
}


def register() -> None:
    """
    Makes rl_zoo3 know SDAC and DPMD; does no harm if it does already.

    :raises ModuleNotFoundError: without rl_zoo3
    """
    require("rl_zoo3", "zoo", "sb3_sdac.zoo")
    for name, add in REGISTRATIONS.items():
        add(importlib.import_module(name))


def main() -> None:
    """``python -m sb3_sdac.zoo train ...``: a command of rl_zoo3, after :func:`register`."""
    parser = argparse.ArgumentParser(
        prog="python -m sb3_sdac.zoo", description="A command of rl_zoo3, with SDAC and DPMD registered."
    )
    parser.add_argument("command", choices=list(COMMANDS), help="python -m rl_zoo3.<command>")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the command, for instance --algo sdac --help")
    arguments = parser.parse_args()
    register()
    if arguments.command in ("benchmark", "record_training"):
        patch_calls()
    sys.argv = [sys.argv[0], *arguments.args]
    runpy.run_module(COMMANDS[arguments.command], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # By its full name, for one module and not two: the start-up hook may have imported it already
    from sb3_sdac.zoo import main as zoo_main

    zoo_main()
