"""Spaces and wrappers that cannot work are refused when a model gets its environment, with a wrapper that helps."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.vec_env import VecEnv, VecExtractDictObs, VecFrameStack, VecNormalize, VecTransposeImage
from stable_baselines3.common.vec_env import unwrap_vec_wrapper as unwrap

#: What gymnasium.wrappers.FlattenObservation makes a vector of
_FLATTENED = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Text, spaces.Tuple, spaces.Dict)
_FLATTEN = "gymnasium.wrappers.FlattenObservation(env) makes one vector of it, for MlpPolicy"
_TRANSFORM = "gymnasium.wrappers.TransformObservation(env, function, space) with a Box for the space"
#: Height and width that the three convolutions of SB3's NatureCNN need
_LEAST_PIXELS = 36


class SpaceError(ValueError, AssertionError):
    """A space or an order of wrappers that cannot work. Also what SB3 raises for a space, for code that expects that."""


def check_spaces(env: gym.Env | VecEnv | Any) -> None:
    """
    Check an environment's spaces and the order of its wrappers, before and after SB3 has wrapped it.

    SB3 itself stops at many of these only in the middle of learning, with an error of NumPy or PyTorch.

    :param env: an environment of Gymnasium or a VecEnv; anything else, which SB3 converts first, is left alone
    :raises ValueError: says what was given, what is allowed, and which wrapper helps
    """
    if not isinstance(env, (gym.Env, VecEnv)):
        return
    check_action_space(env.action_space)
    check_observation_space(env.observation_space)
    if isinstance(env, VecEnv):
        _check_wrappers(env)


def check_action_space(space: spaces.Space) -> None:
    """
    :param space: of the actions
    :raises ValueError: unless it is a Box of float32 or float64, with at least one dimension and finite bounds, low < high
    """
    if not isinstance(space, spaces.Box):
        raise SpaceError(
            f"The action space must be a Box, for a diffusion needs real numbers, but got {space}. Algorithms that support "
            "discrete actions are SB3's DQN and PPO; make one Box of several spaces with gymnasium.wrappers.TransformAction"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        width = space.high - space.low
    if np.issubdtype(space.dtype, np.floating) and (not np.isfinite(width).all() or (width <= 0).any()):
        raise SpaceError(
            f"The action space must be a floating-point Box with finite bounds, low < high, but got {space} with low "
            f"{space.low} and high {space.high}. Wrap the environment, for instance with gymnasium.wrappers.RescaleAction"
        )
    if space.dtype not in (np.float32, np.float64) or 0 in space.shape:
        raise SpaceError(
            "The action space must be a floating-point Box, float32 or float64, with finite bounds and at least one number, "
            f"but got {space}. Wrap the environment, for instance with gymnasium.wrappers.TransformAction(env, lambda action: "
            f"action.astype({str(space.dtype)!r}), gymnasium.spaces.Box(low, high, dtype='float32'))"
        )


def check_observation_space(space: spaces.Space) -> None:
    """
    :param space: of the observations
    :raises ValueError: unless it is a Box, Discrete, MultiDiscrete or MultiBinary that SB3 can preprocess, or a Dict of these
    """
    if not isinstance(space, spaces.Dict):
        _check_simple("The observation space", space)
        return
    if not space.spaces:
        raise SpaceError(f"The observation space {space} has no keys: there is nothing to act on. Give it at least one")
    for key, part in space.spaces.items():
        _check_simple(f"The observation space's part {key!r}", part)


def _check_simple(name: str, space: spaces.Space) -> None:
    fault, advice = "", _FLATTEN
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        fault = f"is a {type(space).__name__}; allowed are Box, Discrete, MultiDiscrete, MultiBinary, and a Dict of these"
        advice = _FLATTEN if isinstance(space, _FLATTENED) and space.is_np_flattenable else f"Use {_TRANSFORM}"
    elif isinstance(space, spaces.Box) and space.shape == ():
        fault = "has the shape (); a Box needs at least one axis"
        advice += ", gymnasium.wrappers.ReshapeObservation(env, (1,)) does it for a single Box"
    elif 0 in (space.shape or ()):
        fault = "has no numbers in it"
        advice = "Leave it out, of a Dict with gymnasium.wrappers.FilterObservation(env, keys)"
    elif isinstance(space, spaces.Box) and (space.dtype.kind not in "biuf" or space.dtype.itemsize > 8):
        fault = f"has the dtype {space.dtype}; PyTorch has at most 64 bits"
        advice = "Use gymnasium.wrappers.DtypeObservation(env, 'float32')"
    elif isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(space.start != 0):
        fault = f"starts at {space.start}; SB3 encodes what starts at 0"
    elif isinstance(space, spaces.MultiDiscrete) and len(space.shape) > 1:
        fault = f"has the shape {space.shape}; a MultiDiscrete may have one axis"
    if fault:
        raise SpaceError(f"{name}, {space}, {fault}. Wrap the environment: {advice}")


def _check_wrappers(env: VecEnv) -> None:
    """
    VecNormalize hands the observations that it was given to the replay buffer: what a wrapper around it does is not in them.

    :raises ValueError: if such a wrapper changes the observation space, or VecNormalize has one that it stumbles over
    """
    normalize = unwrap(env, VecNormalize)
    if normalize is None:
        return
    if isinstance(normalize.observation_space, spaces.Discrete):
        raise SpaceError(
            f"VecNormalize has observations in {normalize.observation_space}, of which SB3 cannot take the last one of an "
            f"episode. Wrap the environment before VecNormalize: {_FLATTEN}"
        )
    outside = _wrapper_around(env, normalize)
    if outside is None and normalize.observation_space == env.observation_space:
        return
    inside = "the wrapper" if outside is None else outside
    raise SpaceError(
        f"{outside or 'A wrapper'} stands around VecNormalize and changes the observations, to {env.observation_space}, which "
        f"the replay buffer would not know of. Put {inside} inside: VecNormalize({inside}(env, ...), ...)"
        + (" (SB3 adds VecTransposeImage where images have their channels last)" if outside == "VecTransposeImage" else "")
    )


def _wrapper_around(env: VecEnv | None, normalize: VecNormalize) -> str | None:
    """:return: name of the first wrapper of SB3's outside VecNormalize that changes observations"""
    while env is not None and env is not normalize:
        transposes = isinstance(env, VecTransposeImage) and not env.skip and getattr(env, "image_space_keys", ["image"])
        if transposes or isinstance(env, (VecFrameStack, VecExtractDictObs)):
            return type(env).__name__
        env = getattr(env, "venv", None)
    return None


def check_extractor(extractor_class: type, space: spaces.Space, normalize_images: bool, env: VecEnv | None) -> None:
    """
    Check that SB3's feature extractors can take the observations.

    :param extractor_class: the policy's; one that is not SB3's is left alone
    :param space: the observation space, with channels first where SB3 has put them there
    :param normalize_images: the policy's argument: whether pixels are divided by 255
    :param env: the environment, if there is one, for VecNormalize
    :raises ValueError: says what was given, what is allowed, and what to do
    """
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    if extractor_class is CombinedExtractor:
        if not isinstance(space, spaces.Dict):
            raise SpaceError(
                f"MultiInputPolicy is for Dict observations, but got {space}: use MlpPolicy, or CnnPolicy for images"
            )
        images = {key: part for key, part in parts.items() if is_image_space(part, normalized_image=not normalize_images)}
    elif extractor_class is NatureCNN:
        if isinstance(space, spaces.Dict):
            raise SpaceError(f"CnnPolicy is for a single image, but got {space}: use MultiInputPolicy")
        images = parts
    else:
        if isinstance(space, spaces.Dict) and (extractor_class.__module__ or "").startswith("stable_baselines3."):
            raise SpaceError(f"MlpPolicy is not for Dict observations, but got {space}: use MultiInputPolicy")
        return
    for key, image in images.items():
        fault = _fault_of_image(image, normalize_images, unwrap(env, VecNormalize) if env is not None else None)
        if fault:
            raise SpaceError(f"SB3's network for images, NatureCNN, cannot take {f'{key!r}: ' if key else ''}{image}. {fault}")


def _fault_of_image(image: spaces.Space, normalize_images: bool, normalize: VecNormalize | None) -> str:
    """:return: what to do about it, or nothing"""
    if not is_image_space(image, normalized_image=not normalize_images):
        if normalize is not None and normalize.norm_obs:
            return (
                "VecNormalize makes floats of the pixels. Leave that to the policy: VecNormalize(VecTransposeImage(env), "
                "norm_obs=False), of a Dict norm_obs_keys=[...] without the image (no VecTransposeImage where the channels "
                "are first), or tell the policy: policy_kwargs=dict(normalize_images=False)"
            )
        return (
            "An image is a Box(0, 255, (channels, height, width), uint8), or with channels last. Wrap the environment, for "
            "instance with gymnasium.wrappers.ReshapeObservation for another axis; for pixels that are floats give "
            "policy_kwargs=dict(normalize_images=False) and channels first; for anything else use MlpPolicy"
        )
    assert image.shape is not None
    if min(image.shape[1:]) < _LEAST_PIXELS:
        if image.shape[0] >= _LEAST_PIXELS <= max(image.shape[1:]):
            return (
                "The channels must be the first axis, or with uint8 the last: gymnasium.wrappers.TransformObservation moves it"
            )
        return (
            f"It takes images of at least {_LEAST_PIXELS}x{_LEAST_PIXELS} pixels: use gymnasium.wrappers.ResizeObservation, a "
            "policy_kwargs=dict(features_extractor_class=...) of your own, or MlpPolicy"
        )
    return ""
