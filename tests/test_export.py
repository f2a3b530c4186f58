"""Exported policies act as ``predict(deterministic=True)`` does, from raw observations; no failure overwrites anything."""

import errno
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize
from torch import nn

from sb3_sdac import SDAC, export
from sb3_sdac.export import DeterministicActor, export_onnx

ROOT = Path(__file__).parents[1]
#: Betas that amplify rounding least, and noise with which random networks reach few corners of the box
SMALL: dict[str, Any] = {"net_arch": [16], "n_sampling_steps": 2, "beta_schedule": "vp", "init_noise_scale": 0.05}
#: Half widths 2 and 0.25
ACTIONS = spaces.Box(np.array([-1, 0], dtype=np.float32), np.array([3, 0.5], dtype=np.float32))
IMAGE = spaces.Box(0, 255, (36, 37, 3), np.uint8)
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ALL_KINDS = spaces.Dict(
    {
        "linear": VECTOR,  # as an operation inside is called
        "second": VECTOR,  # of the same shape: not to be mistaken for each other
        "image": IMAGE,
        "one": spaces.Discrete(5),
        "several": spaces.MultiDiscrete([3, 4]),
        "bits": spaces.MultiBinary(3),
    }
)
#: VecNormalize takes images as they are stored
CHANNELS_FIRST = spaces.Dict({**ALL_KINDS.spaces, "image": spaces.Box(0, 255, (3, 36, 37), np.uint8)})


class SpacesEnv(gym.Env[Any, np.ndarray]):
    """Random observations, far from zero where they are not bounded."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box = ACTIONS):
        self.observation_space, self.action_space = observation_space, action_space
        observation_space.seed(0)

    def _observe(self) -> Any:
        obs = self.observation_space.sample()
        if isinstance(obs, dict):
            return {key: 5 + 3 * value if key in ("linear", "second") else value for key, value in obs.items()}
        return 5 + 3 * obs if self.observation_space is VECTOR else obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observe(), 0.0, False, False, {}


def make_model(
    observation_space: spaces.Space,
    normalize: dict[str, Any] | None = None,
    action_space: spaces.Box = ACTIONS,
    **policy_kwargs: Any,
) -> Any:
    """A model with random networks and running statistics, its VecNormalize having seen some observations."""
    env: VecEnv = DummyVecEnv([lambda: SpacesEnv(observation_space, action_space)])
    if normalize is not None:
        env = VecNormalize(env, **normalize)
        env.reset()
        for _ in range(20):
            env.step(np.zeros((1, 2), dtype=np.float32))
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    policy = "CnnPolicy" if observation_space is IMAGE else policy
    with th.random.fork_rng():
        th.manual_seed(0)
        model = SDAC(policy, env, buffer_size=10, policy_kwargs={**SMALL, **policy_kwargs})
        for name, buffer in model.policy.named_buffers():
            if "running_" in name:
                # Thousands of features of images that are all off by one would drive every action into the same corner
                buffer.uniform_(0.5, 2).mul_(0.01 if "norm.running_mean" in name and "noise_predictor" in name else 1)
        if model.actor_target is not None:  # not as the actor
            for parameter in model.actor_target.parameters():
                parameter.data.add_(0.1 * th.randn_like(parameter))
    return model


def for_env(env: Any, seed: int = 0) -> Any:
    """A model with fresh networks."""
    return SDAC("MlpPolicy", env, buffer_size=10, seed=seed, policy_kwargs=SMALL)


def observations(space: spaces.Space, count: int = 50) -> Any:
    """A batch as an environment would give it."""
    env = SpacesEnv(space)
    drawn = [env._observe() for _ in range(count)]
    return (
        {key: np.stack([obs[key] for obs in drawn]) for key in drawn[0]} if isinstance(space, spaces.Dict) else np.stack(drawn)
    )


def predict(model: SDAC, obs: Any) -> np.ndarray:
    """What the model does on the way from the environment."""
    normalize = model.get_vec_normalize_env()
    return model.predict(obs if normalize is None else normalize.normalize_obs(obs), deterministic=True)[0]


def as_tensors(obs: Any) -> Any:
    return {key: th.as_tensor(value) for key, value in obs.items()} if isinstance(obs, dict) else th.as_tensor(obs)


def run_onnx(path: Path | bytes, obs: Any) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["actions"], obs if isinstance(obs, dict) else {"obs": obs})[0]


def assert_same_actions(found: np.ndarray, expected: np.ndarray) -> None:
    """Up to rounding, in half widths."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (np.abs(found - expected) / (0.5 * (ACTIONS.high - ACTIONS.low)) < 1e-5).all()
    assert np.ptp(expected, axis=0).max() > 0.01  # actions that differ


@pytest.mark.parametrize(
    ("space", "kwargs"),
    [
        (VECTOR, {}),
        (VECTOR, {"batch_norm": False}),
        (VECTOR, {"normalize": {}}),
        (VECTOR, {"normalize": {"norm_obs": False}}),
        (VECTOR, {"normalize": {"clip_obs": 0.5, "epsilon": 0.3}}),
        (VECTOR, {"average_actor": True}),
        (VECTOR, {"average_actor": True, "batch_norm": False, "eta": 1.0, "n_sampling_steps": 20}),
        (VECTOR, {"n_particles": 1}),
        (VECTOR, {"activation_fn": nn.Mish, "share_features_extractor": True}),
        (spaces.Discrete(5), {}),
        (spaces.MultiDiscrete([3, 4]), {}),
        (spaces.MultiBinary(3), {}),
        (IMAGE, {}),
        (IMAGE, {"average_actor": True, "share_features_extractor": True}),
        (ALL_KINDS, {}),
        (CHANNELS_FIRST, {"normalize": {"norm_obs_keys": ["second", "linear"]}}),
    ],
)
def test_module_is_predict(space: spaces.Space, kwargs: dict[str, Any]) -> None:
    model = make_model(space, **kwargs)
    obs = observations(space)
    expected = predict(model, obs)
    actor = DeterministicActor(model)
    found = actor(as_tensors(obs))
    assert_same_actions(found.numpy(), expected)
    assert (
        actor(as_tensors({k: v[3:4] for k, v in obs.items()} if isinstance(obs, dict) else obs[3:4]))[0] - found[3]
    ).abs().max() < 1e-3
    # The one with the highest Q of the candidates, which differ
    candidates, q_values = actor.candidates(as_tensors(obs))
    assert candidates.shape == (50, model.policy.n_particles, 2) and q_values.shape == (50, model.policy.n_particles)
    assert th.allclose(candidates[th.arange(50), q_values.argmax(1)], found, atol=1e-4)


def test_it_is_a_copy() -> None:
    model = make_model(VECTOR, average_actor=True)
    obs = observations(VECTOR)
    actor = DeterministicActor(model)
    before, own = actor(as_tensors(obs)), predict(model, obs)
    assert (predict(model, obs) == own).all() and model.actor.optimizer is not None and model.actor_target is not None
    assert not any(parameter.requires_grad for parameter in actor.parameters())
    for parameter in model.policy.parameters():
        parameter.data.mul_(2)
    assert (actor(as_tensors(obs)) == before).all() and (predict(model, obs) != own).any()


def test_settings_of_a_live_model_are_exported() -> None:
    """As acting has them at the time."""
    model, obs = make_model(VECTOR), observations(VECTOR)
    before = predict(model, obs)
    for name, value in {
        "n_particles": 7,
        "eta": 1.0,
        "n_sampling_steps": 4,
        "init_noise_scale": 0.1,
        "pessimism": 1.0,
    }.items():
        setattr(model.policy, name, value)
    actor = DeterministicActor(model)
    assert_same_actions(actor(as_tensors(obs)).numpy(), predict(model, obs))
    assert actor.candidates(as_tensors(obs))[0].shape == (50, 7, 2) and (predict(model, obs) != before).any()


def test_action_spaces_of_other_shapes_and_dtypes() -> None:
    space = spaces.Box(-2.0, 3.0, (1, 2), np.float64)
    model = make_model(VECTOR, action_space=space)
    obs = observations(VECTOR)
    found, expected = DeterministicActor(model)(as_tensors(obs)).numpy(), predict(model, obs)
    assert found.shape == expected.shape == (50, 1, 2) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_statistics_given_apart(tmp_path: Path) -> None:
    """For a model loaded without environment: from VecNormalize, also from its pickle, which has no environment."""
    model = make_model(VECTOR, normalize={})
    obs, env = observations(VECTOR), model.get_vec_normalize_env()
    assert env is not None
    model.save(tmp_path / "model")
    loaded = SDAC.load(tmp_path / "model")
    expected = DeterministicActor(model)(as_tensors(obs))
    for statistics in (env, pickle.loads(pickle.dumps(env))):
        assert (DeterministicActor(loaded, statistics)(as_tensors(obs)) == expected).all()
    assert (DeterministicActor(loaded)(as_tensors(obs)) != expected).any()


def test_images_without_environment_have_channels_first(tmp_path: Path) -> None:
    model = make_model(IMAGE)
    model.save(tmp_path / "model")
    obs = as_tensors(observations(IMAGE))
    without = DeterministicActor(SDAC.load(tmp_path / "model"))(obs.permute(0, 3, 1, 2))
    assert th.allclose(without, DeterministicActor(model)(obs), atol=1e-5)


def test_sampled_observations() -> None:
    """Of the space's shapes and dtypes; normalised as the statistics say; bounds as wide as floats are cut."""
    model = make_model(CHANNELS_FIRST, normalize={"norm_obs_keys": ["linear"]})
    sampled = DeterministicActor(model).sample_observations(500)
    assert isinstance(sampled, dict)
    for name, value in observations(CHANNELS_FIRST).items():
        assert sampled[name].numpy().dtype == value.dtype and sampled[name].shape[1:] == value.shape[1:]
    assert (sampled["linear"].mean(0) - 5).abs().max() < 3 and sampled["second"].mean().abs() < 0.5
    wide = spaces.Box(-3e38, 3e38, (2,))
    assert th.isfinite(DeterministicActor(make_model(wide))(DeterministicActor(make_model(wide)).sample_observations(9))).all()


@pytest.mark.parametrize("space", [VECTOR, pytest.param(ALL_KINDS, marks=pytest.mark.slow)], ids=["Box", "Dict"])
def test_torch_export(space: spaces.Space, tmp_path: Path) -> None:
    model = make_model(space)
    actor = DeterministicActor(model)
    example, batch = actor.sample_observations(3), {0: th.export.Dim("batch")}
    shapes = dict.fromkeys(example, batch) if isinstance(example, dict) else batch
    program = th.export.export(actor, (example,), dynamic_shapes={"obs": shapes})
    for size in (1, 50):
        obs = observations(space, size)
        assert th.allclose(program.module()(as_tensors(obs)), actor(as_tensors(obs)), atol=1e-4)


@pytest.mark.slow
def test_onnx_file(tmp_path: Path) -> None:
    """Every kind of observation at once: names, dtypes, any batch, one file, nothing of this machine in it."""
    model = make_model(CHANNELS_FIRST, normalize={"norm_obs_keys": ["linear", "second"]})
    path = tmp_path / "new" / "policy.onnx"
    export_onnx(model, path)
    assert [file.name for file in path.parent.iterdir()] == ["policy.onnx"]
    content = path.read_bytes()
    for place in (str(ROOT), "site-packages", "sb3_sdac/policies.py"):
        assert place.encode() not in content
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    types = {"linear": "double", "second": "double", "image": "uint8", "one": "int64", "several": "int64", "bits": "int8"}
    assert {given.name: given.type for given in session.get_inputs()} == {
        key: f"tensor({kind})" for key, kind in types.items()
    }
    assert all(given.shape[0] == "batch" for given in [*session.get_inputs(), *session.get_outputs()])
    for size in (1, 7, 300):
        obs = observations(CHANNELS_FIRST, size)
        expected = predict(model, obs)
        np.testing.assert_allclose(run_onnx(content, obs), expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "kwargs"),
    [
        (IMAGE, {}),
        (spaces.Discrete(5), {"n_particles": 1}),
        (
            VECTOR,
            {
                "average_actor": True,
                "batch_norm": False,
                "eta": 1.0,
                "n_sampling_steps": 4,
                "activation_fn": nn.Mish,
            },
        ),
    ],
    ids=["image", "Discrete", "paper"],
)
def test_onnx_is_predict(space: spaces.Space, kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(space, **kwargs)
    export_onnx(model, tmp_path / "policy.onnx")
    obs = observations(space)
    assert_same_actions(run_onnx(tmp_path / "policy.onnx", obs), predict(model, obs))


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_ant(normalize: bool, tmp_path: Path) -> None:
    """1,000 observations of random actions, the default networks after a few updates; docs/export.md has the figures."""
    pytest.importorskip("mujoco")
    env: VecEnv = make_vec_env("Ant-v5", seed=0)
    env = VecNormalize(env) if normalize else env
    model = SDAC("MlpPolicy", env, buffer_size=1000, seed=0, train_freq=10).learn(200)
    if isinstance(env, VecNormalize):
        env.training = False
    export_onnx(model, tmp_path / "ant.onnx")
    raw = gym.make("Ant-v5")
    raw.action_space.seed(1)
    batch = [raw.reset(seed=1)[0]]
    while len(batch) < 1000:
        obs, _, terminated, truncated, _ = raw.step(raw.action_space.sample())
        batch.append(raw.reset()[0] if terminated or truncated else obs)
    observed = np.array(batch)
    expected, found = predict(model, observed), run_onnx(tmp_path / "ant.onnx", observed)
    differences = np.abs(found - expected).max(axis=1)
    # Another choice among the particles would be a difference of order 1
    assert differences.max() < 1e-5


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported policy for Pendulum-v1."""
    path = tmp_path_factory.mktemp("pendulum") / "pendulum.onnx"
    export_onnx(for_env("Pendulum-v1"), path)
    return path


def test_example_acts_without_torch(pendulum: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = ["onnx_acting.py", {str(pendulum)!r}, "Pendulum-v1"]
runpy.run_path({str(ROOT / "examples" / "onnx_acting.py")!r}, run_name="__main__")
print([name for name in sys.modules if name.partition(".")[0] in ("torch", "stable_baselines3", "sb3_sdac")])
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=pendulum.parent)
    returns, imported = result.stdout.splitlines()
    assert imported == "[]"
    model, env, expected = for_env("Pendulum-v1"), gym.make("Pendulum-v1"), []
    for episode in range(10):
        obs, _ = env.reset(seed=episode)
        expected.append(0.0)
        for _ in range(200):
            obs, reward, *_ = env.step(model.predict(obs, deterministic=True)[0])
            expected[-1] += float(reward)
    assert float(returns.split(" +/- ")[0]) == pytest.approx(np.mean(expected), rel=0.02)


def test_example_takes_dict_observations() -> None:
    class Session:
        def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert names == ["actions"] and {key: value.shape for key, value in inputs.items()} == {"a": (1, 2), "b": (1,)}
            return [np.array([[0.5]])]

    act = runpy.run_path(str(ROOT / "examples" / "onnx_acting.py"))["act"]
    assert act(Session(), {"a": np.zeros(2), "b": np.int64(3)}) == [0.5]


def test_a_wrong_result_is_not_written(pendulum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of another policy, as an exporter with a bug would make it."""
    model = for_env("Pendulum-v1", seed=1)
    monkeypatch.setattr(export, "_to_onnx", lambda actor: pendulum.read_bytes())
    path = tmp_path / "policy.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="differ from PyTorch's by up to"):
        export_onnx(model, path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_tie_is_no_error(pendulum: Path) -> None:
    """Either of two particles of the same value will do, but not one of a lower value, nor one that is none."""
    model = for_env("Pendulum-v1")
    actor = DeterministicActor(model)
    particles, q_values = actor.candidates(actor.sample_observations(64, seed=64))
    chosen, highest = particles[:, 0], q_values.amax(1, keepdim=True)

    class Session:
        def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [chosen.numpy()]

    def compare(q_values: th.Tensor) -> None:
        actor.candidates = lambda obs: (particles, q_values)  # type: ignore[method-assign]
        export._compare(actor, Session(), 64)

    compare(q_values.scatter(1, th.zeros(64, 1, dtype=th.int64), highest - 1e-6))
    for lower in (0.1, np.nan):
        with pytest.raises(ValueError, match="more than"):
            compare(q_values.scatter(1, th.zeros(64, 1, dtype=th.int64), highest - lower))
    chosen = chosen + 0.1
    with pytest.raises(ValueError, match="more than"):
        compare(q_values)


class Branching(FlattenExtractor):
    """Takes a decision that no graph can hold."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        return features if features.sum() > 0 else -features


def test_an_extractor_that_cannot_be_exported(tmp_path: Path) -> None:
    model = make_model(VECTOR, features_extractor_class=Branching)
    path = tmp_path / "policy.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="features extractor Branching"):
        export_onnx(model, path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_failing_disk_leaves_the_file(pendulum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.onnx"
    path.write_bytes(b"before")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "_to_onnx", lambda actor: pendulum.read_bytes())
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space.*as it was.*policy\.onnx"):
        export_onnx(for_env("Pendulum-v1"), path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'export_onnx needs {package}, .*: pip install "sb3_sdac\[export\]"'):
        export_onnx(make_model(VECTOR), tmp_path / "policy.onnx")


def test_other_algorithms(tmp_path: Path) -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, policy_kwargs={"net_arch": [4]})
    with pytest.raises(ValueError, match="a model of SDAC can be exported here, got SAC"):
        export_onnx(model, tmp_path / "policy.onnx")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_observations_without_form_in_onnx() -> None:
    model = make_model(VECTOR)
    for space in (
        spaces.Text(5),
        spaces.Tuple([VECTOR]),
        spaces.Box(0, 1, (3,), np.longdouble),
        spaces.Box(0, 9, (3,), np.uint16),
    ):
        model.observation_space = space
        with pytest.raises(ValueError, match="no form in ONNX"):
            DeterministicActor(model)
    model.observation_space = spaces.Dict({"tuple": spaces.Tuple([VECTOR])})
    with pytest.raises(ValueError, match=r"'tuple'.*no form in ONNX"):
        DeterministicActor(model)
    model.observation_space = spaces.Dict({"actions": VECTOR})
    with pytest.raises(ValueError, match="name of the output"):
        DeterministicActor(model)


def test_statistics_that_do_not_fit() -> None:
    model = make_model(VECTOR)
    other = make_model(spaces.Box(-1, 1, (4,)), normalize={}).get_vec_normalize_env()
    with pytest.raises(ValueError, match=r"shape \(4,\), the policy takes \(3,\)"):
        DeterministicActor(model, other)
    other = make_model(spaces.Dict({"a": VECTOR}), normalize={}).get_vec_normalize_env()
    with pytest.raises(ValueError, match=r"observations \['a'\], the policy takes \['obs'\]"):
        DeterministicActor(model, other)
    stacked = VecFrameStack(VecNormalize(DummyVecEnv([lambda: SpacesEnv(VECTOR)])), 2)
    with pytest.raises(ValueError, match=r"VecNormalize\(VecFrameStack\(env"):  # none is trained so
        for_env(stacked)


def test_wrappers_outside_vec_normalize() -> None:
    """One that changes observations but not their shape would go unnoticed, so only SB3's harmless ones pass."""

    class Halved(VecEnvWrapper):
        def reset(self) -> Any:
            return np.asarray(self.venv.reset()) / 2

        def step_wait(self) -> Any:
            obs, *rest = self.venv.step_wait()
            return np.asarray(obs) / 2, *rest

    normalize = VecNormalize(DummyVecEnv([lambda: SpacesEnv(VECTOR)]))
    obs = th.zeros(1, *VECTOR.shape)
    model = for_env(normalize)
    expected = DeterministicActor(model)(obs)
    model.set_env(VecMonitor(normalize))
    th.testing.assert_close(DeterministicActor(model)(obs), expected)
    model.set_env(VecMonitor(Halved(normalize)))
    with pytest.raises(ValueError, match=r"Halved stands outside VecNormalize.*outermost.*vec_normalize="):
        DeterministicActor(model)
    th.testing.assert_close(DeterministicActor(model, normalize)(obs), expected)


def test_another_normalisation_is_refused() -> None:
    """It would be exported as VecNormalize's."""

    class Logarithmic(VecNormalize):
        def normalize_obs(self, obs: Any) -> Any:
            return np.sign(obs) * np.log1p(np.abs(obs))

    env = Logarithmic(make_vec_env("Pendulum-v1"))
    with pytest.raises(ValueError, match="Logarithmic normalises in a way of its own"):
        DeterministicActor(for_env(env))


@pytest.mark.parametrize(("low", "high"), [(50, 100), (-1e38, 1e38), (-np.inf, np.inf), (-1, 1)])
def test_observations_to_try_are_in_the_box_and_differ(low: float, high: float) -> None:
    """Drawn without touching the random numbers of the environment."""
    env = make_vec_env("Pendulum-v1")
    env.observation_space = spaces.Box(low, high, (3,), np.float32, seed=0)
    observation: Any = DeterministicActor(for_env(env)).inputs[0]
    state = env.observation_space.np_random.bit_generator.state
    drawn = observation.sample(64, np.random.RandomState(0))
    assert len(drawn.unique(dim=0)) > 30 and (drawn >= low).all() and (drawn <= high).all()
    assert env.observation_space.np_random.bit_generator.state == state
