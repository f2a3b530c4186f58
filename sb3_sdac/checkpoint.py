"""
Checkpoints: all that training needs to go on another day, in one file that is replaced in one step.

A model's own zip leaves out the replay buffer, the statistics of VecNormalize and the states of the random generators.
Here all of them go into one archive, written beside its place and then moved there, so that a kill at any moment
leaves either the checkpoint before or the new one. Everything but the model's own zip is plain numbers (NumPy arrays,
JSON), no pickles.
"""

import io
import json
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecNormalize

from sb3_sdac.buffers import ARRAYS, DeviceReplayBuffer, cut_off_episodes
from sb3_sdac.files import replaced_in_one_step
from sb3_sdac.sdac import SDAC

_VERSION = 4


def save_checkpoint(model: OffPolicyAlgorithm, path: str | Path) -> None:
    """
    Save model, optimizers, counters, replay buffer, VecNormalize and random states, so that training can go on from here.

    :param model: to be saved between two updates, as :class:`SaveCheckpoint` does
    :param path: the file; what is there is replaced once the new one is complete
    :raises ValueError: if the algorithm has no replay buffer, as PPO, or one that holds something else than numbers (HER with
        ``copy_info_dict=True``)
    :raises OSError: if the disk is full, for instance: names the file, which is as it was
    """
    _check_algorithm(type(model))
    # Stored, not compressed: the file is as large as what the buffer holds, and written as fast as the disk allows
    with replaced_in_one_step(path) as file, zipfile.ZipFile(file, "w") as archive:
        _write(model, archive)


def _write(model: OffPolicyAlgorithm, archive: zipfile.ZipFile) -> None:
    zipped = io.BytesIO()
    model.save(zipped)
    archive.writestr("model.zip", zipped.getvalue())
    state: dict[str, Any] = {"version": _VERSION, "algorithm": type(model).__name__, "random": _random_state(model)}
    if model.replay_buffer is not None:
        state["replay_buffer"] = _save_buffer(model.replay_buffer, archive)
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        _save_normalize(normalize, archive)
    archive.writestr("state.json", json.dumps(state))


def is_checkpoint(path: str | Path) -> bool:
    """
    :param path: a file that need not exist
    :return: whether :func:`save_checkpoint` made it, and not ``model.save``
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "state.json" in archive.namelist()


def load_checkpoint(
    path: str | Path,
    env: GymEnv,
    algorithm: type[OffPolicyAlgorithm] = SDAC,
    device: th.device | str = "auto",
    **kwargs: Any,
) -> OffPolicyAlgorithm:
    """
    A model that goes on where :func:`save_checkpoint` left it, after a reset of the environments::

        model = load_checkpoint("checkpoint.zip", env)
        model.learn(1_000_000 - model.num_timesteps, reset_num_timesteps=False)

    Sets the random states of Python, NumPy and PyTorch. Like any model of SB3 the one inside runs code of its pickles when
    it is loaded: only load what comes from a source you trust.

    :param path: the file
    :param env: as many environments of the same spaces, wrapped in a VecNormalize if there was one (it is set)
    :param algorithm: class of the model
    :param device: where to put the networks
    :param kwargs: arguments of the algorithm's constructor to change, as in its ``load``
    :return: the model
    :raises ValueError: if the file is not a complete checkpoint, or does not fit the environment or the algorithm
    """
    _check_algorithm(algorithm)
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{path} is damaged: {damaged} in it is not what was written")
            state = json.loads(archive.read("state.json"))
            if state["version"] != _VERSION:
                raise ValueError(f"{path} is a checkpoint of version {state['version']}, this sb3_sdac reads {_VERSION}")
            if state["algorithm"] != algorithm.__name__:
                raise ValueError(
                    f"{path} holds a model of {state['algorithm']}, not of {algorithm.__name__}: give that as algorithm=..."
                )
            model = algorithm.load(io.BytesIO(archive.read("model.zip")), env=env, device=device, **kwargs)
            if model.replay_buffer is not None and "replay_buffer" in state:
                _load_buffer(model.replay_buffer, state["replay_buffer"], archive)
            _load_normalize(model.get_vec_normalize_env(), archive)
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a complete checkpoint of save_checkpoint ({error}). What model.save() wrote has its own load()"
        ) from error
    _set_random_state(model, state["random"])
    return model


def _check_algorithm(algorithm: type) -> None:
    if not issubclass(algorithm, OffPolicyAlgorithm):
        raise ValueError(
            f"A checkpoint is of an off-policy algorithm such as SDAC or SAC, got {algorithm.__name__}: use its own save, load"
        )


class SaveCheckpoint(BaseCallback):
    """
    Callback that saves a checkpoint every ``save_freq`` environment steps, between two updates, and at the end of training.

    :param path: the file, see :func:`save_checkpoint`
    :param save_freq: environment steps, summed over all environments, from one checkpoint to the next; at least 1
    """

    def __init__(self, path: str | Path, save_freq: int):
        super().__init__()
        if save_freq < 1:
            raise ValueError(f"save_freq must be at least 1, got {save_freq}")
        self.path = Path(path)
        self.save_freq = save_freq
        self._saved_at = 0

    def _on_training_start(self) -> None:
        _check_algorithm(type(self.model))
        self._saved_at = self.num_timesteps

    def _on_rollout_start(self) -> None:  # the updates of the last rollout are done
        if self.num_timesteps - self._saved_at >= self.save_freq:
            self._save()

    def _on_training_end(self) -> None:
        self._save()

    def _on_step(self) -> bool:
        return True

    def _save(self) -> None:
        save_checkpoint(cast(OffPolicyAlgorithm, self.model), self.path)
        self._saved_at = self.num_timesteps


def _buffer_arrays(buffer: ReplayBuffer) -> dict[str, Any]:
    """Every array of the buffer by its name, those of Dict observations by ``name/key``; tensors if they are on the device."""
    if isinstance(buffer, DeviceReplayBuffer):
        return {name: getattr(buffer, name) for name in ARRAYS}
    arrays = {name: value for name, value in vars(buffer).items() if isinstance(value, np.ndarray) and value.dtype != object}
    for name, value in vars(buffer).items():
        if isinstance(value, dict) and value and all(isinstance(array, np.ndarray) for array in value.values()):
            arrays.update({f"{name}/{key}": array for key, array in value.items()})
    return arrays


def _save_buffer(buffer: ReplayBuffer, archive: zipfile.ZipFile) -> dict[str, Any]:
    # With optimize_memory_usage the next observation stands one further
    filled = buffer.buffer_size if buffer.full else min(buffer.pos + 1, buffer.buffer_size)
    if getattr(buffer, "copy_info_dict", False):
        raise ValueError(
            "With copy_info_dict=True the replay buffer holds Python objects, which a checkpoint cannot: leave it False"
        )
    for name, array in _buffer_arrays(buffer).items():
        part = array[:filled] if len(array) == buffer.buffer_size else array
        part = part.cpu() if isinstance(part, th.Tensor) else part
        with archive.open(f"replay_buffer/{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(cast(BinaryIO, file), np.ascontiguousarray(part), allow_pickle=False)
    return {"pos": buffer.pos, "full": buffer.full, "size": buffer.buffer_size, "n_envs": buffer.n_envs}


def _load_buffer(buffer: ReplayBuffer, state: dict[str, Any], archive: zipfile.ZipFile) -> None:
    if (buffer.buffer_size, buffer.n_envs) != (state["size"], state["n_envs"]):
        raise ValueError(
            f"The checkpoint is of {state['n_envs']} environments with a replay buffer of {state['size']} rows, but here are "
            f"{buffer.n_envs} and {buffer.buffer_size}: go on with as many environments and the same buffer_size"
        )
    for name, array in _buffer_arrays(buffer).items():
        with archive.open(f"replay_buffer/{name}.npy") as file:
            saved = np.lib.format.read_array(cast(BinaryIO, file), allow_pickle=False)
        array[: len(saved)] = th.from_numpy(saved) if isinstance(array, th.Tensor) else saved
    buffer.pos, buffer.full = state["pos"], state["full"]
    cut_off_episodes(buffer)  # the environments start anew


def _statistics(normalize: VecNormalize) -> dict[str, RunningMeanStd]:
    statistics = {"ret_rms": normalize.ret_rms}
    obs_rms = getattr(normalize, "obs_rms", None)  # there is none with norm_obs=False
    if isinstance(obs_rms, dict):
        statistics.update({f"obs_rms/{key}": value for key, value in obs_rms.items()})
    elif obs_rms is not None:
        statistics["obs_rms"] = obs_rms
    return statistics


def _save_normalize(normalize: VecNormalize, archive: zipfile.ZipFile) -> None:
    for name, rms in _statistics(normalize).items():
        with archive.open(f"normalize/{name}.npy", "w") as file:
            moments = np.stack([rms.mean, rms.var, np.full_like(rms.mean, rms.count)])  # (3, ...), float64
            np.lib.format.write_array(cast(BinaryIO, file), moments, allow_pickle=False)


def _load_normalize(normalize: VecNormalize | None, archive: zipfile.ZipFile) -> None:
    saved = {name for name in archive.namelist() if name.startswith("normalize/")}
    wanted = {f"normalize/{name}.npy" for name in _statistics(normalize)} if normalize is not None else set()
    if saved != wanted:
        have, had = (("a" if names else "no") + " VecNormalize" for names in (wanted, saved))
        raise ValueError(
            f"The checkpoint is of a run with {had} ({len(saved)} statistics), but env has {have} ({len(wanted)})"
        )
    if normalize is None:
        return
    for name, rms in _statistics(normalize).items():
        with archive.open(f"normalize/{name}.npy") as file:
            mean, var, count = np.lib.format.read_array(cast(BinaryIO, file), allow_pickle=False)
        if mean.shape != rms.mean.shape:
            raise ValueError(f"The checkpoint's {name} has shape {mean.shape}, that of env {rms.mean.shape}")
        rms.mean, rms.var, rms.count = mean, var, float(count.flat[0])


def _random_state(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """Of Python, NumPy, PyTorch, the action space (random actions) and the environments, as JSON."""
    _, keys, pos, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [np.asarray(keys).tolist(), int(pos), int(has_gauss), float(gauss)],
        "torch": th.get_rng_state().tolist(),
        "cuda": th.cuda.get_rng_state(model.device).tolist() if model.device.type == "cuda" else None,
        "action_space": _generator_state(model.action_space.np_random),
        "envs": [],
    }
    if model.env is not None and model.env.has_attr("np_random"):
        state["envs"] = [_generator_state(generator) for generator in model.env.get_attr("np_random")]
    return state


def _generator_state(generator: Any) -> dict[str, Any] | None:
    """For :func:`_set_generator_state`, as what JSON has; None with a warning if it is none of NumPy's Generators."""
    if not isinstance(generator, np.random.Generator):
        warnings.warn(
            f"An environment's np_random is {type(generator).__name__} and not NumPy's Generator: its state is not in the "
            "checkpoint, so a resumed run does not go on bit by bit",
            stacklevel=2,
        )
        return None
    state: dict[str, Any] = json.loads(json.dumps(generator.bit_generator.state, default=lambda array: array.tolist()))
    return state


def _set_generator_state(generator: np.random.Generator, state: dict[str, Any]) -> None:
    """Where the bit generator had arrays, NumPy wants arrays."""

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restored(part) for key, part in value.items()}
        return np.array(value, dtype=np.uint64) if isinstance(value, list) else value

    generator.bit_generator.state = restored(state)


def _set_random_state(model: OffPolicyAlgorithm, state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    th.set_rng_state(th.tensor(state["torch"], dtype=th.uint8))
    if state["cuda"] is not None and model.device.type == "cuda":
        th.cuda.set_rng_state(th.tensor(state["cuda"], dtype=th.uint8), model.device)
    _set_generator_state(model.action_space.np_random, state["action_space"])
    assert model.env is not None
    if state["envs"]:
        model.env.unwrapped._reset_seeds()  # loading has left them seeds for their next reset
    for i, env_state in enumerate(state["envs"]):
        if env_state is None:
            continue
        (generator,) = model.env.get_attr("np_random", i)  # in a process of its own it is a copy, so it is sent back
        if type(generator.bit_generator).__name__ != env_state["bit_generator"]:  # as made by a reset that is yet to come
            generator = np.random.Generator(getattr(np.random, env_state["bit_generator"])())
        _set_generator_state(generator, env_state)
        model.env.set_attr("np_random", generator, i)
