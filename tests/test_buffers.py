"""
Which transitions are replayed; the replay buffer on the device: bit by bit the batches of SB3's buffers, saved and loaded,
chosen where it fits.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import CountingEnv
from helpers.watching import nothing_read_back
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her import HerReplayBuffer

from sb3_sdac import SDAC, buffers, sdac
from sb3_sdac.buffers import (
    ARRAYS,
    BatchIndices,
    DeviceReplayBuffer,
    fits_on_device,
    load_fitting,
    locate_recent,
    sample_recent,
)
from sb3_sdac.checkpoint import load_checkpoint, save_checkpoint

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

BOX = spaces.Box(-9, 9, (3,), np.float32)
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
OBSERVATIONS: dict[str, spaces.Space] = {
    "box": BOX,
    "float64": spaces.Box(-9, 9, (2, 2), np.float64),
    "image": spaces.Box(0, 255, (3, 4, 5), np.uint8),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 4]),
    "multi_binary": spaces.MultiBinary(4),
}
SMALL: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16], "n_diffusion_steps": 5, "n_sampling_steps": 2, "n_particles": 2},
    "batch_size": 8,
    "buffer_size": 60,
    "learning_starts": 20,
    "seed": 0,
}


def fill(replay_buffers: list[ReplayBuffer], n_rows: int, seed: int = 0) -> None:
    """Rows with one termination in six, one timeout in six, and now and then both at once."""
    rng = np.random.default_rng(seed)
    space, n_envs = replay_buffers[0].observation_space, replay_buffers[0].n_envs
    space.seed(seed)
    for _ in range(n_rows):
        obs, next_obs = (np.stack([space.sample() for _ in range(n_envs)]) for _ in range(2))
        action, reward = rng.uniform(-1, 1, (n_envs, 2)), rng.normal(size=n_envs)  # float64, as of some environments
        terminated, truncated = rng.random((2, n_envs)) < 1 / 6
        infos = [{"TimeLimit.truncated": flag} if flag else {} for flag in truncated.tolist()]
        for buffer in replay_buffers:
            buffer.add(obs, next_obs, action, reward, terminated | truncated, infos)


def assert_same_samples(
    buffer: ReplayBuffer, reference: ReplayBuffer, env: VecNormalize | None = None, exact: bool = True
) -> None:
    batches = []
    for each in (reference, buffer):
        np.random.seed(1)
        batches.append([each.sample(64, env) for _ in range(4)])
        batches[-1].append(np.random.random())  # type: ignore[arg-type]  # nothing else was drawn
    assert batches[0].pop() == batches[1].pop()
    for expected, batch in zip(*batches, strict=True):
        for name, value in expected._asdict().items():
            got = getattr(batch, name)
            if value is None:
                assert got is None
                continue
            assert got.device.type == buffer.device.type and got.is_contiguous()
            tolerance = 0 if exact and buffer.device.type == "cpu" else 1e-6
            th.testing.assert_close(got.cpu(), value, rtol=tolerance, atol=tolerance, msg=f"{name} differ")


def make_pair(
    n_steps: int | None, n_envs: int = 1, size: int = 20, space: spaces.Space = BOX, device: str = "cpu", **kwargs: Any
) -> tuple[DeviceReplayBuffer, ReplayBuffer]:
    """A buffer on the device and SB3's, on the CPU; ``None`` for SB3's buffer without n-step returns."""
    if n_steps is not None:
        kwargs |= {"n_steps": n_steps, "gamma": 0.97}
    cls = ReplayBuffer if n_steps is None else NStepReplayBuffer
    arguments = (size * n_envs + n_envs - 1, space, ACTIONS)  # rounded down to rows
    reference = cls(*arguments, device="cpu", n_envs=n_envs, **kwargs)
    return DeviceReplayBuffer(*arguments, device=device, n_envs=n_envs, **kwargs), reference


# Recent transitions


def fill_with_numbers(buffer: ReplayBuffer, n_rows: int) -> None:
    """The reward is the number of the row, counted from 0."""
    obs = {"a": np.zeros((1, 3), np.float32)} if isinstance(buffer, DictReplayBuffer) else np.zeros((1, 3), np.float32)
    for number in range(n_rows):
        buffer.add(obs, obs, np.zeros((1, 2)), np.array([number]), np.array([False]), [{}])  # type: ignore[arg-type]


@pytest.mark.parametrize("n_rows", [120, 200, 333], ids=["not full", "just full", "wrapped"])
@pytest.mark.parametrize("recency", [1.5, 2.0, 3.0])
@pytest.mark.parametrize(
    "cls, kwargs",
    [
        (ReplayBuffer, {}),
        (ReplayBuffer, {"optimize_memory_usage": True, "handle_timeout_termination": False}),
        (NStepReplayBuffer, {"n_steps": 2, "gamma": 0.0}),
        (DeviceReplayBuffer, {}),
        (DictReplayBuffer, {}),
    ],
    ids=["plain", "optimised", "n-step", "device", "dict"],
)
def test_ages_of_recent_samples(cls: Any, kwargs: dict[str, Any], recency: float, n_rows: int) -> None:
    """The share of the newest x R rows is x^(1/k), and every row there is can be drawn, the newest and the oldest, too."""
    space = spaces.Dict({"a": BOX}) if cls is DictReplayBuffer else BOX
    buffer = cls(200, space, ACTIONS, device="cpu", **kwargs)
    fill_with_numbers(buffer, n_rows)
    n_kept = min(n_rows, 200) - (buffer.optimize_memory_usage and n_rows >= 200)
    np.random.seed(0)
    ages = n_rows - 1 - sample_recent(buffer, 40_000, recency).rewards.flatten().numpy()
    assert set(ages) == set(range(n_kept))
    for n in (1, 2, n_kept // 10, n_kept // 4, n_kept // 2, n_kept - 1):
        share = (n / n_kept) ** (1 / recency)
        assert abs((ages < n).mean() - share) < 4 * (share * (1 - share) / 40_000) ** 0.5  # standard errors


def test_all_alike_is_the_buffer_s_own_way() -> None:
    buffer, _ = make_pair(3)
    fill([buffer], 30)
    batches = []
    for draw in (lambda: buffer.sample(64), lambda: sample_recent(buffer, 64, 1.0)):
        np.random.seed(1)
        batches.append(draw())
    assert all(th.equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_buffer_s_own_sample_is_respected() -> None:
    class Own(ReplayBuffer):
        def sample(self, batch_size: int, env: VecNormalize | None = None) -> Any:
            return batch_size, env

    batch: Any = sample_recent(Own(10, BOX, ACTIONS), 7, 2.0)
    assert batch == (7, None)


@pytest.mark.parametrize("n_steps", [None, 3])
def test_located_batches_are_the_same(n_steps: int | None) -> None:
    """Not full and wrapped: with the same random numbers, what is gathered from where it lies is what is sampled at once."""
    buffer, reference = make_pair(n_steps, 3)
    for seed in range(4):
        fill([reference, buffer], 8, seed)
        np.random.seed(0)
        located = locate_recent(buffer, 64, 2.0)
        assert isinstance(located, BatchIndices)
        np.random.seed(0)
        expected = sample_recent(reference, 64, 2.0)._asdict()
        batch = buffer.gather(located)._asdict()
        assert all(th.equal(value, batch[name]) for name, value in expected.items() if value is not None)


def test_only_what_can_be_located_is() -> None:
    """Neither SB3's buffers nor what the host normalises, nor batches that the buffer draws itself."""
    own, reference = make_pair(None)
    fill([own, reference], 8)
    for buffer, recency, env in ((reference, 2.0, None), (own, 2.0, normalizer(BOX)), (own, 1.0, None)):
        assert isinstance(locate_recent(buffer, 4, recency, env), ReplayBufferSamples)


@pytest.mark.parametrize("recency", [1.0, 2.0, 3.5])
def test_updates_draw_so(recency: float, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def spy(buffer: ReplayBuffer, batch_size: int, k: float, env: VecNormalize | None) -> Any:
        drawn.append((buffer, batch_size, k, env))
        return sample_recent(buffer, batch_size, k, env)

    monkeypatch.setattr(sdac, "sample_recent", spy)
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    model = SDAC("MlpPolicy", env, replay_recency=recency, **SMALL).learn(24)
    assert model._n_updates > 0 and drawn == model._n_updates * [(model.replay_buffer, 8, recency, env)]


# Batches


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_steps", [None, 2, 3, 5])
def test_samples_are_those_of_sb3(n_steps: int | None, n_envs: int, device: str) -> None:
    """At every fill level, from one row to twice round, so that the row written last stands everywhere."""
    buffer, reference = make_pair(n_steps, n_envs, device=device)
    for n_rows in range(1, 42):
        fill([buffer, reference], 1, seed=n_rows)
        assert (buffer.pos, buffer.full, buffer.size()) == (reference.pos, reference.full, reference.size())
        assert_same_samples(buffer, reference)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(buffer, name).cpu(), getattr(reference, name))


def test_both_ends_and_wrap_arounds_are_in_these_samples() -> None:
    buffer, _ = make_pair(3)
    fill([buffer], 33)
    np.random.seed(1)
    batch = buffer.sample(64)
    assert buffer.full and buffer.pos == 13 and batch.discounts is not None
    assert len(batch.discounts.unique()) == 3 and len(batch.dones.unique()) == 2
    assert (buffer.dones * buffer.timeouts).any() and (buffer.dones * (1 - buffer.timeouts)).any()


@pytest.mark.parametrize("n_steps", [None, 3])
def test_without_timeout_handling(n_steps: int | None) -> None:
    buffer, reference = make_pair(n_steps, handle_timeout_termination=False)
    fill([buffer, reference], 30)
    assert not buffer.timeouts.any()
    assert_same_samples(buffer, reference)


def test_many_steps_in_few_rows() -> None:
    """More steps than rows; NumPy adds eight and more rewards in another order."""
    buffer, reference = make_pair(12, size=7)
    for n_rows in range(1, 18):
        fill([buffer, reference], 1, seed=n_rows)
        assert_same_samples(buffer, reference, exact=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observation_spaces(name: str, device: str) -> None:
    for n_steps in (None, 2):
        buffer, reference = make_pair(n_steps, 2, space=OBSERVATIONS[name], device=device)
        fill([buffer, reference], 30)
        assert buffer.observations.dtype == th.from_numpy(reference.observations).dtype
        assert buffer.observations.shape == reference.observations.shape
        assert_same_samples(buffer, reference)


def test_nothing_is_read_back() -> None:
    """Such that a GPU is not waited for: no number, no mask as an index, nothing to the host."""
    buffer, reference = make_pair(3)
    fill([buffer, reference], 30)

    env = normalizer(BOX)
    with nothing_read_back():
        buffer.sample(8, env)
    assert_same_samples(buffer, reference, env)


def test_rows_are_copies() -> None:
    buffer, _ = make_pair(None)
    obs = np.ones((1, 3), np.float32)
    buffer.add(obs, obs, np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{}])
    obs[:] = 2
    fill([buffer], 1)
    assert (buffer.observations[0] == 1).all() and (buffer.next_observations[0] == 1).all()


# VecNormalize


class SpaceEnv(gym.Env):
    """Has spaces, which is all that is asked of it."""

    def __init__(self, space: spaces.Space):
        self.observation_space, self.action_space = space, ACTIONS


def normalizer(space: spaces.Space, cls: type[VecNormalize] = VecNormalize, **kwargs: Any) -> VecNormalize:
    """With statistics that are neither trivial nor round, and clipping that is felt."""
    env = cls(DummyVecEnv([lambda: SpaceEnv(space)]), clip_obs=1.3, clip_reward=0.4, epsilon=1e-3, **kwargs)
    rng = np.random.default_rng(3)
    if env.norm_obs:
        env.obs_rms.update(rng.normal(1.5, 3, (100, *space.shape)))  # type: ignore[misc]
    env.ret_rms.update(rng.normal(0, 2, 100))
    return env


class Halved(VecNormalize):
    """Another normalisation, of which the buffer knows nothing."""

    def normalize_obs(self, obs: Any) -> Any:
        return obs / 2

    def normalize_reward(self, reward: np.ndarray) -> np.ndarray:
        return reward.astype(np.float64) / 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_steps", [None, 3])
@pytest.mark.parametrize("name", ["box", "float64", "image"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"norm_obs": False}, {"norm_reward": False}, {"cls": Halved}], ids=["both", "reward", "obs", "own"]
)
def test_vec_normalize(kwargs: dict[str, Any], name: str, n_steps: int | None, device: str) -> None:
    env = normalizer(OBSERVATIONS[name], **kwargs)
    buffer, reference = make_pair(n_steps, space=OBSERVATIONS[name], device=device)
    fill([buffer, reference], 30)
    assert_same_samples(
        buffer, reference, env, exact=np.lib.NumpyVersion(np.__version__) >= "2.0.0"
    )  # 1.26 divides in float32
    batch = buffer.sample(64, env)
    if not kwargs:
        assert batch.observations.abs().max() == np.float32(1.3)
        assert n_steps is not None or batch.rewards.abs().max() == np.float32(0.4)


def test_vec_normalize_before_any_statistics() -> None:
    env = VecNormalize(DummyVecEnv([lambda: SpaceEnv(BOX)]))
    buffer, reference = make_pair(2)
    fill([buffer, reference], 30)
    assert_same_samples(buffer, reference, env)


# Arguments


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"optimize_memory_usage=True.*ReplayBuffer.*handle_timeout_termination"):
        DeviceReplayBuffer(10, BOX, ACTIONS, optimize_memory_usage=True)
    with pytest.raises(ValueError, match=r"Dict observations.*replay_buffer_class"):
        DeviceReplayBuffer(10, spaces.Dict({"a": BOX}), ACTIONS)
    for n_steps in (0, 1.5, True):
        with pytest.raises(ValueError, match=rf"n_steps.*at least 1.*{n_steps}"):
            DeviceReplayBuffer(10, BOX, ACTIONS, n_steps=n_steps)  # type: ignore[arg-type]


# Saving and loading


@pytest.mark.parametrize("device", DEVICES)
def test_pickle(device: str) -> None:
    """What comes back is on the CPU, wherever it was, and goes where it is put."""
    buffer, reference = make_pair(3, device=device)
    fill([buffer, reference], 30)
    again = pickle.loads(pickle.dumps(buffer))
    assert again.device == again.rewards.device == th.device("cpu") and again._discounts.device == again.device
    assert buffer.device.type == buffer.rewards.device.type == device
    assert_same_samples(again, reference)
    again.device = buffer.device
    fill([again, reference], 10, seed=1)
    assert_same_samples(again, reference)
    again.device = th.device("meta")  # a device that is everywhere, though it holds nothing
    assert {getattr(again, name).device.type for name in [*ARRAYS, "_discounts"]} == {"meta"}


def make_model(env: Any = "Pendulum-v1", **kwargs: Any) -> SDAC:
    return SDAC("MlpPolicy", env, **{**SMALL, "device": "cpu", **kwargs})


def on_request(n_steps: int) -> SDAC:
    kwargs = {"n_steps": n_steps, "gamma": 0.99}
    return make_model(replay_buffer_class=DeviceReplayBuffer, replay_buffer_kwargs=kwargs)


def parameters(model: SDAC) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


@pytest.mark.parametrize("n_steps", [1, 2])
def test_learning_is_bit_equal(n_steps: int) -> None:
    """30 updates, half of them after the buffer is full, in episodes of seven steps."""
    models = []
    for kwargs in (
        {"n_steps": n_steps},
        {"replay_buffer_class": DeviceReplayBuffer, "replay_buffer_kwargs": {"n_steps": n_steps}},
    ):
        env = make_vec_env("Pendulum-v1", 2, seed=0, env_kwargs={"max_episode_steps": 7})
        models.append(make_model(VecNormalize(env), buffer_size=50, gradient_steps=-1, **kwargs))
        models[-1].learn(52)
    assert type(models[0].replay_buffer) is (NStepReplayBuffer if n_steps > 1 else ReplayBuffer)
    assert type(models[1].replay_buffer) is DeviceReplayBuffer and models[1].replay_buffer.n_steps == n_steps
    assert models[0]._n_updates == models[1]._n_updates >= 30
    th.testing.assert_close(parameters(models[1]), parameters(models[0]), rtol=0, atol=0)


def test_save_and_load_replay_buffer(tmp_path: Path) -> None:
    model = on_request(2).learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    model.save(tmp_path / "model")
    loaded = SDAC.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert type(loaded.replay_buffer) is DeviceReplayBuffer and loaded.replay_buffer.size() == 0
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer is not None
    assert_same_samples(loaded.replay_buffer, model.replay_buffer)
    loaded.learn(5, reset_num_timesteps=False)


@pytest.mark.parametrize("n_rows", [30, 70])
@pytest.mark.parametrize("from_device, to_device", [(True, True), (True, False), (False, True)])
def test_checkpoint(tmp_path: Path, from_device: bool, to_device: bool, n_rows: int) -> None:
    """From one kind of buffer to the other, too, as between a GPU and a CPU."""
    model = (on_request(2) if from_device else make_model(n_steps=2)).learn(n_rows)
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    cls = DeviceReplayBuffer if to_device else NStepReplayBuffer
    kwargs: dict[str, Any] = {"replay_buffer_class": cls, "n_steps": 1, "replay_buffer_kwargs": {"n_steps": 2, "gamma": 0.99}}
    loaded = load_checkpoint(tmp_path / "checkpoint.zip", make_vec_env("Pendulum-v1"), device="cpu", **kwargs)
    assert type(loaded.replay_buffer) is cls and model.replay_buffer is not None
    assert (loaded.replay_buffer.pos, loaded.replay_buffer.full) == (n_rows % 60, n_rows > 60)
    assert_same_samples(loaded.replay_buffer, model.replay_buffer)
    loaded.learn(5, reset_num_timesteps=False)


# The choice


def test_fits_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    row = 4 * (3 + 3 + 2 + 1 + 1 + 1)  # observation, next observation, action, reward, done, timeout
    asked = []

    def mem_get_info(device: th.device) -> tuple[int, int]:
        asked.append(device)
        return 2 * 1000 * row, 10**12

    monkeypatch.setattr(buffers.th.cuda, "mem_get_info", mem_get_info)
    cuda = th.device("cuda:3")
    assert fits_on_device(cuda, 1000, BOX, ACTIONS, 1)
    assert not fits_on_device(cuda, 1001, BOX, ACTIONS, 1)
    assert fits_on_device(cuda, 1004, BOX, ACTIONS, 5)  # 200 rows of five
    assert asked == [cuda] * 3
    assert not fits_on_device(cuda, 1, spaces.Dict({"a": BOX}), ACTIONS, 1)
    assert not fits_on_device(th.device("cpu"), 1, BOX, ACTIONS, 1)
    buffer = DeviceReplayBuffer(1000, BOX, ACTIONS, "cpu")
    assert sum(getattr(buffer, name).nbytes for name in ARRAYS) == 1000 * row


def answer(monkeypatch: pytest.MonkeyPatch, fits: bool) -> list[int]:
    """Whether this is a machine with a GPU, as far as the choice is concerned; the sizes it is asked about."""
    sizes = []

    def fits_on_device(device: th.device, buffer_size: int, space: spaces.Space, *_: Any) -> bool:
        sizes.append(buffer_size)
        return fits and not isinstance(space, spaces.Dict)

    monkeypatch.setattr(buffers, "fits_on_device", fits_on_device)
    return sizes


@pytest.mark.parametrize("n_steps", [None, 1, 3])
def test_automatic_choice(n_steps: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chosen where it fits, and chosen anew wherever the model is loaded; with and without an environment."""
    steps = n_steps or 2
    path, env = tmp_path / "model.zip", make_vec_env("Pendulum-v1")
    for fits in (True, False, False, True, True):
        sizes = answer(monkeypatch, fits)
        if not path.exists():
            kwargs = {"replay_buffer_kwargs": {"handle_timeout_termination": False}}
            models = [make_model(env, n_steps=n_steps, gamma=0.9, **kwargs)]
        else:
            models = [SDAC.load(path, device="cpu"), SDAC.load(path, env=env, device="cpu")]
            assert models[0].replay_buffer is None
            models[0].set_env(env)
        assert set(sizes) == {60}  # and not the one row of a model that only acts
        for model in models:
            buffer: Any = model.replay_buffer
            assert type(buffer) is (DeviceReplayBuffer if fits else NStepReplayBuffer if steps > 1 else ReplayBuffer)
            assert (getattr(buffer, "n_steps", 1), getattr(buffer, "gamma", 0.9)) == (steps, 0.9)
            assert buffer.buffer_size == 60 and not buffer.handle_timeout_termination
            assert (model.n_steps, model.replay_buffer_class) == (n_steps, None)  # as they were given
            assert model.learn(22)._n_updates >= 2
        models[0].save(path)


def test_other_arguments_on_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer(monkeypatch, True)
    model = make_model(n_steps=3)
    model.save(tmp_path / "model")
    for fits in (True, False):
        answer(monkeypatch, fits)
        loaded = SDAC.load(tmp_path / "model", env=model.get_env(), device="cpu", n_steps=1, gamma=0.8)
        assert isinstance(loaded.replay_buffer, ReplayBuffer) and loaded.n_steps == 1
        assert type(loaded.replay_buffer) is (DeviceReplayBuffer if fits else ReplayBuffer)
        loaded.learn(22)


@pytest.mark.parametrize(
    "kwargs, cls",
    [
        ({"replay_buffer_class": ReplayBuffer}, ReplayBuffer),
        ({"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}, ReplayBuffer),
        ({"replay_buffer_class": DeviceReplayBuffer}, DeviceReplayBuffer),
    ],
)
def test_what_the_user_asks_for_stays(
    kwargs: dict[str, Any], cls: type[ReplayBuffer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for fits in (True, False):
        answer(monkeypatch, fits)
        model = make_model(**kwargs)
        model.save(tmp_path / "model")
        for reached in (model, SDAC.load(tmp_path / "model", env=model.get_env(), device="cpu")):
            assert type(reached.replay_buffer) is cls


@pytest.mark.parametrize(
    "kwargs, cls, steps",
    [
        ({"replay_buffer_class": ReplayBuffer}, ReplayBuffer, 1),
        ({"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}, ReplayBuffer, 1),
        (
            {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 5, "gamma": 0.9}},
            NStepReplayBuffer,
            5,
        ),
    ],
)
def test_what_the_user_asks_for_when_loading(
    kwargs: dict[str, Any], cls: type[ReplayBuffer], steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing of what was chosen before the model was saved stands in its way."""
    for fits in (True, False):
        answer(monkeypatch, fits)
        model = make_model()
        model.save(tmp_path / "model")
        loaded = SDAC.load(tmp_path / "model", env=model.get_env(), device="cpu", **kwargs)
        assert type(loaded.replay_buffer) is cls and getattr(loaded.replay_buffer, "n_steps", 1) == steps
        loaded.learn(22)


@pytest.mark.parametrize("saved, here", [(True, True), (True, False), (False, True)])
def test_a_buffer_from_the_file_stays(saved: bool, here: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer(monkeypatch, saved)
    model = make_model().learn(30)
    model.save(tmp_path / "model", include=["replay_buffer"])
    answer(monkeypatch, here)
    for env in (None, model.get_env()):
        loaded = SDAC.load(tmp_path / "model", env=env, device="cpu")
        assert model.replay_buffer is not None and loaded.replay_buffer is not None
        assert_same_samples(loaded.replay_buffer, model.replay_buffer)
        assert loaded.replay_buffer.device == loaded.device
    loaded.learn(30, reset_num_timesteps=False)


@pytest.mark.parametrize("fits", [True, False])
def test_gamma_may_be_changed(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a callback, as with SAC: the discounts of n-step returns are the buffer's."""
    answer(monkeypatch, fits)
    model = make_model(n_steps=2).learn(22)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    model.gamma = 0.5
    model.train(1, 8)
    batch = model.replay_buffer._get_samples(np.arange(10))
    expected = model.replay_buffer.rewards[:10, 0] + 0.5 * model.replay_buffer.rewards[1:11, 0]
    np.testing.assert_allclose(batch.rewards.squeeze(1), expected, rtol=1e-6)
    assert batch.discounts is not None and (batch.discounts == 0.25).all()


def test_copies() -> None:
    """Independent, and where the original is ("meta" stands for any device); other arrays, as captured updates must know."""
    buffer = DeviceReplayBuffer(10, BOX, ACTIONS, "meta", n_steps=2)
    copied = copy.deepcopy({"a": buffer, "b": buffer})
    assert copied["a"] is copied["b"] is not buffer
    assert copied["a"].device == copied["a"].rewards.device == copied["a"]._discounts.device == th.device("meta")
    assert copied["a"]._arrays != buffer._arrays
    buffer = DeviceReplayBuffer(10, BOX, ACTIONS, "cpu")
    copied["a"] = copy.deepcopy(buffer)
    buffer.rewards += 1
    assert (copied["a"].rewards == 0).all()


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("kind", ["learn", "set_env", "checkpoint"])
def test_returns_end_where_environments_are_reset(
    kind: str, fits: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In an episode without end that counts its steps; also where the buffer is full and starts over."""
    answer(monkeypatch, fits)
    for n_rows in (25, 60, 75):
        env = make_vec_env(lambda: CountingEnv(1000, terminates=False), 1)
        model = make_model(env, n_steps=3).learn(n_rows)
        if kind == "set_env":
            model.set_env(env)
        elif kind == "checkpoint":
            save_checkpoint(model, tmp_path / "checkpoint.zip")
            model = load_checkpoint(tmp_path / "checkpoint.zip", env)  # type: ignore[assignment]
        model.learn(10, reset_num_timesteps=kind == "learn")
        assert isinstance(model.replay_buffer, NStepReplayBuffer)
        batch = model.replay_buffer._get_samples((np.arange(-6, 10) + n_rows) % 60)
        counts, next_counts = batch.observations.squeeze(1).tolist(), batch.next_observations.squeeze(1).tolist()
        assert counts == [*range(n_rows - 6, n_rows), *range(10)]
        ends = [n_rows] * 6 + [10] * 10
        assert next_counts == [min(count + 3, end) for count, end in zip(counts, ends, strict=True)]
        assert (batch.dones == 0).all()
    assert not model.policy.seen_terminal


def test_observations_stored_once_end_where_environments_are_reset() -> None:
    """The last one's successor is not stored, so nothing may be learned from it."""
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = make_model(make_vec_env(lambda: CountingEnv(1000, terminates=False), 1), **kwargs).learn(25)
    model._last_obs = None
    model.learn(10, reset_num_timesteps=False)
    assert model.replay_buffer is not None and np.flatnonzero(model.replay_buffer.dones[:, 0]).tolist() == [24]


@pytest.mark.cuda
@pytest.mark.parametrize("kwargs", [{}, {"compile": False}, {"n_steps": 1}], ids=["default", "no graphs", "one_step"])
def test_cuda(kwargs: dict[str, Any], tmp_path: Path) -> None:
    """Chosen there, learned with, and taken to the CPU and back."""
    env = make_vec_env("Pendulum-v1", 2, env_kwargs={"max_episode_steps": 7})
    model = make_model(VecNormalize(env), device="cuda", **kwargs).learn(60)
    assert type(model.replay_buffer) is DeviceReplayBuffer and model.replay_buffer.rewards.is_cuda
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    on_cpu = SDAC.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert not isinstance(on_cpu.replay_buffer, DeviceReplayBuffer)
    on_cpu.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer is not None and on_cpu.replay_buffer is not None
    assert on_cpu.replay_buffer.device == th.device("cpu")
    assert_same_samples(model.replay_buffer, on_cpu.replay_buffer)
    on_cpu = load_checkpoint(tmp_path / "checkpoint.zip", model.get_env(), device="cpu")  # type: ignore[arg-type, assignment]
    assert_same_samples(model.replay_buffer, on_cpu.replay_buffer)  # type: ignore[arg-type]
    copied = copy.deepcopy(model)
    assert copied.replay_buffer is not None and copied.replay_buffer.device == copied.device
    copied.learn(20, reset_num_timesteps=False)
    save_checkpoint(on_cpu, tmp_path / "checkpoint.zip")
    back = load_checkpoint(tmp_path / "checkpoint.zip", model.get_env(), device="cuda")  # type: ignore[arg-type]
    assert type(back.replay_buffer) is DeviceReplayBuffer and back.replay_buffer.rewards.is_cuda
    back.learn(10, reset_num_timesteps=False)


@pytest.mark.cuda
def test_cuda_is_not_waited_for() -> None:
    buffer, _ = make_pair(3, device="cuda")
    fill([buffer], 30)
    env = normalizer(BOX)
    buffer.sample(64, env)
    th.cuda.set_sync_debug_mode("error")
    try:
        fill([buffer], 3)
        buffer.sample(64, env)
    finally:
        th.cuda.set_sync_debug_mode("default")


# Files of replay buffers


def small_model(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> SDAC:
    small = {"buffer_size": 60, "learning_starts": 20, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
    return SDAC(policy, env, **{**small, **kwargs})


def load_buffer(model: SDAC, path: Path) -> None:
    """As ``model.load_replay_buffer`` does."""
    load_fitting(model, path, lambda file: OffPolicyAlgorithm.load_replay_buffer(model, file))


def dict_env(n_envs: int) -> Any:
    return make_vec_env(lambda: BitFlippingEnv(n_bits=4, continuous=True), n_envs)


HER = {"replay_buffer_class": HerReplayBuffer, "buffer_size": 200, "learning_starts": 40}
BUFFER_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "one_step": ("MlpPolicy", {"n_steps": 1}),
    "n_step": ("MlpPolicy", {"n_steps": 3}),
    "device": ("MlpPolicy", {"replay_buffer_class": DeviceReplayBuffer}),
    "dict": ("MultiInputPolicy", {}),
    "her": ("MultiInputPolicy", HER),
}


@pytest.mark.filterwarnings("ignore:The last trajectory:UserWarning")  # of SB3's HerReplayBuffer
@pytest.mark.parametrize("before, after", [(3, 5), (3, 1), (1, 2)])
@pytest.mark.parametrize("kind", BUFFER_KINDS)
def test_buffer_of_another_number_of_environments(kind: str, before: int, after: int, tmp_path: Path) -> None:
    policy, kwargs = BUFFER_KINDS[kind]
    make_env = dict_env if policy == "MultiInputPolicy" else lambda n_envs: make_vec_env("Pendulum-v1", n_envs)
    model = small_model(make_env(before), policy, **kwargs).learn(60)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    other = small_model(make_env(after), policy, **kwargs)
    empty = other.replay_buffer
    words = f"buffer.pkl is a replay buffer of {before} environments, but the model has {after}.*SDAC.load.*empty one"
    with pytest.raises(ValueError, match=words):
        load_buffer(other, tmp_path / "buffer.pkl")
    assert other.replay_buffer is empty
    other.learn(50)

    same = small_model(make_env(before), policy, **kwargs)
    load_buffer(same, tmp_path / "buffer.pkl")
    assert model.replay_buffer is not None and same.replay_buffer is not None
    assert same.replay_buffer.size() == model.replay_buffer.size()
    same.learn(50)


def test_buffer_of_other_spaces(tmp_path: Path) -> None:
    small_model("MountainCarContinuous-v0").save_replay_buffer(tmp_path / "car.pkl")
    small_model(dict_env(1), "MultiInputPolicy").save_replay_buffer(tmp_path / "dict.pkl")
    model = small_model("Pendulum-v1")
    for name in ("car", "dict"):
        with pytest.raises(
            ValueError, match=rf"{name}\.pkl is a replay buffer of observations in .*, but the model's are in Box"
        ):
            load_buffer(model, tmp_path / f"{name}.pkl")
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-1), np.float32(1))
    small_model(env).save_replay_buffer(tmp_path / "scaled.pkl")
    with pytest.raises(ValueError, match=r"scaled\.pkl is a replay buffer of actions in .*, but the model's are in"):
        load_buffer(model, tmp_path / "scaled.pkl")


@pytest.mark.parametrize(
    "kwargs, words",
    [({"buffer_size": 90}, "60 rows, the model's had 90"), ({"n_steps": 1}, "2 steps per return, the model's had 1")],
)
def test_buffer_of_another_kind(kwargs: dict[str, Any], words: str, tmp_path: Path) -> None:
    """The model can learn with it, but not as it was told to."""
    small_model("Pendulum-v1").learn(25).save_replay_buffer(tmp_path / "buffer.pkl")
    model = small_model("Pendulum-v1", **kwargs)
    with pytest.warns(UserWarning, match=words):
        load_buffer(model, tmp_path / "buffer.pkl")
    model.learn(25)
    assert model.replay_buffer is not None and model.replay_buffer.pos == 50


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1, 2]), "cut"], ids=["empty", "garbage", "list", "cut"])
def test_damaged_buffer(content: Any, tmp_path: Path) -> None:
    model = small_model("Pendulum-v1").learn(25)
    before, path = model.replay_buffer, tmp_path / "buffer.pkl"
    if content == "cut":
        model.save_replay_buffer(path)
        content = path.read_bytes()[:-100]
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"buffer\.pkl cannot be loaded as a replay buffer: it is damaged, or of something else"
    ):
        load_buffer(model, path)
    with pytest.raises(FileNotFoundError):
        load_buffer(model, tmp_path / "nothing.pkl")
    assert model.replay_buffer is before


def test_her_buffer_without_environment(tmp_path: Path) -> None:
    model = small_model(dict_env(1), "MultiInputPolicy", **HER)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.env = None
    with pytest.raises(ValueError, match=r"buffer\.pkl cannot be loaded.*HerReplayBuffer needs the environment: call set_env"):
        load_buffer(model, tmp_path / "buffer.pkl")
