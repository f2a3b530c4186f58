"""What cannot work is refused with an error that names what was given and what is allowed, and nothing is lost by it."""

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_sdac import SDAC
from sb3_sdac.policies import Actor

SMALL: dict[str, Any] = {
    "n_diffusion_steps": 5,
    "n_sampling_steps": 2,
    "n_particles": 2,
    "n_reverse_samples": 8,
    "batch_size": 8,
    "buffer_size": 100,
    "learning_starts": 10,
    "seed": 0,
}
UNIT_BOX = spaces.Box(-1, 1, (2,), np.float32)


def make_model(env: Any = "Pendulum-v1", policy: str = "MlpPolicy", **kwargs: Any) -> SDAC:
    policy_kwargs = {"net_arch": [16], **kwargs.pop("policy_kwargs", {})}
    return SDAC(policy, env, policy_kwargs=policy_kwargs, **{**SMALL, **kwargs})


class FaultyEnv(gym.Env):
    """
    Episodes of 5 steps in which something is not a number at environment step ``when``, and then never again.

    :param fault: ``"observation"``, ``"reward"``, or none of them
    :param when: counted over all episodes, from 1; 0 for the reset
    :param value: what to give instead
    :param dict_obs: put the observation, with another one, into a dict
    """

    def __init__(
        self, fault: str = "", when: int = -1, value: float = np.nan, dict_obs: bool = False, actions: Any = UNIT_BOX
    ):
        box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.observation_space = spaces.Dict({"good": box, "bad": box}) if dict_obs else box
        self.action_space = actions
        self.fault, self.when, self.value, self.dict_obs, self.count = fault, when, value, dict_obs, 0

    def _fails(self, what: str) -> bool:
        if (self.fault, self.when) != (what, self.count):
            return False
        self.when = -1
        return True

    def _observation(self) -> Any:
        bad = np.full(3, self.count, np.float32)
        if self._fails("observation"):
            bad[1] = self.value
        return {"good": np.zeros(3, np.float32), "bad": bad} if self.dict_obs else bad

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        reward = self.value if self._fails("reward") else 1.0
        return self._observation(), reward, self.count % 5 == 0, False, {}


# Arguments


def all_of(*words: Any) -> str:
    """A pattern that asks for all the words, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(str(word))})" for word in words)


COUNTS = [
    "n_diffusion_steps",
    "n_sampling_steps",
    "n_particles",
    "n_target_particles",
    "policy_delay",
    "target_update_interval",
]
COUNTS += ["critic_steps", "batch_size", "buffer_size", "n_steps"]


@pytest.mark.parametrize("value", [0, -3, 2.5, "4", True, np.nan], ids=repr)
@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=all_of(name, f"got {value!r}", "integer of at least 1")):
        make_model(**{name: value})


@pytest.mark.parametrize("value", [1, 0, -1, 3.0, "16"], ids=repr)
def test_reverse_samples(value: Any) -> None:
    with pytest.raises(ValueError, match=all_of("n_reverse_samples", f"got {value!r}", "at least 2")):
        make_model(n_reverse_samples=value)


def test_numpy_integers_are_integers() -> None:
    integers: dict[str, Any] = {"n_particles": np.int64(3), "n_reverse_samples": np.int32(8), "train_freq": np.int64(1)}
    assert make_model(**integers, gradient_steps=np.int64(1)).learn(12)._n_updates == 2


BAD_ARGUMENTS: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
    ({"n_sampling_steps": 6}, ("n_sampling_steps", "got 6", "at most", "n_diffusion_steps=5")),
    ({"beta_schedule": "quadratic"}, ("beta_schedule", "'quadratic'", "linear", "cosine", "vp")),
    (
        {"score_matching": "reverse"},
        ("score_matching", "'reverse'", "reverse_sampling", "gradient_assisted", "mirror_descent"),
    ),
    ({"proposal": "normal"}, ("proposal", "'normal'", "truncated_normal", "clipped_normal")),
    ({"anchor": None}, ("anchor", "None", "next", "current")),
    *[
        ({"ent_coef": value}, ("ent_coef", f"got {value!r}", "positive number", "auto", "paper"))
        for value in (-0.1, 0, np.nan, np.inf, None, "", "automatic", "auto_", "auto_-1", "auto_0", "auto_x", "paper_0", "0.1")
    ],
    ({"ent_coef": "auto", "score_matching": "mirror_descent"}, ("ent_coef='auto'", "mirror_descent", "number", "'paper'")),
    ({"ent_coef": "paper", "exploration_noise": 0}, ("ent_coef='paper'", "exploration_noise", "positive")),
    *[
        ({"target_ess": value}, ("target_ess", f"got {value!r}", "n_reverse_samples=8", "above 0.125 and below 1"))
        for value in (0.125, 0.1, 1.0, 4, np.nan, "0.3")
    ],
    *[
        ({name: value}, (name, f"got {value!r}", "positive"))
        for name in ("init_noise_scale", "reward_scale")
        for value in (0, -1.0, np.inf, "1")
    ],
    *[
        ({name: value}, (name, f"got {value!r}", "between 0 and 1"))
        for name in ("eta", "tau", "gamma", "pessimism")
        for value in (-0.1, 1.1, np.nan, "0.5")
    ],
    *[({"n_bins": value}, ("n_bins", f"got {value!r}", "odd integer of at least 1")) for value in (0, 2, -1, 2.5, None, True)],
    *[({"policy_kwargs": {"max_value": value}}, ("max_value", f"got {value!r}", "positive")) for value in (0.0, -1, "1")],
    *[({"replay_recency": value}, ("replay_recency", f"got {value!r}", "at least 1")) for value in (0.9, np.inf, "auto")],
    *[({"exploration_noise": value}, ("exploration_noise", f"got {value!r}", "at least 0")) for value in (-0.1, np.nan, None)],
    *[
        ({"actor_lr_decay": value}, ("actor_lr_decay", value, "first < last"))
        for value in ((1e-5, 4, 2), (1e-5, -1, 2), (1e-5, 2), (-1e-5, 0, 2))
    ],
    *[
        ({name: value}, (name, f"got {value!r}", "True, False or 'auto'"))
        for name in ("mixed_precision", "compile")
        for value in (1, 0.0, None, "on")
    ],
    *[({name: -1e-3}, (name, "got -0.001", "at least 0")) for name in ("learning_rate", "qf_learning_rate")],
    *[({"policy_kwargs": {"n_critics": value}}, ("n_critics", value, "at least 1")) for value in (2.5, "2", True)],
    *[({"policy_kwargs": {"net_arch": value}}, ("net_arch", value, "at least 1")) for value in ([0], [8.0])],
    *[({"replay_buffer_kwargs": {name: 0.5}}, (name, "0.5", "of SDAC itself")) for name in ("n_steps", "gamma")],
    ({"optimize_memory_usage": True, "n_steps": 3}, ("n_steps", "1 or None", "got 3")),
    ({"policy_kwargs": {"use_sde": True}}, ("'use_sde': True", "not supported")),
    ({"use_sde": True}, ("use_sde=True", "not supported", "exploration_noise")),
    ({"use_sde": True, "sde_sample_freq": 4}, ("use_sde=True", "not supported", "exploration_noise")),
]


@pytest.mark.parametrize("kwargs, words", BAD_ARGUMENTS, ids=[str(kwargs) for kwargs, _ in BAD_ARGUMENTS])
def test_arguments(kwargs: dict[str, Any], words: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=all_of(*words)):
        make_model(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [{"gradient_steps": value} for value in (-2, 1.5, "1")]
    + [{"train_freq": value} for value in (0, -1, 1.5, (0, "episode"))],
    ids=str,
)
def test_update_frequency(kwargs: dict[str, Any]) -> None:
    """Noticed at once, not when the first update is due."""
    ((name, value),) = kwargs.items()
    with pytest.raises(ValueError, match=all_of(name, value[0] if isinstance(value, tuple) else value)):
        make_model(**kwargs)


@pytest.mark.parametrize("kwargs", [{"policy_kwargs": {"n_critics": 0}}, {"policy_kwargs": {"n_particles": 0}}], ids=str)
def test_policy_kwargs(kwargs: dict[str, Any]) -> None:
    ((name, value),) = kwargs["policy_kwargs"].items()
    with pytest.raises(ValueError, match=all_of(name, f"{value}")):
        make_model(**kwargs)


@pytest.mark.parametrize("ent_coef", ["auto_1e-2", "auto_.5", 2, np.float32(0.5)], ids=repr)
def test_all_notations_of_numbers(ent_coef: Any) -> None:
    assert make_model(ent_coef=ent_coef).learn(12)._n_updates == 2


def test_arguments_are_checked_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of a million transitions is not allocated to find out that a name was misspelt."""
    built = []
    monkeypatch.setattr(Actor, "__init__", lambda *_, **__: built.append("actor"))
    monkeypatch.setattr(ReplayBuffer, "__init__", lambda *_, **__: built.append("buffer"))
    with pytest.raises(ValueError, match="beta_schedule"):
        SDAC("MlpPolicy", "Pendulum-v1", beta_schedule="quadratic")
    assert not built
    with pytest.raises(AttributeError):  # that is where they would have been built
        SDAC("MlpPolicy", "Pendulum-v1")
    assert built


@pytest.mark.parametrize("kwargs", [{"n_particles": 0}, {"ent_coef": -1.0}, {"score_matching": "x"}], ids=str)
def test_arguments_given_to_load(kwargs: dict[str, Any], tmp_path: Path) -> None:
    make_model().save(tmp_path / "model.zip")
    ((name, value),) = kwargs.items()
    with pytest.raises(ValueError, match=all_of(name, f"got {value!r}")):
        SDAC.load(tmp_path / "model.zip", **kwargs)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", th.device("cuda")])
def test_cuda_without_cuda(device: Any) -> None:
    with pytest.raises(ValueError, match=all_of(f"device='{device}'", "no CUDA", "'cpu'", "'auto'")):
        make_model(device=device)


@pytest.mark.parametrize("policy", ["MlpPolicies", SAC.policy_aliases["MlpPolicy"]], ids=str)
def test_policy(policy: Any) -> None:
    words = ("MlpPolicies",) if isinstance(policy, str) else ("SACPolicy", "MlpPolicy", "CnnPolicy", "MultiInputPolicy")
    with pytest.raises(ValueError, match=all_of(*words)):
        SDAC(policy, "Pendulum-v1")


# Action spaces

DISCRETE = [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2), spaces.Dict({"a": UNIT_BOX})]
UNBOUNDED = [
    spaces.Box(-np.inf, np.inf, (2,), np.float32),
    spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32)),
    spaces.Box(np.array([-1, 1], np.float32), np.array([1, 1], np.float32)),
]


@pytest.mark.parametrize("space", DISCRETE, ids=lambda space: type(space).__name__)
def test_action_spaces_other_than_box(space: spaces.Space) -> None:
    with pytest.raises((ValueError, AssertionError), match=all_of(type(space).__name__, "Box", "support")):
        make_model(FaultyEnv(actions=space))


@pytest.mark.parametrize("space", UNBOUNDED, ids=["unbounded", "half bounded", "empty"])
def test_bounds(space: spaces.Box) -> None:
    env = FaultyEnv(actions=space)
    with pytest.raises(ValueError, match=all_of("finite bounds", space, space.low, space.high, "RescaleAction")):
        make_model(env)
    # Neither as the next environment of a model
    with pytest.raises(ValueError, match="finite bounds"):
        make_model(FaultyEnv()).set_env(env)


# Not a number


def check_saveable(model: SDAC, tmp_path: Path) -> None:
    """The model as it was: it can be saved, loaded, and what it has stored and learned is finite."""
    buffer = model.replay_buffer
    assert buffer is not None
    for name in ("observations", "next_observations", "actions", "rewards"):
        values = getattr(buffer, name)
        for value in values.values() if isinstance(values, dict) else [values]:
            assert np.isfinite(value[: buffer.pos]).all(), name
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip")
    for name, value in loaded.policy.state_dict().items():
        assert th.equal(value, model.policy.state_dict()[name])
        assert th.isfinite(value).all()


@pytest.mark.parametrize("dict_obs", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "fault, when, name",
    [
        ("observation", 0, "observation"),
        ("observation", 13, "observation"),
        ("observation", 15, "terminal observation"),
        ("reward", 4, "reward"),
        ("reward", 13, "reward"),
    ],
)
def test_not_finite_during_learning(fault: str, when: int, name: str, value: float, dict_obs: bool, tmp_path: Path) -> None:
    env = FaultyEnv(fault, when, value, dict_obs)
    model = make_model(env, "MultiInputPolicy" if dict_obs else "MlpPolicy")
    key = " 'bad'" if dict_obs and fault == "observation" else ""
    with pytest.raises(ValueError, match=rf"The {name}{key} at environment step {when} is not finite: .*{value}"):
        model.learn(40)
    # Nothing of that step
    assert model.replay_buffer is not None and model.replay_buffer.pos == max(when - 1, 0)
    check_saveable(model, tmp_path)
    if when > 0:  # the fault is past, so learning can go on
        model.learn(20)


def test_second_environment_is_checked_too() -> None:
    env = DummyVecEnv([FaultyEnv, lambda: FaultyEnv("reward", 7)])
    with pytest.raises(ValueError, match=all_of("reward at environment step 14", "[ 1. nan]")):
        make_model(env).learn(40)


@pytest.mark.parametrize("fault", ["observation", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in the wrapper's statistics
def test_not_finite_behind_vec_normalize(fault: str, value: float, training: bool, tmp_path: Path) -> None:
    """Also where the wrapper clips infinity to something finite."""
    env = VecNormalize(DummyVecEnv([lambda: FaultyEnv(fault, 13, value)]))
    env.training = training
    model = make_model(env)
    with pytest.raises(ValueError, match=f"{fault} at environment step 13 is not finite"):
        model.learn(40)
    check_saveable(model, tmp_path)


def test_broken_network(tmp_path: Path) -> None:
    """A weight that is not a number shows in the first action after the warm-up."""
    model = make_model(FaultyEnv()).learn(12)
    for parameter in model.actor.noise_predictor.rest.parameters():
        th.nn.init.constant_(parameter, np.nan)
    with pytest.raises(ValueError, match=r"The action at environment step 12 is not finite: .*nan"):
        model.learn(10, reset_num_timesteps=False)
    model.save(tmp_path / "model.zip")
    loaded = SDAC.load(tmp_path / "model.zip")
    assert all(th.isnan(parameter).all() for parameter in loaded.actor.noise_predictor.rest.parameters())


def test_broken_action_noise(tmp_path: Path) -> None:
    model = make_model(FaultyEnv(), action_noise=NormalActionNoise(np.zeros(2), np.array([0.1, np.nan])))
    with pytest.raises(ValueError, match=r"The action at environment step 0 is not finite: .*nan"):
        model.learn(10)
    check_saveable(model, tmp_path)


# Files


@pytest.mark.parametrize("algorithm", [SAC, TD3, PPO])
def test_file_of_another_algorithm(algorithm: Any, tmp_path: Path) -> None:
    kwargs = {"n_steps": 8, "batch_size": 8} if algorithm is PPO else {"buffer_size": 10}
    model = algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [4]}, **kwargs)
    model.save(tmp_path / "other.zip")
    name = type(model.policy).__name__
    for env in (None, gym.make("Pendulum-v1")):
        with pytest.raises(ValueError, match=all_of(name, "another algorithm", "DiffusionPolicy")):
            SDAC.load(tmp_path / "other.zip", env=env)


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Replace each member of a zip file, or drop it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


DAMAGES: dict[str, Callable[[str, bytes], bytes | None]] = {
    "policy is garbage": lambda name, content: b"garbage" if name == "policy.pth" else content,
    "policy is empty": lambda name, content: b"" if name == "policy.pth" else content,
    "policy is cut": lambda name, content: content[: len(content) // 2] if name == "policy.pth" else content,
    "policy is missing": lambda name, content: None if name == "policy.pth" else content,
    "optimizer is missing": lambda name, content: None if name == "actor.optimizer.pth" else content,
    "variables are garbage": lambda name, content: b"garbage" if name == "pytorch_variables.pth" else content,
    "data is garbage": lambda name, content: b"garbage" if name == "data" else content,
    "data is binary": lambda name, content: bytes(range(256)) if name == "data" else content,
    "data is cut": lambda name, content: content[: len(content) // 2] if name == "data" else content,
    "data is empty": lambda name, content: b"{}" if name == "data" else content,
    "data is missing": lambda name, content: None if name == "data" else content,
    "everything is missing": lambda name, content: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_garbage_inside_a_zip(damage: str, tmp_path: Path) -> None:
    make_model().learn(14).save(tmp_path / "model.zip")
    rewrite(tmp_path / "model.zip", lambda name, content: content)
    SDAC.load(tmp_path / "model.zip")  # rewriting alone does no harm
    rewrite(tmp_path / "model.zip", DAMAGES[damage])
    with pytest.raises(ValueError, match=all_of("model.zip", "damaged")):
        SDAC.load(tmp_path / "model.zip")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_zip(share: float, tmp_path: Path) -> None:
    stream = io.BytesIO()
    make_model().save(stream)
    content = stream.getvalue()
    path = tmp_path / "model.zip"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"(?s)(?=.*model\.zip).*(damaged|zip-file)"):
        SDAC.load(path)


def test_flipped_bytes(tmp_path: Path) -> None:
    """The checksums notice."""
    path = tmp_path / "model.zip"
    make_model().save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = bytes(byte ^ 255 for byte in content[middle : middle + 50])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=all_of("model.zip")):
        SDAC.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SDAC.load(tmp_path / "nowhere.zip")


@pytest.mark.parametrize("what", ["Observation", "Action"])
def test_other_spaces(what: str, tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model.zip")
    other: gym.Env = FaultyEnv(actions=model.action_space) if what == "Observation" else FaultyEnv()
    if what == "Action":
        assert isinstance(model.observation_space, spaces.Box)
        other.observation_space = model.observation_space
    words = (f"{what} spaces do not match", getattr(model, f"{what.lower()}_space"), getattr(other, f"{what.lower()}_space"))
    with pytest.raises(ValueError, match=all_of(*words)):
        SDAC.load(tmp_path / "model.zip", env=other)
    with pytest.raises(ValueError, match=all_of(*words)):
        model.set_env(other)


def test_other_architecture(tmp_path: Path) -> None:
    make_model().save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=all_of("policy kwargs", "[16]", "[12]")):
        SDAC.load(tmp_path / "model.zip", policy_kwargs={"net_arch": [12]})
    # The file's own word for it, but other networks inside
    make_model(policy_kwargs={"net_arch": [12]}).save(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "other.zip") as archive:
        policy = archive.read("policy.pth")
    rewrite(tmp_path / "model.zip", lambda name, content: policy if name == "policy.pth" else content)
    with pytest.raises(ValueError, match=all_of("model.zip", "architecture", "12", "16")):
        SDAC.load(tmp_path / "model.zip")


@pytest.mark.parametrize("kwargs", [{"policy_kwargs": {"net_arch": [12]}}, {"average_actor": True}], ids=str)
def test_parameters_of_another_architecture(kwargs: dict[str, Any], tmp_path: Path) -> None:
    make_model(**kwargs).save(tmp_path / "other.zip")
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)size mismatch|unexpected key|do not match"):
        make_model().set_parameters(str(tmp_path / "other.zip"))


@pytest.mark.parametrize("box", [spaces.Box(0, 10, (2,), np.uint8), spaces.Box(-3.4e38, 3.4e38, (1,), np.float32)], ids=str)
def test_boxes_that_cannot_be_scaled(box: spaces.Box) -> None:
    """Integers would truncate the actions in the buffer, and the width of the other is infinite."""
    with pytest.raises(ValueError, match=all_of("floating-point", "finite", box)):
        SDAC("MlpPolicy", FaultyEnv(actions=box))


def test_her_without_its_environment(tmp_path: Path) -> None:
    env = BitFlippingEnv(n_bits=4, continuous=True)
    model = SDAC(
        "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, buffer_size=100, policy_kwargs={"net_arch": [4]}
    )
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=all_of("HerReplayBuffer", "env=")):
        SDAC.load(tmp_path / "model.zip")
    assert SDAC.load(tmp_path / "model.zip", env=env).replay_buffer is not None
