"""Action noise that was made for another number of environments, as SB3's `learn` leaves it in a model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise

from sb3_sdac import SDAC
from sb3_sdac.action_noise import fit_action_noise

BOX = spaces.Box(-1, 1, (2,), np.float32)


def normal(sigma: float = 0.1, size: int = 2) -> NormalActionNoise:
    return NormalActionNoise(np.zeros(size), np.full(size, sigma))


class Labelled(VectorizedActionNoise):
    """With a constructor of its own."""

    def __init__(self, label: str) -> None:
        super().__init__(normal(), 3)
        self.label = label


@pytest.mark.parametrize("noise", [None, normal(), OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2))], ids=repr)
@pytest.mark.parametrize("n_envs", [1, 4])
def test_single_noise_is_left_to_sb3(noise: ActionNoise | None, n_envs: int) -> None:
    assert fit_action_noise(noise, n_envs, BOX) is noise


@pytest.mark.parametrize("base", [normal(), OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2))], ids=repr)
@pytest.mark.parametrize("before", [1, 3, 5])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_other_number(base: ActionNoise, before: int, after: int) -> None:
    noise = VectorizedActionNoise(base, before)
    fitted: Any = fit_action_noise(noise, after, BOX)
    assert fitted().shape == (after, 2)
    assert (fitted is noise) == (before == after)
    assert len({id(single) for single in fitted.noises}) == after
    assert len(noise.noises) == before  # as it was
    fitted.reset(indices=[after - 1])


def test_one_noise_per_environment() -> None:
    noise = VectorizedActionNoise(normal(), 3)
    noise.noises = [normal(sigma) for sigma in (0.1, 0.2, 0.3)]
    for n_envs, sigmas in ((1, [0.1]), (2, [0.1, 0.2]), (5, [0.1, 0.2, 0.3, 0.1, 0.2])):
        fitted: Any = fit_action_noise(noise, n_envs, BOX)
        assert [single._sigma[0] for single in fitted.noises] == sigmas


@pytest.mark.parametrize("n_envs", [1, 2, 3])
def test_nested(n_envs: int) -> None:
    nested = VectorizedActionNoise(VectorizedActionNoise(VectorizedActionNoise(normal(), 4), 3), 2)
    fitted: Any = fit_action_noise(nested, n_envs, BOX)
    assert fitted().shape == (n_envs, 2)
    assert isinstance(fitted.base_noise, NormalActionNoise)


def test_subclass() -> None:
    fitted: Any = fit_action_noise(Labelled("mine"), 5, BOX)
    assert type(fitted) is Labelled and fitted.label == "mine" and fitted().shape == (5, 2)


@pytest.mark.parametrize("size, space", [(3, BOX), (2, spaces.Box(-1, 1, (1,))), (2, spaces.Box(-1, 1, (2, 3)))], ids=str)
@pytest.mark.parametrize("n_envs", [None, 2])
def test_other_shape(size: int, space: spaces.Box, n_envs: int | None) -> None:
    noise = normal(size=size) if n_envs is None else VectorizedActionNoise(normal(size=size), n_envs)
    with pytest.raises(ValueError, match=rf"noise of shape \({size},\), but an action has the shape \({space.shape[0]},"):
        fit_action_noise(noise, 2, space)


def test_noise_that_is_broadcast() -> None:
    noise = normal(size=1)
    assert fit_action_noise(noise, 1, BOX) is noise
    assert fit_action_noise(noise, 1, spaces.Box(-1, 1, (2, 3))) is noise


def test_random_numbers_are_left_alone() -> None:
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    fit_action_noise(VectorizedActionNoise(normal(), 3), 2, BOX)
    assert np.random.random() == expected


@pytest.mark.parametrize("before, after", [(3, 5), (3, 1), (1, 3)])
def test_saved_with_another_number_of_environments(before: int, after: int, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"buffer_size": 200, "learning_starts": 10, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
    model = SDAC("MlpPolicy", make_vec_env("Pendulum-v1", before), action_noise=normal(size=1), **kwargs)
    model.learn(18).save(tmp_path / "model.zip")
    model = SDAC.load(tmp_path / "model.zip", env=make_vec_env("Pendulum-v1", after))
    model.action_noise = fit_action_noise(model.action_noise, after, model.action_space)  # type: ignore[arg-type]
    model.learn(15)
    assert model.action_noise is not None and np.shape(model.action_noise())[-1] == 1
