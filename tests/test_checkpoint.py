"""Checkpoints: complete, replaced in one step, refused if they are not what they should be; training goes on bit by bit."""

import io
import json
import random
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_sdac import SDAC
from sb3_sdac.checkpoint import SaveCheckpoint, load_checkpoint, save_checkpoint

SMALL: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16]},
    "buffer_size": 400,
    "batch_size": 16,
    "learning_starts": 20,
}


class DictEnv(gym.Env):
    """Draws from its generator on every step."""

    observation_space = spaces.Dict({"a": spaces.Box(-9, 9, (2,)), "b": spaces.Box(-9, 9, (1,))})
    action_space = spaces.Box(-1, 1, (1,))

    def _observe(self) -> dict[str, np.ndarray]:
        draw = self.np_random.standard_normal
        return {key: draw(box.shape).astype(np.float32) for key, box in self.observation_space.items()}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._observe(), float(self.np_random.normal() - action[0] ** 2), False, self.steps == 15, {}


def numbers(model: Any) -> dict[str, Any]:
    """All that must be equal: parameters, optimizers, replay buffer."""
    buffer = model.replay_buffer
    arrays = {name: value for name, value in vars(buffer).items() if isinstance(value, (np.ndarray, dict))}
    optimizers = [model.actor.optimizer.state_dict(), model.critic.optimizer.state_dict()]
    counters = model.num_timesteps, model._n_updates, model._episode_num
    return {"policy": model.policy.state_dict(), "optimizers": optimizers, "buffer": arrays, "counters": counters}


@pytest.mark.parametrize(
    ("vec_env", "normalize", "learning_starts"),
    [(DummyVecEnv, False, 20), (DummyVecEnv, True, 20), (SubprocVecEnv, True, 20), (DummyVecEnv, False, 80)],
)
def test_resumed_run_is_bit_equal(tmp_path: Path, vec_env: type[VecEnv], normalize: bool, learning_starts: int) -> None:
    """
    Saved in the middle and loaded in other random states, against the run that only reset its environments there; also while
    actions are still random.
    """

    def make_env(seed: int) -> VecEnv:
        env = make_vec_env(DictEnv, n_envs=2, seed=seed, vec_env_cls=vec_env)  # type: ignore[arg-type]
        return VecNormalize(env) if normalize else env

    kwargs = {**SMALL, "learning_starts": learning_starts}
    model = SDAC("MultiInputPolicy", make_env(0), seed=0, **kwargs).learn(60, log_interval=1000)
    random.random()  # or its state would be that after seeding, as it is after loading
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    draw = random.random()
    env = model.env
    assert env is not None
    model._last_obs = None  # reset at the boundary, where the resumed run has to reset
    if isinstance(env, VecNormalize):
        env.returns = np.zeros(2)
    model.learn(40, log_interval=1000, reset_num_timesteps=False)
    env.close()

    for seed_all in (random.seed, np.random.seed, th.manual_seed):
        seed_all(12345)
    env = make_env(99)
    resumed = load_checkpoint(tmp_path / "checkpoint.zip", env)
    assert resumed.num_timesteps == 60 and random.random() == draw
    resumed.learn(40, log_interval=1000, reset_num_timesteps=False)
    env.close()
    th.testing.assert_close(numbers(resumed), numbers(model), rtol=0, atol=0)
    if isinstance(env, VecNormalize) and isinstance(model.env, VecNormalize):
        for key, rms in model.env.obs_rms.items():
            np.testing.assert_array_equal(env.obs_rms[key].mean, rms.mean)
        assert env.ret_rms.count == model.env.ret_rms.count > 60


def test_other_algorithms_and_full_buffers(tmp_path: Path) -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", buffer_size=50, learning_starts=10).learn(70)
    assert model.replay_buffer is not None and model.replay_buffer.full
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    loaded = load_checkpoint(tmp_path / "checkpoint.zip", make_vec_env("Pendulum-v1"), SAC)
    th.testing.assert_close(numbers(loaded)["buffer"], numbers(model)["buffer"], rtol=0, atol=0)
    assert loaded.learn(10, reset_num_timesteps=False).num_timesteps == 80


def test_observations_stored_once(tmp_path: Path) -> None:
    """The last transition's next observation stands in the row after it."""
    kwargs: dict[str, Any] = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = SDAC("MlpPolicy", "Pendulum-v1", **kwargs, **SMALL).learn(30)
    save_checkpoint(model, tmp_path / "checkpoint.zip")
    loaded: Any = load_checkpoint(tmp_path / "checkpoint.zip", make_vec_env("Pendulum-v1"))
    observations = model.replay_buffer.observations  # type: ignore[union-attr]
    assert observations[30].any()
    np.testing.assert_array_equal(loaded.replay_buffer.observations, observations)


def test_hindsight_buffer(tmp_path: Path) -> None:
    """The episode under way ends where the environments are reset, and no goal is taken from the next one."""
    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=30, continuous=True, max_steps=10)])  # too many to end before
    for algorithm in (SDAC, SAC):
        model = algorithm("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **SMALL).learn(47)
        save_checkpoint(model, tmp_path / "checkpoint.zip")
        loaded = load_checkpoint(tmp_path / "checkpoint.zip", env, algorithm)
        loaded.learn(40, reset_num_timesteps=False)
        buffer = loaded.replay_buffer
        assert isinstance(buffer, HerReplayBuffer)
        assert (buffer.ep_length[40:47] == 7).all() and (buffer.ep_length[47:77] == 10).all()
    infos = SDAC(
        "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs={"copy_info_dict": True}, **SMALL
    )
    with pytest.raises(ValueError, match="copy_info_dict=True"):
        save_checkpoint(infos, tmp_path / "other.zip")


def test_callback_saves_between_updates(tmp_path: Path) -> None:
    saved = []

    class Spy(SaveCheckpoint):
        def _save(self) -> None:
            super()._save()
            saved.append((self.num_timesteps, self.model._n_updates))

    model = SDAC("MlpPolicy", "Pendulum-v1", **SMALL)
    model.learn(100, callback=Spy(tmp_path / "folder" / "checkpoint.zip", save_freq=30))
    assert saved == [(30, 10), (60, 40), (90, 70), (100, 80)]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["checkpoint.zip"]
    with pytest.raises(ValueError, match="save_freq must be at least 1, got 0"):
        SaveCheckpoint(tmp_path, 0)


# What is refused


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.zip"
    save_checkpoint(SDAC("MlpPolicy", make_vec_env("Pendulum-v1", n_envs=2), **SMALL).learn(40), path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(checkpoint: Path, tmp_path: Path, share: float) -> None:
    content = checkpoint.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.zip is not a complete checkpoint"):
        load_checkpoint(tmp_path / "cut.zip", make_vec_env("Pendulum-v1", n_envs=2))


def test_damaged_and_foreign_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    env = make_vec_env("Pendulum-v1", n_envs=2)
    content = bytearray(checkpoint.read_bytes())
    middle = content.index(b"replay_buffer/observations.npy") + 200
    content[middle : middle + 8] = b"x" * 8
    (tmp_path / "damaged.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.zip is damaged: replay_buffer/observations\.npy"):
        load_checkpoint(tmp_path / "damaged.zip", env)

    SDAC("MlpPolicy", env, **SMALL).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"own load\(\)"):
        load_checkpoint(tmp_path / "model.zip", env)

    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(tmp_path / "new.zip", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, json.dumps({**json.loads(data), "version": 99}) if name == "state.json" else data)
    with pytest.raises(ValueError, match="version 99"):
        load_checkpoint(tmp_path / "new.zip", env)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere.zip", env)


def test_arrays_are_not_pickles(checkpoint: Path, tmp_path: Path) -> None:
    """An array of objects in the place of the observations would run code; it is refused before that."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "was_here",)

    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array([Hostile()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(tmp_path / "hostile.zip", "w") as new:
        for name in old.namelist():
            new.writestr(name, stream.getvalue() if name == "replay_buffer/observations.npy" else old.read(name))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_checkpoint(tmp_path / "hostile.zip", make_vec_env("Pendulum-v1", n_envs=2))
    assert not (tmp_path / "was_here").exists()


def test_other_environments_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        load_checkpoint(checkpoint, make_vec_env("MountainCarContinuous-v0", n_envs=2))
    with pytest.raises(ValueError, match="2 environments"):
        load_checkpoint(checkpoint, make_vec_env("Pendulum-v1", n_envs=3))
    with pytest.raises(ValueError, match="of a run with no VecNormalize"):
        load_checkpoint(checkpoint, VecNormalize(make_vec_env("Pendulum-v1", n_envs=2)))


def test_other_algorithms_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    env = make_vec_env("Pendulum-v1", n_envs=2)
    with pytest.raises(ValueError, match="holds a model of SDAC, not of SAC"):
        load_checkpoint(checkpoint, env, SAC)
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=8)
    for attempt in (
        lambda: save_checkpoint(model, tmp_path / "ppo.zip"),  # type: ignore[arg-type]
        lambda: model.learn(8, callback=SaveCheckpoint(tmp_path / "ppo.zip", 8)),
        lambda: load_checkpoint(checkpoint, env, PPO),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="off-policy algorithm such as SDAC or SAC, got PPO"):
            attempt()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="load_checkpoint"):
        SDAC.load(checkpoint)


def test_nothing_is_lost_when_saving_fails(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full half way leaves the checkpoint before."""
    path = tmp_path / "checkpoint.zip"
    path.write_bytes(before := checkpoint.read_bytes())
    model = SDAC("MlpPolicy", "Pendulum-v1", **SMALL)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["PCG64", "MT19937", "Philox", "SFC64", "RandomState"])
def test_random_generators_of_environments(kind: str, tmp_path: Path) -> None:
    """Any of NumPy's Generators goes on where it was; of what is none, a warning says that it does not."""

    class OtherGenerator(DictEnv):
        def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            if kind == "RandomState":
                self._np_random = np.random.RandomState(3)  # type: ignore[assignment]
            else:
                self.np_random = np.random.Generator(getattr(np.random, kind)(3))
            return super().reset()

    def draws(model: Any) -> list[float]:
        (generator,) = model.env.get_attr("np_random")
        return [generator.normal() for _ in range(5)]

    model = SDAC("MultiInputPolicy", DummyVecEnv([OtherGenerator]), **SMALL).learn(25)
    warning = pytest.warns(UserWarning, match="is RandomState and not NumPy's Generator")
    with warning if kind == "RandomState" else nullcontext():
        save_checkpoint(model, tmp_path / "checkpoint.zip")
    loaded = load_checkpoint(tmp_path / "checkpoint.zip", DummyVecEnv([OtherGenerator]))
    assert (draws(loaded) == draws(model)) == (kind != "RandomState")


KILLED = """
import sys
from sb3_sdac import SDAC
from sb3_sdac.checkpoint import SaveCheckpoint, load_checkpoint
from stable_baselines3.common.env_util import make_vec_env
from pathlib import Path
path, env = Path(sys.argv[1]), make_vec_env("Pendulum-v1", n_envs=2)
if path.exists():
    model = load_checkpoint(path, env)
else:
    kwargs = dict(learning_starts=20, batch_size=8, policy_kwargs=dict(net_arch=[8]), compile=False)
    model = SDAC("MlpPolicy", env, buffer_size=20_000, **kwargs)
print("at", model.num_timesteps, model.replay_buffer.size() * 2, flush=True)
model.learn(1_000_000, SaveCheckpoint(path, 4), log_interval=10**6, reset_num_timesteps=False)
"""


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """Twenty times, many of them while a checkpoint is written, as one is nearly always: each time the run goes on."""
    path = tmp_path / "checkpoint.zip"
    moments = random.Random(0)
    reached, while_saving = -1, 0
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            steps, stored = map(int, process.stdout.readline().removeprefix("at ").split())
            assert steps == stored >= max(reached, 0)  # nothing lost that was in a checkpoint, and nothing twice
            reached = steps
            time.sleep(0.1 + 0.5 * moments.random())
            process.send_signal(signal.SIGKILL)
        while_saving += path.with_name("checkpoint.zip.new").exists()
    assert reached > 20 and while_saving > 0
