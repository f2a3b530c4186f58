"""SB3's action noise, for as many environments as there are."""

import copy
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise


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
