"""
Which transitions are replayed, and a replay buffer that lives where the networks do, so that on a GPU no update waits for the
host to gather its batch.
"""

import copy
import warnings
from collections.abc import Callable
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_sdac.arguments import is_count

#: Length of the returns where SB3 has a replay buffer for more than one step
DEFAULT_N_STEPS = 2
#: SB3's ways to draw a batch that are rows drawn alike and then ``_get_samples``
_DRAWN_ALIKE = (ReplayBuffer.sample, DictReplayBuffer.sample)
#: Numbers for :class:`BatchIndices`, one each time that arrays move
_next_version = count().__next__
ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class BatchIndices(NamedTuple):
    """
    Where a batch of B transitions lies in a :class:`DeviceReplayBuffer`.

    :param indices: rows, environments, and B times the row written last; int64 on the device, shape (3, B)
    :param arrays: a number that stands for the buffer's arrays, another one when they have moved
    """

    indices: th.Tensor
    arrays: int


class DeviceReplayBuffer(NStepReplayBuffer):
    """
    SB3's ``ReplayBuffer`` and ``NStepReplayBuffer`` with their arrays as tensors on ``device``, under the same names.

    Rows R = buffer_size // n_envs, at least 1. With the same seed of NumPy the batches are those of SB3's buffers. Unpickled,
    it is on the CPU until its ``device`` is set, as ``load_replay_buffer`` does.

    :param buffer_size: transitions, summed over all environments
    :param observation_space: anything but a ``Dict``
    :param action_space: the action space
    :param device: where the arrays are; setting the attribute moves them
    :param n_envs: number of environments
    :param optimize_memory_usage: not supported, must be False
    :param handle_timeout_termination: bootstrap where an episode ended by a time limit
    :param n_steps: length of the returns in steps, at least 1
    :param gamma: discount factor inside them; samples of ``n_steps=1`` have no ``discounts``, as those of ``ReplayBuffer``
    :raises ValueError: for ``Dict`` observations, ``optimize_memory_usage=True`` or an ``n_steps`` that is no count
    """

    observations: th.Tensor  # type: ignore[assignment]  # (R, n_envs, ...)
    next_observations: th.Tensor  # type: ignore[assignment]  # (R, n_envs, ...)
    actions: th.Tensor  # type: ignore[assignment]  # (R, n_envs, A)
    rewards: th.Tensor  # type: ignore[assignment]  # (R, n_envs), as are the next two, all float32
    dones: th.Tensor  # type: ignore[assignment]
    timeouts: th.Tensor  # type: ignore[assignment]

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_steps: int = 1,
        gamma: float = 0.99,
    ):
        if isinstance(observation_space, spaces.Dict):
            raise ValueError("DeviceReplayBuffer has no Dict observations: leave replay_buffer_class to its default")
        if optimize_memory_usage:
            raise ValueError(
                "DeviceReplayBuffer has no optimize_memory_usage=True: leave that False, or take SB3's ReplayBuffer with "
                "replay_buffer_kwargs={'handle_timeout_termination': False}"
            )
        if not is_count(n_steps):
            raise ValueError(f"n_steps of DeviceReplayBuffer must be an integer of at least 1, got {n_steps!r}")
        one_row = (n_envs, observation_space, action_space, device, n_envs, False, handle_timeout_termination)
        super().__init__(*one_row, n_steps=n_steps, gamma=gamma)
        self.buffer_size = max(buffer_size // n_envs, 1)
        # Takes each row as SB3 would (shapes, dtypes, timeouts), from where it is copied to the device
        self._row = ReplayBuffer(*one_row)
        for name in ARRAYS:
            row = th.from_numpy(getattr(self._row, name))
            setattr(self, name, th.zeros((self.buffer_size, *row.shape[1:]), dtype=row.dtype, device=self.device))

    @property
    def gamma(self) -> float:
        """Discount factor inside the returns; may be set."""
        return self._gamma

    @gamma.setter
    def gamma(self, gamma: float) -> None:
        if gamma == vars(self).get("_gamma"):
            return
        self._gamma = gamma
        # By NumPy, from whose powers PyTorch's may differ in the last bit
        self._discounts = self._to_device(gamma ** np.arange(self.n_steps + 1, dtype=np.float32))  # (n_steps + 1,)
        self._arrays = _next_version()

    @property
    def device(self) -> th.device:
        """Where the arrays are, and the samples."""
        return self._device

    @device.setter
    def device(self, device: th.device) -> None:
        self._device = th.device(device)
        self._arrays = _next_version()
        vars(self).update({name: value.to(device) for name, value in vars(self).items() if isinstance(value, th.Tensor)})

    def __getstate__(self) -> dict[str, Any]:
        # Of the CPU, so that it can be read where there is no CUDA
        state = {name: value.cpu() if isinstance(value, th.Tensor) else value for name, value in vars(self).items()}
        return {**state, "_device": th.device("cpu")}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceReplayBuffer":
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        copied._arrays = _next_version()
        return copied

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        self._row.add(obs, next_obs, action, reward, done, infos)
        # One copy to the device, of bytes; the widest dtype first, so that each array is aligned
        names = sorted(ARRAYS, key=lambda name: -getattr(self, name).itemsize)
        row = self._to_device(np.concatenate([getattr(self._row, name)[0].reshape(-1).view(np.uint8) for name in names]))
        parts = row.split([getattr(self, name)[0].nbytes for name in names])
        for name, part in zip(names, parts, strict=True):
            array = getattr(self, name)
            array[self.pos].copy_(part.view(array.dtype).view(array.shape[1:]))
        self.pos = (self.pos + 1) % self.buffer_size
        self.full = self.full or self.pos == 0

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        return self.gather(self.locate(batch_inds), env)

    def locate(self, batch_inds: np.ndarray) -> BatchIndices:
        """
        The first half of sampling, all that the host has to do.

        :param batch_inds: rows, shape (B,)
        :return: where a batch from these rows lies, its environments drawn
        """
        env_indices = np.random.randint(0, self.n_envs, size=len(batch_inds))  # after batch_inds, as SB3 draws them
        newest = np.full_like(batch_inds, (self.pos - 1) % self.buffer_size)
        indices = np.stack([batch_inds, env_indices, newest]).astype(np.int64)
        return BatchIndices(self._to_device(indices), self._arrays)

    def gather(self, indices: BatchIndices, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        The other half, all on the device; without ``env`` nothing comes from the host.

        :param indices: from :meth:`locate`
        :param env: what normalises observations and rewards, if anything does
        :return: B transitions
        """
        rows, envs, newest = indices.indices  # (B,) each
        steps = (rows.unsqueeze(1) + th.arange(self.n_steps, device=self.device)) % self.buffer_size  # (B, n)
        taken = steps, envs.unsqueeze(1)
        # What follows the row written last is not its future, but empty or the oldest there is
        ends = (self.dones[taken] != 0) | (self.timeouts[taken] != 0) | (steps == newest.unsqueeze(1))
        mask = ends.cumsum(dim=1) - ends.long() == 0  # (B, n): no end before this step
        lengths = mask.sum(dim=1)  # (B,), from 1 to n
        rewards = self._normalised(self.rewards[taken], "reward", env).float() * self._discounts[:-1] * mask
        last = (rows + lengths - 1) % self.buffer_size, envs
        return ReplayBufferSamples(
            observations=self._normalised(self.observations[rows, envs], "obs", env),
            actions=self.actions[rows, envs],
            next_observations=self._normalised(self.next_observations[last], "obs", env),
            dones=(self.dones[last] * (1 - self.timeouts[last])).unsqueeze(1),
            # One by one, as NumPy adds up to seven of them; PyTorch's sum has an order of its own
            rewards=reduce(th.add, rewards.split(1, dim=1)),
            discounts=self._discounts[lengths].unsqueeze(1) if self.n_steps > 1 else None,
        )

    def _normalised(self, values: th.Tensor, kind: str, env: VecNormalize | None) -> th.Tensor:
        """
        :param values: of any shape that ends in that of one observation or reward
        :param kind: ``"obs"`` or ``"reward"``
        :param env: what normalises them, if anything does
        :return: what ``env.normalize_obs`` or ``env.normalize_reward`` makes of them
        """
        if env is None:
            return values
        if type(env) is not VecNormalize:  # a sub-class may do anything, but only on the host
            return self._to_device(getattr(env, f"normalize_{kind}")(values.cpu().numpy()))
        if not getattr(env, f"norm_{kind}"):
            return values
        rms: Any = env.obs_rms if kind == "obs" else env.ret_rms
        mean = rms.mean if kind == "obs" else np.zeros_like(rms.mean)
        mean, std = self._to_device(np.stack([mean, np.sqrt(rms.var + env.epsilon)]))
        clip = getattr(env, f"clip_{kind}")
        return ((values.double() - mean) / std).clamp(-clip, clip).float()  # in between float64, as in NumPy

    def _to_device(self, array: np.ndarray) -> th.Tensor:
        """For CUDA through pinned memory, so that nobody waits for its way to the device: PyTorch keeps it until then."""
        tensor = th.from_numpy(array)
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)


def choose_buffer(
    buffer_class: type[ReplayBuffer] | None,
    buffer_kwargs: dict[str, Any],
    n_steps: int | None,
    gamma: float,
    optimize_memory_usage: bool,
    device: th.device,
    spaces_and_size: tuple[spaces.Space, spaces.Space, int, int],
) -> tuple[type[ReplayBuffer], dict[str, Any]]:
    """
    What the user has left open of the replay buffer, as it suits the rest.

    :param buffer_class: as given to the algorithm, or None
    :param buffer_kwargs: its keyword arguments
    :param n_steps: length of the returns, or None for 2 where SB3 has a buffer for more than one step
    :param gamma: discount factor
    :param optimize_memory_usage: whether observations are stored once
    :param device: of the networks
    :param spaces_and_size: observation space, action space, transitions, number of environments
    :return: class and keyword arguments
    """
    if buffer_class is not None:
        return buffer_class, buffer_kwargs
    observation_space, action_space, buffer_size, n_envs = spaces_and_size
    is_dict = isinstance(observation_space, spaces.Dict)
    if n_steps is None:
        n_steps = 1 if is_dict or optimize_memory_usage else DEFAULT_N_STEPS
    kwargs = {**buffer_kwargs, "n_steps": n_steps, "gamma": gamma}
    if not optimize_memory_usage and fits_on_device(device, buffer_size, observation_space, action_space, n_envs):
        return DeviceReplayBuffer, kwargs
    if n_steps > 1:
        return NStepReplayBuffer, kwargs
    return DictReplayBuffer if is_dict else ReplayBuffer, buffer_kwargs


def sample_recent(
    buffer: ReplayBuffer, batch_size: int, recency: float, env: VecNormalize | None = None
) -> ReplayBufferSamples:
    """
    A batch in which recent transitions are more frequent, and none is left out: of R rows the one that is R u^k old, u uniform
    between 0 and 1. The density of an age a is proportional to a^(1/k - 1), so that half of the batch comes from the newest
    R / 2^k rows, however many there are. Like Wang and Ross (2019, arXiv 1906.04009) it emphasises what is recent without
    forgetting what is not, but in every update alike.

    :param buffer: of SB3's kinds or of this module's. One with a ``sample`` of its own (``HerReplayBuffer``) draws as it does
    :param batch_size: B
    :param recency: k, at least 1, with which all are drawn alike, by the buffer itself
    :param env: what normalises observations and rewards, if anything does
    :return: B transitions
    """
    if _draws_itself(buffer, recency):
        return buffer.sample(batch_size, env=env)
    return buffer._get_samples(_recent_rows(buffer, batch_size, recency), env=env)


def locate_recent(
    buffer: ReplayBuffer, batch_size: int, recency: float, env: VecNormalize | None = None
) -> ReplayBufferSamples | BatchIndices:
    """
    :func:`sample_recent` that leaves it to the caller to gather the batch, where that needs nothing from the host.

    :param buffer: see there, as for the others
    :param batch_size: B
    :param recency: k
    :param env: what normalises observations and rewards, if anything does
    :return: where the batch lies, or the batch
    """
    if _draws_itself(buffer, recency) or env is not None or not isinstance(buffer, DeviceReplayBuffer):
        return sample_recent(buffer, batch_size, recency, env)
    return buffer.locate(_recent_rows(buffer, batch_size, recency))


def cut_off_episodes(buffer: ReplayBuffer) -> None:
    """
    End the episodes under way, as by a time limit, because the environments are reset without the buffer being told: what is
    added next is not what followed.

    :param buffer: of SB3's kinds or of this module's; one that may be empty
    """
    if buffer.size() == 0:
        return
    newest = buffer.pos - 1
    if isinstance(buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which says that this is done
            buffer.truncate_last_trajectory()
    elif isinstance(buffer, NStepReplayBuffer):
        buffer.timeouts[newest][buffer.dones[newest] == 0] = 1
    elif buffer.optimize_memory_usage:
        buffer.dones[newest] = 1  # its next observation is overwritten by the first of the new episode


def load_fitting(model: OffPolicyAlgorithm, path: Any, load: Callable[[Any], None]) -> None:
    """
    Load a replay buffer, and keep the one before if that fails or does not fit.

    :param model: whose ``replay_buffer`` it becomes
    :param path: the file, with or without ``.pkl``, or an open one
    :param load: SB3's ``load_replay_buffer``, given an open file
    :raises ValueError: if the file is damaged or none of a replay buffer, or of other spaces or another number of environments
        than the model's; says what to do
    """
    before = getattr(model, "replay_buffer", None)  # somebody may have deleted it, to free its memory
    loaded: Any = None
    # SB3 would leave a file that it cannot read open
    file = open_path(path, "r", model.verbose, "pkl") if isinstance(path, (str, Path)) else path
    try:
        try:
            load(file)
            loaded = model.replay_buffer
        except (OSError, Warning):
            raise
        except Exception as error:  # a damaged pickle speaks through any type
            if model.env is None and isinstance(getattr(model, "replay_buffer", None), HerReplayBuffer):
                reason = "HerReplayBuffer needs the environment: call set_env(env) before"
            else:
                reason = f"it is damaged, or of something else ({error!r})"
            raise ValueError(f"{path} cannot be loaded as a replay buffer: {reason}") from error
        _check_fit(loaded, model, path)
    except BaseException:
        model.replay_buffer = before
        raise
    finally:
        if file is not path:
            file.close()
    for what, has, wants in (
        ("rows", loaded.buffer_size, getattr(before, "buffer_size", loaded.buffer_size)),
        ("steps per return", getattr(loaded, "n_steps", 1), getattr(before or loaded, "n_steps", 1)),
    ):
        if has != wants:
            warnings.warn(
                f"The replay buffer in {path} has {has} {what}, the model's had {wants}: the model learns with the one loaded",
                stacklevel=3,
            )


def _check_fit(buffer: ReplayBuffer, model: OffPolicyAlgorithm, path: Any) -> None:
    """:raises ValueError: if ``model`` cannot learn from or add to ``buffer``"""
    if buffer.n_envs != model.n_envs:
        raise ValueError(
            f"{path} is a replay buffer of {buffer.n_envs} environments, but the model has {model.n_envs}. Its rows are one "
            f"transition of each environment: load the model with {buffer.n_envs} environments "
            f"({type(model).__name__}.load(path, env=...)), or leave the buffer out and start with an empty one"
        )
    for name in ("observation", "action"):
        has, wants = (getattr(owner, f"{name}_space") for owner in (buffer, model))
        if has != wants:
            raise ValueError(
                f"{path} is a replay buffer of {name}s in {has}, but the model's are in {wants}: it is of another environment "
                "or of other wrappers"
            )


def _draws_itself(buffer: ReplayBuffer, recency: float) -> bool:
    return recency == 1 or getattr(buffer.sample, "__func__", None) not in _DRAWN_ALIKE


def _recent_rows(buffer: ReplayBuffer, batch_size: int, recency: float) -> np.ndarray:
    # With observations stored once the oldest row's is overwritten (stable-baselines3, pull request 28)
    n_rows = buffer.size() - (buffer.optimize_memory_usage and buffer.full)
    ages = (n_rows * np.random.random_sample(batch_size) ** recency).astype(np.int64)
    return (buffer.pos - 1 - ages) % buffer.buffer_size


def fits_on_device(
    device: th.device, buffer_size: int, observation_space: spaces.Space, action_space: spaces.Space, n_envs: int
) -> bool:
    """
    Whether a :class:`DeviceReplayBuffer` would leave at least half of a GPU's free memory to everything else.

    :param device: of the networks
    :param buffer_size: transitions
    :param observation_space: the observation space
    :param action_space: the action space
    :param n_envs: number of environments
    :return: never with ``Dict`` observations, nor on anything else than CUDA, where there is nothing to gain
    """
    if device.type != "cuda" or isinstance(observation_space, spaces.Dict):
        return False
    row = ReplayBuffer(n_envs, observation_space, action_space, "cpu", n_envs)
    n_bytes = max(buffer_size // n_envs, 1) * sum(getattr(row, name).nbytes for name in ARRAYS)
    return n_bytes <= th.cuda.mem_get_info(device)[0] / 2
