"""
SB3's off-policy algorithm, made to say at once what is wrong: nothing here knows about diffusion.

Arguments of a live model work or are refused, what is not finite is stopped before it is stored, and files are complete or as
they were before.
"""

import copy
import functools
import inspect
import io
import json
import pathlib
import time
import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import configure_logger, get_device
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_sdac.arguments import LiveArguments, check_finite, refuse_unknown, require
from sb3_sdac.buffers import choose_buffer, cut_off_episodes, load_fitting
from sb3_sdac.files import save_in_one_step
from sb3_sdac.policies import DiffusionPolicy
from sb3_sdac.rewards import LARGEST_REWARD
from sb3_sdac.spaces import check_spaces

SelfCareful = TypeVar("SelfCareful", bound="CarefulOffPolicyAlgorithm")


class CarefulOffPolicyAlgorithm(LiveArguments, OffPolicyAlgorithm):
    """``OffPolicyAlgorithm`` of SB3 with checks; see there for the arguments."""

    policy: DiffusionPolicy

    def __init__(self, policy: Any, env: Any, learning_rate: Any, device: th.device | str = "auto", **kwargs: Any):
        # SB3 falls back to the CPU without a word
        if str(device).startswith("cuda") and not th.cuda.is_available():
            raise ValueError(
                f"device={str(device)!r} was given but PyTorch finds no CUDA device here; use device='cpu' or 'auto'"
            )
        super().__init__(policy, env, learning_rate, device=device, **kwargs)

    @classmethod
    def _constructor_arguments(cls) -> set[str]:
        """:return: names of the constructor's arguments, also of those that a subclass hands on as ``**kwargs``"""
        owners = cls.__mro__[: cls.__mro__.index(CarefulOffPolicyAlgorithm)]
        constructors = [vars(owner)["__init__"] for owner in owners if "__init__" in vars(owner)]
        parameters = [
            parameter for constructor in constructors for parameter in inspect.signature(constructor).parameters.values()
        ]
        collected = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {parameter.name for parameter in parameters if parameter.kind not in collected} - {"self"}

    @classmethod
    def _policy_arguments(cls) -> set[str]:
        """:return: names of the policy's arguments"""
        names = set(inspect.signature(next(iter(cls.policy_aliases.values())).__init__).parameters)
        return names - {"self", "observation_space", "action_space", "lr_schedule"}

    @classmethod
    def _refuse_unknown(cls, arguments: dict[str, Any]) -> None:
        """:raises TypeError: if there are any, which are none of this algorithm's"""
        refuse_unknown(arguments, cls._policy_arguments(), DiffusionPolicy.LIVE)

    @property
    def stats_window_size(self) -> int:
        """Episodes over which the logged success rate, length and reward are averaged."""
        return self._stats_window_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self) and "_is_live" in vars(self) and name in self._policy_arguments():
            raise AttributeError(f"{name} is the policy's: set model.policy.{name} = {value!r}")
        super().__setattr__(name, value)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        :param gradient_steps: updates to make
        :param batch_size: transitions per update
        :raises ValueError: if there is nothing to learn from
        """
        if self.replay_buffer is None or self.replay_buffer.size() == 0:
            raise ValueError("The replay buffer is empty, nothing can be learned from it: call learn(), or add transitions")
        self._prepare_log()

    def _prepare_log(self) -> None:
        """What ``learn`` would have made; it makes its own all the same when it is called."""
        if not hasattr(self, "_logger"):
            self._logger = configure_logger(self.verbose, self.tensorboard_log, type(self).__name__)
        if self.ep_info_buffer is None:
            self.start_time = time.time_ns()
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("There is no environment to learn from: model.set_env(env), or load(path, env=env)")
        if self.tensorboard_log is not None and not self._custom_logger:
            require("tensorboard", "plots", "tensorboard_log")
        self.action_noise = fit_action_noise(self.action_noise, self.env.num_envs, self.action_space)  # type: ignore[arg-type]
        if (reset_num_timesteps or self._last_obs is None) and self.replay_buffer is not None:
            cut_off_episodes(self.replay_buffer)  # SB3 is about to reset the environments
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self._check_step("observation", self._last_obs)
        action, buffer_action = super()._sample_action(learning_starts, action_noise, n_envs)
        if not np.isfinite(buffer_action).all():
            rewards = getattr(self.replay_buffer, "rewards", np.zeros(1))
            reason = (
                f"Learning has diverged; the largest reward in the replay buffer is {float(abs(rewards).max()):g} in size. "
                "reward_scale='auto' suits rewards of any size; else try a smaller learning_rate"
            )
            if action_noise is not None and all(th.isfinite(value).all() for value in self.policy.state_dict().values()):
                reason = "The networks' weights are finite, so the fault is that of action_noise"
            raise ValueError(
                f"The policy's action at environment step {self.num_timesteps} is not finite: {buffer_action}. {reason}"
            )
        return action, buffer_action

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self._vec_normalize_env is None:
            original_obs, original_reward = new_obs, reward
        else:  # what is stored; VecNormalize's clipping would hide that it is infinite
            original_obs = self._vec_normalize_env.get_original_obs()
            original_reward = self._vec_normalize_env.get_original_reward()
        self._check_step("observation", original_obs)
        self._check_step("reward", original_reward)
        if np.abs(original_reward).max() > LARGEST_REWARD:
            raise ValueError(
                f"A reward at environment step {self.num_timesteps} is larger than {LARGEST_REWARD:g} in size: "
                f"{original_reward}. Scale the rewards, for instance with gymnasium.wrappers.TransformReward"
            )
        for info in infos:
            if info.get("terminal_observation") is not None:
                self._check_step("terminal observation", info["terminal_observation"])
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _check_step(self, name: str, values: Any) -> None:
        """One thing passes: VecNormalize hands over terminal observations clipped, so that an infinite one looks finite."""
        check_finite(
            name,
            values,
            f"at environment step {self.num_timesteps} is not finite: {{value}}. Nothing of this step was stored or learned "
            "from; the model can still be saved. SB3's VecCheckNan helps to find the origin.",
        )

    def _setup_replay_buffer(self) -> None:
        """Make the replay buffer, or move the one that comes from a file. A model loaded only to act has none."""
        if self.replay_buffer is None and self.env is None:
            return
        if self.replay_buffer is None:
            if self.replay_buffer_class is not None and (self.n_steps or 1) > 1:
                warnings.warn(
                    f"n_steps={self.n_steps} is without effect with a replay_buffer_class of your own: give that "
                    f"replay_buffer_kwargs={{'n_steps': {self.n_steps}, 'gamma': {self.gamma}}} if it has such arguments",
                    stacklevel=2,
                )
            buffer_class, kwargs = choose_buffer(
                self.replay_buffer_class,
                self.replay_buffer_kwargs,
                n_steps=self.n_steps,
                gamma=self.gamma,
                optimize_memory_usage=self.optimize_memory_usage,
                device=self.device,
                spaces_and_size=(self.observation_space, self.action_space, self.buffer_size, self.n_envs),
            )
            if issubclass(buffer_class, HerReplayBuffer):
                kwargs = {**kwargs, "env": self.env}
            self.replay_buffer = buffer_class(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                optimize_memory_usage=self.optimize_memory_usage,
                **kwargs,
            )
        self.replay_buffer.device = self.device

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment to learn from, see SB3's ``BaseAlgorithm.set_env``.

        A model loaded without an environment has no replay buffer, as acting needs none; it gets one here.

        :param env: the environment
        :param force_reset: reset it before learning goes on
        """
        super().set_env(env, force_reset)
        if self.replay_buffer is None:
            self._setup_replay_buffer()

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model as one zip file, see SB3's ``BaseAlgorithm.save``.

        :param path: the file, with or without ``.zip``; what is there is replaced once the new one is complete
        :param exclude: names of attributes to leave out besides those that always are
        :param include: names of such attributes to save all the same
        """
        live, initial = self.policy.live_arguments(), self.policy.initial_arguments
        changed = {name: live[name] for name in live if name in self.policy_kwargs or live[name] != initial[name]}
        vars(self)["policy_kwargs"] = {**self.policy_kwargs, **changed}
        save_in_one_step(functools.partial(super().save, exclude=exclude, include=include), path, "zip", self.verbose)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as a pickle, see SB3's ``OffPolicyAlgorithm.save_replay_buffer``.

        :param path: the file, with or without ``.pkl``; what is there is replaced once the new one is complete
        :raises ValueError: if there is none
        """
        if self.replay_buffer is None:
            raise ValueError("There is no replay buffer to save: this model was loaded to act, without an environment")
        save_in_one_step(super().save_replay_buffer, path, "pkl", self.verbose)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer, see SB3's ``OffPolicyAlgorithm.load_replay_buffer``.

        :param path: the file, with or without ``.pkl``
        :param truncate_last_traj: end the episodes under way of a ``HerReplayBuffer``
        :raises ValueError: if the file is no replay buffer, or one of other spaces or another number of environments; the one
            before is kept
        """
        load_fitting(self, path, functools.partial(super().load_replay_buffer, truncate_last_traj=truncate_last_traj))

    @classmethod
    def load(
        cls: type[SelfCareful],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfCareful:
        """
        Load a model from a zip file, see SB3's ``BaseAlgorithm.load``.

        Without ``env`` the model can act at once and has no replay buffer until :meth:`set_env`.

        :param path: the file, with or without ``.zip``
        :param env: environment to go on learning from
        :param device: where to put the networks; if it is not there, a warning and the CPU, so that models move between
            machines
        :param custom_objects: objects to use instead of those saved under the same name
        :param print_system_info: print versions at saving and now
        :param force_reset: reset the environment before learning goes on
        :param kwargs: arguments of the constructor to change
        :return: the model
        :raises ValueError: if the file is not a complete model of this algorithm, or does not fit the environment or the
            arguments
        :raises TypeError: for arguments that the constructor does not have
        """
        cls._refuse_unknown({name: kwargs[name] for name in kwargs.keys() - cls._constructor_arguments()})
        if "policy" in kwargs:
            raise TypeError(f"unexpected keyword argument policy={kwargs['policy']!r}: the policy comes from the file")
        if "stats_window_size" in kwargs:
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        if str(device) != "auto" and th.device(device).type != get_device(device).type:
            warnings.warn(
                f"device={str(device)!r} was asked for but is not there: the model is loaded on {get_device(device)}",
                stacklevel=2,
            )
            device = "auto"
        try:
            return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        except Exception as error:
            # A damaged file speaks through many types of SB3, zipfile, json and torch; a plain ValueError is a verdict already
            damaged = isinstance(error, (UnicodeError, json.JSONDecodeError))
            if isinstance(error, (OSError, ValueError)) and not damaged:
                raise
            # SB3 meets a ValueError of load_state_dict with an attempt to read an old DQN, whose KeyError says nothing
            reason = error.__context__ if isinstance(error, KeyError) and error.__context__ is not None else error
            raise ValueError(
                f"{path} cannot be loaded, it is damaged, of another architecture, or a checkpoint, for which there is "
                f"sb3_sdac.checkpoint.load_checkpoint: {reason!r}"
            ) from error

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        check_spaces(env)  # SB3 stops at some while it wraps
        vec_env = OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        check_spaces(vec_env)  # of which SB3 may have moved the channels
        return vec_env


def fit_action_noise(action_noise: ActionNoise | None, n_envs: int, action_space: spaces.Box) -> ActionNoise | None:
    """
    The noise for this number of environments.

    SB3's ``learn`` makes one noise per environment of what it is given, and saves that with the model. With another number of
    environments, environment i gets the noise that i modulo the former number had.

    :param action_noise: as the user gave it, as ``learn`` left it, or None
    :param n_envs: number of environments
    :param action_space: the action space
    :return: the same object where it fits; one for a single environment, which ``learn`` multiplies, is left alone
    :raises ValueError: if the noise is of another shape than an action
    """
    if action_noise is None:
        return None
    _check_shape(action_noise, action_space)
    if not isinstance(action_noise, VectorizedActionNoise):
        return action_noise
    is_nested = isinstance(action_noise.noises[0], VectorizedActionNoise)
    if len(action_noise.noises) == n_envs and not is_nested:
        return action_noise
    singles = [_single(noise) for noise in action_noise.noises]
    # A copy, for it may be of a subclass with arguments of its own
    fitted: Any = copy.copy(action_noise)
    fitted.base_noise, fitted.n_envs = _single(action_noise.base_noise), n_envs
    fitted.noises = [copy.deepcopy(singles[i % len(singles)]) for i in range(n_envs)]  # resets them
    return fitted


def _single(action_noise: ActionNoise) -> ActionNoise:
    """One environment's noise, however often it was multiplied."""
    while isinstance(action_noise, VectorizedActionNoise):
        action_noise = action_noise.noises[0]
    return action_noise


def _check_shape(action_noise: ActionNoise, action_space: spaces.Box) -> None:
    """:raises ValueError: where NumPy would stop with shapes that cannot be broadcast, or make actions of another shape"""
    state = np.random.get_state()
    shape = np.shape(copy.deepcopy(_single(action_noise))())
    np.random.set_state(state)  # which the noises draw from
    try:
        fits = np.broadcast_shapes(shape, action_space.shape) == action_space.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"action_noise gives noise of shape {shape}, but an action has the shape {action_space.shape}: give a noise for "
            "one environment, SB3 makes one per environment of it"
        )
