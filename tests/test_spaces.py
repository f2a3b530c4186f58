"""Every space either trains, saves, loads and predicts, or is refused at once with a wrapper that makes it do so."""

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium import wrappers as w
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_sdac import SDAC
from sb3_sdac.spaces import check_action_space, check_extractor, check_observation_space, check_spaces

F32, F64 = np.float32, np.float64
VECTOR = spaces.Box(-1, 1, (2,), F32)
SCALAR = spaces.Box(-1, 1, (), F32)
CHANNELS_LAST, CHANNELS_FIRST = (spaces.Box(0, 255, shape, np.uint8) for shape in ((36, 40, 3), (3, 36, 40)))
WORD = spaces.Text(4)
INT64 = np.iinfo(np.int64)


class Sampled(gym.Env):
    """Random observations, in episodes of up to 5 steps; takes only actions that are in its space."""

    def __init__(self, observation_space: spaces.Space = VECTOR, action_space: spaces.Space = VECTOR):
        self.observation_space = copy.deepcopy(observation_space)  # VecNormalize writes into a Dict
        self.action_space, self.steps = action_space, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(0)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        assert self.action_space.contains(np.asarray(action)), f"{action!r} is not in {self.action_space}"
        return self.observation_space.sample(), 1.0, self.steps % 7 == 0, self.steps % 5 == 0, {}


def vec(space: spaces.Space) -> VecEnv:
    return DummyVecEnv([lambda: Sampled(space), lambda: Sampled(space)])


def learns(env: Any, policy: str | None = None, **policy_kwargs: Any) -> SDAC:
    """Trains a few steps, saves, loads with and without environment, predicts the same, and goes on."""
    is_dict = isinstance(env.observation_space, spaces.Dict)
    policy = policy or ("MultiInputPolicy" if is_dict else "MlpPolicy")
    small: dict[str, Any] = {"buffer_size": 60, "learning_starts": 10, "batch_size": 8, "seed": 0}
    model = SDAC(policy, env, policy_kwargs={"net_arch": [8], **policy_kwargs}, **small).learn(20)
    assert model._n_updates > 0
    stream = io.BytesIO()
    model.save(stream)
    vec_env: Any = model.get_env()
    observations = vec_env.reset()
    actions, _ = model.predict(observations, deterministic=True)
    stream.seek(0)
    np.testing.assert_array_equal(SDAC.load(stream).predict(observations, deterministic=True)[0], actions)
    stream.seek(0)
    SDAC.load(stream, env=vec_env).learn(6)
    assert all(vec_env.action_space.contains(np.asarray(action)) for action in actions)
    return model


# What works

OBSERVATIONS: dict[str, spaces.Space] = {
    "float16": spaces.Box(-1, 1, (3,), np.float16),
    "float16 without bounds": spaces.Box(-np.inf, np.inf, (3,), np.float16),
    "float64": spaces.Box(-1, 1, (3,), F64),
    "all of int64": spaces.Box(INT64.min, INT64.max, (3,), np.int64),
    "uint64": spaces.Box(0, 2**64 - 1, (3,), np.uint64),
    "bool": spaces.Box(0, 1, (3,), np.bool_),
    "matrix": spaces.Box(-1, 1, (4, 5), F32),
    "Discrete": spaces.Discrete(3),
    "MultiDiscrete": spaces.MultiDiscrete([3, 4]),
    "MultiBinary": spaces.MultiBinary((2, 3)),
    "Dict": spaces.Dict(
        {"a": VECTOR, "b": spaces.Discrete(3), "c": spaces.MultiBinary((2, 3)), "d": spaces.MultiDiscrete([3, 4])}
    ),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations_that_work(name: str) -> None:
    learns(Sampled(OBSERVATIONS[name]))


@pytest.mark.parametrize(
    "space", [spaces.Box(-0.3, 0.7, (2,), F64), spaces.Box(-1, 1, (2, 3), F32), spaces.Box(-0.3, 0.7, (1, 1), F32)], ids=str
)
def test_actions_that_work(space: spaces.Box) -> None:
    learns(Sampled(action_space=space))


@pytest.mark.filterwarnings("ignore:.*Casting input x:UserWarning")  # Gymnasium's, of a number that is no array
def test_action_without_axes() -> None:
    learns(Sampled(action_space=SCALAR))


MIXED = spaces.Dict({"image": CHANNELS_LAST, "vector": VECTOR})
VEC_ENVS: dict[str, tuple[Callable[[], VecEnv], str | None]] = {
    "normalised": (lambda: VecNormalize(vec(spaces.Box(-5, 5, (3,), np.float16))), None),
    "normalised integers": (lambda: VecNormalize(vec(spaces.Box(-5, 5, (3,), np.int64))), None),
    "normalised stack": (lambda: VecNormalize(VecFrameStack(vec(VECTOR), 2)), None),
    "monitored": (lambda: VecMonitor(VecNormalize(vec(VECTOR))), None),
    "normalised part of a Dict": (lambda: VecNormalize(VecExtractDictObs(vec(MIXED), "vector")), None),
    "images": (lambda: vec(CHANNELS_LAST), "CnnPolicy"),
    "images, channels first": (lambda: vec(CHANNELS_FIRST), "CnnPolicy"),
    "images with normalised rewards": (
        lambda: VecNormalize(VecTransposeImage(vec(CHANNELS_LAST)), norm_obs=False),
        "CnnPolicy",
    ),
    "normalised images": (lambda: VecNormalize(vec(CHANNELS_LAST)), "MlpPolicy"),
    "Dict": (lambda: vec(MIXED), None),
    "normalised Dict": (lambda: VecNormalize(VecTransposeImage(vec(MIXED)), norm_obs_keys=["vector"]), None),
    "normalised with Discrete": (
        lambda: VecNormalize(vec(spaces.Dict({"a": spaces.Discrete(3), "b": VECTOR})), norm_obs_keys=["b"]),
        None,
    ),
}


@pytest.mark.parametrize("name", VEC_ENVS)
def test_wrappers_that_work(name: str) -> None:
    make_env, policy = VEC_ENVS[name]
    env = make_env()
    check_spaces(env)
    learns(env, policy)


def test_normalised_images_for_the_network_of_images() -> None:
    learns(VecNormalize(VecTransposeImage(vec(CHANNELS_LAST))), "CnnPolicy", normalize_images=False)


# What is refused, and what helps

REFUSED: dict[str, tuple[spaces.Space, str, Callable[[gym.Env], gym.Env]]] = {
    "Box()": (SCALAR, r"shape \(\).*FlattenObservation.*ReshapeObservation", lambda env: w.ReshapeObservation(env, (1,))),
    "walker-walk": (spaces.Dict({"height": SCALAR, "v": VECTOR}), r"'height'.*shape \(\).*Flatten", w.FlattenObservation),
    "no numbers": (
        spaces.Dict({"nothing": spaces.Box(-1, 1, (0,)), "v": VECTOR}),
        "'nothing'.*no numbers.*FilterObservation",
        lambda env: w.FilterObservation(env, ["v"]),
    ),
    "start": (spaces.Discrete(3, start=1), "starts at 1.*FlattenObservation", w.FlattenObservation),
    "negative start": (spaces.Dict({"d": spaces.Discrete(3, start=-5)}), "'d'.*starts at -5", w.FlattenObservation),
    "starts": (spaces.MultiDiscrete([3, 4], start=[0, 2]), r"starts at \[0 2\].*Flatten", w.FlattenObservation),
    "matrix of counts": (spaces.MultiDiscrete(np.array([[3, 4], [2, 2]])), r"shape \(2, 2\).*Flatten", w.FlattenObservation),
    "Text": (WORD, "is a Text; allowed are.*FlattenObservation", w.FlattenObservation),
    "Text in a Dict": (spaces.Dict({"word": WORD, "v": VECTOR}), "'word'.*is a Text.*Flatten", w.FlattenObservation),
    "Tuple": (spaces.Tuple([VECTOR, spaces.Discrete(2, start=1)]), "is a Tuple.*FlattenObservation", w.FlattenObservation),
    "nested": (spaces.Dict({"a": spaces.Dict({"b": VECTOR})}), "'a'.*is a Dict; allowed.*Flatten", w.FlattenObservation),
    "Tuple in a Dict": (spaces.Dict({"a": spaces.Tuple([VECTOR])}), "'a'.*is a Tuple.*Flatten", w.FlattenObservation),
    **{
        type(space).__name__: (
            space,
            f"is a {type(space).__name__}; allowed are.*TransformObservation",
            lambda env: w.TransformObservation(env, lambda obs: np.zeros(2, F32), VECTOR),
        )
        for space in (
            spaces.Sequence(VECTOR),
            spaces.Graph(VECTOR, None),
            spaces.OneOf([VECTOR, spaces.Discrete(2)]),
        )
    },
    "Tuple of a Sequence": (
        spaces.Tuple([spaces.Sequence(VECTOR)]),
        "is a Tuple.*TransformObservation",
        lambda env: w.TransformObservation(env, lambda obs: np.zeros(2, F32), VECTOR),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_observations_that_are_refused(name: str) -> None:
    space, words, helps = REFUSED[name]
    env = Sampled(space)
    for refuses in (check_spaces, lambda env: SDAC("MlpPolicy", env)):
        with pytest.raises(ValueError, match=f"(?s)The observation space.*{words}"):
            refuses(env)
    learns(helps(env))


@pytest.mark.parametrize(
    "space, words",
    [
        (spaces.Dict({}), "has no keys"),
        (spaces.Box(-1, 1, (3, 0)), "has no numbers"),
        (spaces.Box(-1, 1, (3,), np.longdouble), "float128.*DtypeObservation"),  # of which not even a sample can be drawn
    ],
    ids=str,
)
def test_spaces_that_are_refused(space: spaces.Space, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_observation_space(space)


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,), np.float16), spaces.Box(-1, 1, (2,), np.longdouble)], ids=str)
def test_actions_of_other_floats(space: spaces.Box) -> None:
    env = Sampled(action_space=space)
    with pytest.raises(ValueError, match=f"float32 or float64.*{re.escape(str(space))}.*TransformAction.*{space.dtype}"):
        check_spaces(env)
    learns(w.TransformAction(env, lambda action: action.astype(space.dtype), VECTOR))


@pytest.mark.parametrize(
    "space, words",
    [
        (spaces.Discrete(3), r"must be a Box.*Discrete\(3\).*support.*DQN"),
        (spaces.Dict({"a": VECTOR}), "must be a Box.*Dict"),
        (spaces.Box(-1, 1, (0,)), "at least one number"),
        (spaces.Box(0, 10, (2,), np.uint8), "floating-point.*uint8"),
        (spaces.Box(-np.inf, np.inf, (2,)), "finite bounds.*inf.*RescaleAction"),
        (spaces.Box(-3.4e38, 3.4e38, (1,), F32), "finite bounds"),
        (spaces.Box(np.array([-1, 1], F32), np.array([1, 1], F32)), "low < high"),
    ],
    ids=str,
)
def test_actions_that_are_refused(space: spaces.Space, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        check_action_space(space)


AROUND: dict[str, tuple[Callable[[], VecEnv], str]] = {
    "stack": (lambda: VecFrameStack(VecNormalize(vec(VECTOR)), 2), "VecFrameStack"),
    "stack of nothing normalised": (lambda: VecFrameStack(VecNormalize(vec(VECTOR), norm_obs=False), 2), "VecFrameStack"),
    "stack of a Dict": (lambda: VecFrameStack(VecNormalize(vec(spaces.Dict({"v": VECTOR}))), 2), "VecFrameStack"),
    "part": (lambda: VecExtractDictObs(VecNormalize(vec(MIXED)), "vector"), "VecExtractDictObs"),
    "images": (lambda: VecTransposeImage(VecNormalize(vec(CHANNELS_LAST), norm_obs=False)), "VecTransposeImage"),
    "Dict": (lambda: VecTransposeImage(VecNormalize(vec(MIXED), norm_obs_keys=["vector"])), "VecTransposeImage"),
    "monitored": (lambda: VecMonitor(VecFrameStack(VecNormalize(vec(VECTOR)), 2)), "VecFrameStack"),
}


@pytest.mark.parametrize("name", AROUND)
def test_wrappers_around_vec_normalize(name: str) -> None:
    make_env, wrapper = AROUND[name]
    with pytest.raises(ValueError, match=rf"{wrapper} stands around VecNormalize.*VecNormalize\({wrapper}\(env"):
        check_spaces(make_env())
    with pytest.raises(ValueError, match="stands around VecNormalize"):
        SDAC("MlpPolicy", make_env())


def test_wrapper_of_ones_own_around_vec_normalize() -> None:
    env = VecMonitor(VecNormalize(vec(VECTOR)))
    check_spaces(env)
    env.observation_space = spaces.Box(-1, 1, (7,))
    with pytest.raises(ValueError, match=r"A wrapper stands around VecNormalize.*Put the wrapper inside"):
        check_spaces(env)


def test_discrete_in_vec_normalize() -> None:
    with pytest.raises(ValueError, match=r"VecNormalize has observations in Discrete\(3\).*FlattenObservation"):
        check_spaces(VecNormalize(vec(spaces.Discrete(3)), norm_obs=False))
    learns(VecNormalize(DummyVecEnv([lambda: w.FlattenObservation(Sampled(spaces.Discrete(3)))])))


def test_environment_that_sb3_converts_first() -> None:
    check_spaces("Pendulum-v1")
    check_spaces(object())


# Networks for images

FLOATS = spaces.Box(0, 1, (3, 36, 40), F32)


@pytest.mark.parametrize(
    "policy, space, env, words",
    [
        ("CnnPolicy", VECTOR, None, "NatureCNN, cannot take Box.*An image is.*MlpPolicy"),
        ("CnnPolicy", spaces.Box(0, 255, (36, 40), np.uint8), None, "ReshapeObservation"),
        ("CnnPolicy", FLOATS, None, "normalize_images=False"),
        ("CnnPolicy", spaces.Box(0, 255, (3, 8, 8), np.uint8), None, "at least 36x36.*ResizeObservation"),
        ("CnnPolicy", spaces.Box(0, 255, (40, 3, 36), np.uint8), None, "channels must be the first axis"),
        ("CnnPolicy", MIXED, None, "CnnPolicy is for a single image.*MultiInputPolicy"),
        (
            "CnnPolicy",
            None,
            lambda: VecNormalize(vec(CHANNELS_LAST)),
            r"VecNormalize makes floats.*VecTransposeImage.*norm_obs=F",
        ),
        ("MultiInputPolicy", VECTOR, None, "MultiInputPolicy is for Dict.*MlpPolicy"),
        ("MultiInputPolicy", spaces.Dict({"i": spaces.Box(0, 255, (3, 8, 8), np.uint8)}), None, "'i': Box.*at least 36x36"),
        ("MlpPolicy", MIXED, None, "MlpPolicy is not for Dict.*MultiInputPolicy"),
    ],
)
def test_observations_for_another_policy(policy: str, space: Any, env: Any, words: str) -> None:
    env = env() if env is not None else None
    space = space if env is None else env.observation_space
    policy_class: Any = SDAC.policy_aliases[policy]
    with pytest.raises(ValueError, match=words):
        check_extractor(policy_class.default_features_extractor_class, space, True, env)


class Own(FlattenExtractor):
    """Takes what it likes."""


@pytest.mark.parametrize(
    "extractor_class, space", [(FlattenExtractor, VECTOR), (FlattenExtractor, CHANNELS_FIRST), (Own, MIXED)]
)
def test_other_extractors_are_left_alone(extractor_class: type, space: spaces.Space) -> None:
    check_extractor(extractor_class, space, True, None)
