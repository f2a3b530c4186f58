"""What is saved comes back: predictions, parameters, optimizers, temperature, replay buffer; and learning goes on."""

import copy
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.models import make_model, observations
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_sdac import DPMD, SDAC, CnnPolicy, DiffusionPolicy, MlpPolicy, MultiInputPolicy
from sb3_sdac.policies import Actor

ENT_COEFS: list[float | str] = [0.3, "auto", "auto_0.1", "paper"]


def assert_same(first: Any, second: Any, name: str = "") -> None:
    """Bit-equal tensors, at any depth of a state dict."""
    assert type(first) is type(second), name
    if isinstance(first, th.Tensor):
        assert th.equal(first, second), name
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key in first:
            assert_same(first[key], second[key], f"{name}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), name
        for i, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{name}[{i}]")
    else:
        assert first == second, name


def assert_same_actions(first: Any, second: Any, observation: Any) -> None:
    """Bit-equal deterministic actions, and stochastic ones from the same state of the generator."""
    for deterministic in (True, False):
        actions = []
        for model in (first, second):
            th.manual_seed(3)
            actions.append(model.predict(observation, deterministic=deterministic)[0])
        np.testing.assert_array_equal(actions[0], actions[1])


# The whole model


@pytest.mark.parametrize("average_actor", [True, False])
@pytest.mark.parametrize("ent_coef", ENT_COEFS)
def test_everything_is_restored(ent_coef: float | str, average_actor: bool, tmp_path: Path) -> None:
    model = make_model(
        ent_coef=ent_coef, policy_kwargs={"average_actor": average_actor, "scale_noise_by_ent_coef": True}
    ).learn(24)
    model.save(tmp_path / "model")
    loaded = SDAC.load(tmp_path / "model.zip", env=model.get_env())

    assert_same(loaded.get_parameters(), model.get_parameters())
    optimizers = {"actor.optimizer", "critic.optimizer", "temperature.optimizer"}
    assert set(loaded.get_parameters()) == {"policy", "update.reward_statistics", *optimizers}
    for name in optimizers - ({"temperature.optimizer"} if ent_coef != "paper" else set()):
        assert loaded.get_parameters()[name]["state"], f"the state of {name} is empty"
    assert_same(loaded.ent_coef_tensor, model.ent_coef_tensor)
    assert loaded.ent_coef == ent_coef
    for name in ("num_timesteps", "_n_updates", "_n_actor_updates", "policy_kwargs", "buffer_size", "_episode_num"):
        assert getattr(loaded, name) == getattr(model, name), name
        assert getattr(model, name) != 0 or name == "_episode_num", name
    assert loaded.actor is loaded.policy.actor and loaded.critic_target is loaded.policy.critic_target
    assert (loaded.actor_target is not None) == average_actor
    assert_same_actions(model, loaded, observations(20))

    before = loaded.get_parameters()["policy"]["actor.noise_predictor.first.weight"].clone()
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded._n_updates == 34
    assert not th.equal(loaded.get_parameters()["policy"]["actor.noise_predictor.first.weight"], before)
    # The optimizers step the loaded networks, and the paper's the temperature that acts
    for model_part in (loaded.actor, loaded.critic):
        stepped = {id(parameter) for group in model_part.optimizer.param_groups for parameter in group["params"]}
        assert stepped == {id(parameter) for parameter in model_part.parameters()}
    assert loaded.temperature.optimizer.param_groups[0]["params"][0] is loaded.policy.log_ent_coef


@pytest.mark.parametrize("ent_coef", ["auto", "paper"])
def test_training_goes_on_as_if_never_interrupted(ent_coef: str, tmp_path: Path) -> None:
    """The updates after load equal those without it, given the same replay buffer and random numbers."""
    model = make_model(ent_coef=ent_coef).learn(24)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = SDAC.load(tmp_path / "model.zip", env=model.get_env())
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    for each in (model, loaded):
        each.set_logger(model.logger)
        each.set_random_seed(7)
        each.train(gradient_steps=5, batch_size=8)
    assert_same(loaded.get_parameters(), model.get_parameters())


def test_statistics_are_restored(tmp_path: Path) -> None:
    """Those of the rewards, and DPMD's of Q."""
    for algorithm in (SDAC, DPMD):
        model = make_model(algorithm=algorithm).learn(24)
        model.save(tmp_path / "model.zip")
        updates = [model.update, algorithm.load(tmp_path / "model.zip").update]
        for name in ["reward_statistics"] + ["q_statistics"] * (algorithm is DPMD):
            saved, loaded = (getattr(update, name).state_dict() for update in updates)
            assert_same(loaded, saved)
            assert all(value not in (0, 1) for value in saved.values())


LOAD_AND_PREDICT = """
import sys
import numpy as np, torch as th
from sb3_sdac import SDAC
th.set_num_threads(1)
for folder in sys.argv[1:]:
    model = SDAC.load(folder + "/model.zip")
    np.save(folder + "/actions.npy", model.predict(np.load(folder + "/obs.npy"), deterministic=True)[0])
"""


def test_same_actions_in_a_new_process(tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"default": {}, "paper": {"eta": 1.0, "average_actor": True, "scale_noise_by_ent_coef": True}}
    models = {
        tmp_path / name: make_model(ent_coef="paper", policy_kwargs={"net_arch": [64, 64], **kinds[name]}).learn(24)
        for name in kinds
    }
    for folder, model in models.items():
        folder.mkdir()
        model.save(folder / "model.zip")
        np.save(folder / "obs.npy", observations(20))
    subprocess.run([sys.executable, "-c", LOAD_AND_PREDICT, *map(str, models)], check=True)
    for folder, model in models.items():
        actions, _ = model.predict(observations(20), deterministic=True)
        np.testing.assert_array_equal(np.load(folder / "actions.npy"), actions)


@pytest.mark.parametrize("target", ["str", "path", "file", "bytes"])
def test_where_to_save(target: str, tmp_path: Path) -> None:
    model = make_model()
    if target == "bytes":
        stream = io.BytesIO()
        model.save(stream)
        stream.seek(0)
        loaded = SDAC.load(stream)
    elif target == "file":
        with open(tmp_path / "model.zip", "wb") as file:
            model.save(file)
        with open(tmp_path / "model.zip", "rb") as file:
            loaded = SDAC.load(file)
    else:
        path: str | Path = str(tmp_path / "model") if target == "str" else tmp_path / "model"
        model.save(path)
        assert (tmp_path / "model.zip").is_file()
        loaded = SDAC.load(path)
    assert_same_actions(model, loaded, observations(20))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"learning_rate": LinearSchedule(1e-3, 1e-4, 1.0), "qf_learning_rate": LinearSchedule(2e-3, 2e-4, 1.0)},
        {"learning_rate": lambda progress: 1e-3 * progress},
        {"train_freq": (2, "step"), "action_noise": NormalActionNoise(np.zeros(1), np.ones(1))},
        {"policy_kwargs": {"share_features_extractor": True, "n_critics": 3, "net_arch": {"pi": [8], "qf": [9]}}},
        {"policy_kwargs": {"beta_schedule": "cosine", "eta": 0.5, "n_train_particles": 3}, "actor_lr_decay": (1e-5, 2, 4)},
    ],
    ids=["schedules", "function", "noise", "policy", "diffusion"],
)
def test_arguments_survive(kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**kwargs).learn(14)
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip", env=model.get_env())
    assert repr(loaded.train_freq) == repr(model.train_freq)
    assert repr(loaded.action_noise) == repr(model.action_noise)
    assert loaded.lr_schedule(0.3) == model.lr_schedule(0.3)
    assert loaded.policy_kwargs == model.policy_kwargs
    assert loaded.policy.live_arguments() == model.policy.live_arguments()
    assert tuple(loaded.actor_lr_decay or ()) == (model.actor_lr_decay or ())  # JSON knows no tuples
    assert_same_actions(model, loaded, observations(20))
    assert_same(loaded.get_parameters(), model.get_parameters())
    logged = [each.learn(14, log_interval=10_000).logger.name_to_value for each in (model, loaded)]
    for name in ("train/learning_rate", "train/qf_learning_rate", "train/n_updates"):
        assert logged[0][name] == logged[1][name], name


@pytest.mark.parametrize(
    "policy, cls, env",
    [
        ("MlpPolicy", MlpPolicy, "Pendulum-v1"),
        ("CnnPolicy", CnnPolicy, FakeImageEnv(screen_height=36, screen_width=36, discrete=False)),
        ("MultiInputPolicy", MultiInputPolicy, SimpleMultiObsEnv(discrete_actions=False)),
    ],
)
def test_policy_and_actor_alone(policy: str, cls: type[DiffusionPolicy], env: Any, tmp_path: Path) -> None:
    model = make_model(env, policy, buffer_size=20, gradient_steps=2).learn(12)
    vec_env = model.get_env()
    assert vec_env is not None
    observation = vec_env.reset()
    model.save(tmp_path / "model.zip")
    assert_same_actions(model, SDAC.load(tmp_path / "model.zip"), observation)
    model.policy.save(str(tmp_path / "policy.pth"))
    assert_same_actions(model.policy, cls.load(str(tmp_path / "policy.pth")), observation)
    model.actor.save(str(tmp_path / "actor.pth"))
    assert_same_actions(model.actor, Actor.load(str(tmp_path / "actor.pth")), observation)


class OwnPolicy(DiffusionPolicy):
    """As SB3's guide to custom policies has them: the arguments by name unseen, one of them its own."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "exploration_noise": 0.3})


def test_policy_of_ones_own(tmp_path: Path) -> None:
    """Only what was set on it is written into its arguments."""
    model = SDAC(OwnPolicy, "Pendulum-v1", buffer_size=10, policy_kwargs={"net_arch": [8]}, device="cpu")
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip")
    assert type(loaded.policy) is OwnPolicy and loaded.policy_kwargs == {"net_arch": [8]}
    assert loaded.policy.exploration_noise == 0.3
    loaded.policy.n_particles = 7
    loaded.save(tmp_path / "again.zip")
    again = SDAC.load(tmp_path / "again.zip")
    assert again.policy_kwargs == {"net_arch": [8], "n_particles": 7} and again.policy.exploration_noise == 0.3
    assert_same_actions(loaded, again, observations(20))


def test_settings_of_a_policy_alone(tmp_path: Path) -> None:
    """What was set on it is in its own file, too, and in the actor's."""
    policy = make_model(policy_kwargs={"average_actor": True}).policy
    policy.n_particles, policy.eta, policy.pessimism, policy.exploration_noise = 5, 0.7, 0.4, 0.9
    policy.save(str(tmp_path / "policy.pth"))
    assert_same_actions(policy, loaded := DiffusionPolicy.load(str(tmp_path / "policy.pth")), observations(20))
    assert loaded.live_arguments() == policy.live_arguments()
    policy.actor.save(str(tmp_path / "actor.pth"))
    assert_same_actions(policy.actor, Actor.load(str(tmp_path / "actor.pth")), observations(20))
    assert_same_actions(policy, copy.deepcopy(policy), observations(20))
    policy.n_particles = 6
    assert loaded.n_particles == 5


# Parameters


def test_set_parameters_exact_match() -> None:
    model, other = make_model(), make_model(seed=1).learn(14)
    parameters: dict[str, Any] = other.get_parameters()
    model.set_parameters(parameters, exact_match=True)
    assert_same(model.get_parameters(), parameters)
    assert_same_actions(model, other, observations(20))

    del parameters["critic.optimizer"]
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters(parameters, exact_match=True)
    model.set_parameters(parameters, exact_match=False)
    with pytest.raises(ValueError, match="nonsense is an invalid object name"):
        model.set_parameters({"nonsense": th.zeros(1)}, exact_match=False)


def test_set_parameters_from_a_file(tmp_path: Path) -> None:
    model, other = make_model(), make_model(seed=1).learn(14)
    other.save(tmp_path / "other.zip")
    model.set_parameters(str(tmp_path / "other.zip"))
    assert_same(model.get_parameters(), other.get_parameters())


def test_exclude_and_include(tmp_path: Path) -> None:
    model = make_model(tau=0.5, gamma=0.5).learn(14)
    model.save(tmp_path / "excluded.zip", exclude=["tau"])
    loaded = SDAC.load(tmp_path / "excluded.zip")
    assert (loaded.tau, loaded.gamma) == (0.005, 0.5)
    model.save(tmp_path / "included.zip", include=["device"])
    assert SDAC.load(tmp_path / "included.zip").device == model.device
    for name, included in (("included", True), ("excluded", False)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            assert ("device" in json.loads(archive.read("data"))) == included


@pytest.mark.parametrize("ent_coef", ENT_COEFS)
def test_load_with_other_arguments(ent_coef: float | str, tmp_path: Path) -> None:
    model = make_model(ent_coef=ent_coef).learn(14)
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip", env=model.get_env(), ent_coef=0.25, n_reverse_samples=9)
    assert loaded.n_reverse_samples == 9
    assert loaded.ent_coef_tensor == pytest.approx(0.25)
    loaded.learn(14)
    assert loaded.ent_coef_tensor == pytest.approx(0.25)
    assert loaded.predict(observations(20))[0].shape == (20, 1)


def test_load_with_another_discount_factor(tmp_path: Path) -> None:
    """The values that the critics can give are in their weights, so a larger one may not fit: that is said."""
    env = make_vec_env("Pendulum-v1")
    make_model(env, policy_kwargs={"n_bins": 11}, gamma=0.9).save(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"values up to 20 .*gamma=0.99 .*values up to 200\. Train a new"):
        SDAC.load(tmp_path / "model", gamma=0.99)
    SDAC.load(tmp_path / "model", gamma=0.8)
    make_model(env, policy_kwargs={"n_bins": 1}, gamma=0.9).save(tmp_path / "model")
    SDAC.load(tmp_path / "model", gamma=0.99)


def test_what_is_in_the_file(tmp_path: Path) -> None:
    """Networks are stored once, as parameters; neither they nor transitions are pickled among the other attributes."""
    model = make_model(policy_kwargs={"average_actor": True}).learn(14)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    attributes = {
        name for name, value in vars(model).items() if isinstance(value, (th.nn.Module, th.Tensor, th.optim.Optimizer))
    }
    assert {"policy", "actor", "actor_target", "critic"} <= attributes
    assert not set(data) & {*attributes, "env", "replay_buffer", "_is_live", "_metrics", "_run_update", "_mixed_precision"}
    assert data["batch_size"] == 8
    assert not set(data) & {"update", "temperature"}  # nor what holds them


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_bare_dictionary_of_numbers_loads(batch_norm: bool) -> None:
    """Without the versions that PyTorch keeps in a state dict, as after a way through another format."""
    model, other = (make_model(policy_kwargs={"batch_norm": batch_norm}, seed=seed).learn(14) for seed in (0, 1))
    other.policy.load_state_dict({name: value.clone() for name, value in model.policy.state_dict().items()})
    expected, found = (m.predict(observations(20), deterministic=True)[0] for m in (model, other))
    np.testing.assert_array_equal(found, expected)


# Replay buffer and environments


@pytest.mark.parametrize("n_steps", [1, 3])
def test_replay_buffer(n_steps: int, tmp_path: Path) -> None:
    model = make_model(n_steps=n_steps).learn(14)
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = make_model(seed=1, n_steps=n_steps)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    old, new = model.replay_buffer, loaded.replay_buffer
    assert isinstance(old, ReplayBuffer) and isinstance(new, ReplayBuffer)
    assert isinstance(new, NStepReplayBuffer) == (n_steps > 1)
    assert (new.pos, new.full) == (old.pos, old.full) == (14, False)
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name), err_msg=name)
    loaded.learn(20)


@pytest.mark.parametrize("n_envs, n_steps", [(1, 1), (2, 1), (2, 3)])
def test_load_without_env(n_envs: int, n_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acting needs no replay buffer; set_env creates the one of the saved size."""
    model = make_model(make_vec_env("Pendulum-v1", n_envs), n_steps=n_steps, buffer_size=60).learn(14)
    model.save(tmp_path / "model.zip")
    allocated = []
    original = ReplayBuffer.__init__

    def init(buffer: ReplayBuffer, buffer_size: int, *args: Any, **kwargs: Any) -> None:
        allocated.append(buffer_size)
        original(buffer, buffer_size, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ReplayBuffer, "__init__", init)
        loaded = SDAC.load(tmp_path / "model.zip")
    assert sum(allocated) <= n_envs, "no room for transitions is needed to act"
    assert vars(loaded)["replay_buffer"] is None and loaded.buffer_size == 60
    assert_same_actions(model, loaded, observations(20))
    # What was loaded for acting can be saved again
    loaded.save(tmp_path / "again.zip")
    assert SDAC.load(tmp_path / "again.zip").buffer_size == 60

    loaded.set_env(make_vec_env("Pendulum-v1", n_envs))
    assert type(loaded.replay_buffer) is type(model.replay_buffer)
    assert model.replay_buffer is not None and loaded.replay_buffer is not None
    assert loaded.replay_buffer.observations.shape == model.replay_buffer.observations.shape == (60 // n_envs, n_envs, 3)
    assert getattr(loaded.replay_buffer, "n_steps", 1) == n_steps
    loaded.learn(20)
    assert loaded._n_updates > model._n_updates


def test_load_without_env_then_replay_buffer(tmp_path: Path) -> None:
    model = make_model().learn(14)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = SDAC.load(tmp_path / "model.zip")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    loaded.set_env(make_vec_env("Pendulum-v1"))
    assert loaded.replay_buffer is not None and loaded.replay_buffer.pos == 14


def test_set_env() -> None:
    model = make_model().learn(14)
    buffer = model.replay_buffer
    model.set_env(make_vec_env("Pendulum-v1", seed=3))
    assert model.replay_buffer is buffer
    model.learn(14, reset_num_timesteps=False)
    assert model.num_timesteps == 28


@pytest.mark.parametrize("load", [False, True])
def test_number_of_environments(load: bool, tmp_path: Path) -> None:
    """Another number of environments goes into load, and set_env says so."""
    model = make_model().learn(14)
    two: Callable[[], VecEnv] = lambda: make_vec_env("Pendulum-v1", 2)  # noqa: E731
    model.save(tmp_path / "model.zip")
    if not load:
        with pytest.raises(AssertionError, match=r"\(2 != 1\).*use `SDAC.load\(path, env\)`"):
            model.set_env(two())
        return
    loaded = SDAC.load(tmp_path / "model.zip", env=two())
    assert loaded.n_envs == 2
    assert isinstance(loaded.replay_buffer, ReplayBuffer) and loaded.replay_buffer.rewards.shape == (50, 2)
    loaded.learn(20)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", th.device("cuda")])
def test_load_on_a_device_that_is_not_there(device: str | th.device, tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match=f"'{device}'.*not there.*cpu"):
        loaded = SDAC.load(tmp_path / "model.zip", device=device)
    assert loaded.device == loaded.actor.device == th.device("cpu")
    assert_same_actions(model, loaded, observations(20))


def test_spaces_of_the_file_are_kept(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip")
    assert loaded.observation_space == model.observation_space
    assert loaded.action_space == model.action_space and isinstance(loaded.action_space, spaces.Box)
