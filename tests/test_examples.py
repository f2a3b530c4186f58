"""The examples' functions do what their pictures and tables claim, on fewer steps."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env
from helpers.models import TINY_POLICY, make_model
from stable_baselines3 import SAC

from sb3_sdac import SDAC

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import film_strip
import multigoal
import toy_2d
from multigoal import GOALS, MultiGoalEnv


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("clipped normal (paper)", marks=pytest.mark.slow),
        "truncated normal",
        pytest.param("truncated normal + gradient", marks=pytest.mark.slow),
    ],
)
def test_toy_learns_the_density(method: str) -> None:
    density = toy_2d.DENSITIES["two modes, 0.8 and 0.2"]
    th.manual_seed(1)
    truth = density.sample(2000)
    untrained = toy_2d.run(density, method, n_updates=0, n_samples=2000)
    trained = toy_2d.run(density, method, n_updates=300, n_samples=2000)
    assert toy_2d.sliced_wasserstein(trained, truth) < 0.25 * toy_2d.sliced_wasserstein(untrained, truth)
    assert abs(density.shares(trained)[0].item() - 0.8) < 0.15  # half and half when not trained


def test_toy_distance() -> None:
    """Of a shift: the mean over directions of its projection, 2 / pi of its length; of reordered samples none."""
    x = th.randn(50, 2)
    assert toy_2d.sliced_wasserstein(x, x.flip(0)) == 0
    assert toy_2d.sliced_wasserstein(x, x + th.tensor([3.0, 0.0])) == pytest.approx(6 / np.pi, rel=1e-3)


def test_toy_draws_its_picture(tmp_path: Path) -> None:
    samples = {name: {"truth": density.sample(100)} for name, density in toy_2d.DENSITIES.items()}
    assert all(th.isfinite(density.log_density(samples[name]["truth"])).all() for name, density in toy_2d.DENSITIES.items())
    toy_2d.draw_picture(samples, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_multigoal_is_an_environment() -> None:
    check_env(MultiGoalEnv(), skip_render_check=True)


@pytest.mark.parametrize("goal", range(4))
def test_goals_end_episodes(goal: int) -> None:
    env = MultiGoalEnv(action_cost=2.0)
    env.reset(seed=0)
    env.position = np.zeros(2)
    direction = GOALS[goal] / 5
    for steps in range(1, 5):
        _, reward, terminated, truncated, info = env.step(direction)
        assert not terminated and not truncated
        assert reward == pytest.approx(-(5 - steps) - 2)
        assert info == {}
    _, reward, terminated, _, info = env.step(0.5 * direction)
    assert terminated and info == {"goal": goal}
    assert reward == pytest.approx(10 - 0.5 - 0.5)


def test_episodes_end_after_30_steps() -> None:
    env = MultiGoalEnv()
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(30)]
    assert ends == [(False, False)] * 29 + [(False, True)]


def test_table_counts_goals() -> None:
    goals = [0] * 90 + [1] * 2 + [2] * 1 + [None] * 7
    row = multigoal.make_row("SDAC", 3, goals, -12.34)
    assert row == {
        "algorithm": "SDAC",
        "seed": 3,
        "goals_covered": 2,  # a single episode of a hundred is not 2 %
        "east": 90,
        "west": 2,
        "north": 1,
        "south": 0,
        "no_goal": 7,
        "mean_return": -12.3,
    }


def test_rollouts_and_picture(tmp_path: Path) -> None:
    model = SAC("MlpPolicy", MultiGoalEnv(), policy_kwargs={"net_arch": [8]}, seed=0, device="cpu")
    paths, goals, mean_return = multigoal.rollouts(model, n_episodes=3)
    again = multigoal.rollouts(model, n_episodes=3)
    assert all(np.array_equal(*pair) for pair in zip(paths, again[0], strict=True)) and mean_return == again[2]
    assert len(goals) == 3 and not np.array_equal(paths[0][0], paths[1][0])
    multigoal.draw_picture({"SAC": paths}, {"SAC": paths[0]}, tmp_path / "multigoal.png")
    assert (tmp_path / "multigoal.png").read_bytes().startswith(b"\x89PNG")


def test_compared_models_have_the_same_networks_and_horizon() -> None:
    models = multigoal.make_models(seed=0, learning_starts=10)
    shared = [
        (model.gamma, str(model.learning_rate), model.learning_starts, model.batch_size, model.policy_kwargs["activation_fn"])
        for model in models.values()
    ]
    assert len(set(shared)) == 1 and all(model.policy.net_arch == [64, 64] for model in models.values())
    for model in models.values():
        model.learn(12)
        assert model._n_updates == 2


def test_film_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pictures as asked for, with the return up to each; the last one is the episode's."""
    make_model(policy_kwargs=TINY_POLICY).save(tmp_path / "model.zip")
    frames, returns = film_strip.film(SDAC.load(tmp_path / "model.zip"), "Pendulum-v1", seed=1)
    assert len(frames) == len(returns) == 201 and returns[0] == 0 and (np.diff(returns) <= 0).all()
    assert frames[0].shape == (500, 500, 3) and any((frame != frames[0]).any() for frame in frames)
    titles = [axes.get_title() for axes in film_strip.draw(frames, returns, n_pictures=3, n_steps=10**9).axes]
    assert titles == [f"step {step}\nreturn {returns[step]:.0f}" for step in (0, 100, 200)]
    arguments = [str(tmp_path / "model.zip"), "Pendulum-v1", "--picture", str(tmp_path / "strip.png"), "--steps", "9"]
    monkeypatch.setattr(sys, "argv", ["film_strip.py", *arguments])
    film_strip.main()
    assert (tmp_path / "strip.png").read_bytes().startswith(b"\x89PNG")
