"""Figures hold what the model says, for every kind of action and critic, and drawing them changes nothing."""

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.models import make_model
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from sb3_sdac import SDAC, plotting
from sb3_sdac.plotting import PlotCallback, plot_action_density, plot_denoising, plot_q_landscape

OBS = np.array([0.3, -0.2], dtype=np.float32)
ALL_PLOTS: list[Callable[..., Figure]] = [plot_action_density, plot_q_landscape, plot_denoising]


def small() -> dict[str, Any]:
    """Anew each time, since SAC changes the policy_kwargs that it is given."""
    return {"policy_kwargs": {"net_arch": [16]}, "seed": 0, "device": "cpu"}


class BoxEnv(gym.Env):
    """Rewards actions in the middle of an asymmetric box."""

    observation_space: Any

    def __init__(self, action_dim: int = 2) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,))
        low, high = np.full(action_dim, -1.0, np.float32), np.arange(1, action_dim + 1, dtype=np.float32)
        self.action_space = spaces.Box(low, high)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return OBS, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return OBS * action[0], -float(np.abs(action).sum()), False, self.steps == 10, {}


def trained(algorithm: Any = SDAC, action_dim: int = 2, steps: int = 60) -> Any:
    return algorithm("MlpPolicy", BoxEnv(action_dim), learning_starts=20, batch_size=16, **small()).learn(steps)


# Any: Matplotlib's own types are too wide to calculate with
def image(figure: Figure) -> Any:
    [mesh] = [child for child in figure.axes[0].get_children() if isinstance(child, QuadMesh)]
    return mesh


def lines(figure: Figure) -> list[Any]:
    return [line.get_xydata() for line in figure.axes[0].lines]


def test_density_of_one_dimension_counts_every_sample() -> None:
    model = trained(action_dim=1)
    th.manual_seed(5)
    actions, _ = model.predict(np.tile(OBS, (200, 1)))
    th.manual_seed(5)
    figure = plot_action_density(model, OBS, n_samples=200)
    counts, _ = np.histogram(actions, bins=50, range=(-1, 1))
    bars: list[Any] = list(figure.axes[0].patches)
    assert [bar.get_height() for bar in bars] == counts.tolist()
    np.testing.assert_allclose(lines(figure)[0][0, 0], model.predict(OBS, deterministic=True)[0].item())


@pytest.mark.parametrize("dims", [(0, 1), (1, 0)])
def test_density_of_two_dimensions_counts_every_sample(dims: tuple[int, int]) -> None:
    model = trained()
    th.manual_seed(5)
    actions, _ = model.predict(np.tile(OBS, (200, 1)))
    th.manual_seed(5)
    figure = plot_action_density(model, OBS, n_samples=200, dims=dims)
    box = [[-1, 1], [-1, 2]]
    x, y = actions[:, dims].T
    counts, _, _ = np.histogram2d(x, y, bins=30, range=[box[dim] for dim in dims])
    np.testing.assert_array_equal(np.ma.filled(image(figure).get_array().reshape(30, 30), 0), counts.T)
    assert [figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()] == [f"action {dim}" for dim in dims]


@pytest.mark.parametrize("action_dim, dims, shown", [(3, None, 3), (7, None, 5), (7, (6, 0, 2), 3)])
def test_many_dimensions_are_drawn_in_pairs(action_dim: int, dims: tuple[int, ...] | None, shown: int) -> None:
    model = trained(action_dim=action_dim, steps=0)
    for figure in plot_action_density(model, OBS, 10, dims), plot_q_landscape(model, OBS, dims, resolution=3):
        labels = {axes.get_xlabel() for axes in figure.axes if axes.axison} - {""}  # colour bars have none
        assert labels == {f"action {dim}" for dim in dims or range(shown)}
        drawn = [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]
        assert len(drawn) == shown * (shown + 1) / 2


@pytest.mark.parametrize("algorithm", [SDAC, SAC, TQC, TD3, CrossQ])
def test_landscape_is_what_the_algorithm_takes_for_q(algorithm: Any) -> None:
    model = trained(algorithm)
    figure = plot_q_landscape(model, OBS, resolution=5)
    model.policy.set_training_mode(False)
    for column, x in enumerate(np.linspace(-1, 1, 5)):
        for row, y in enumerate(np.linspace(-1, 1, 5)):
            q_values = model.critic(th.tensor(OBS[None]), th.tensor([[x, y]], dtype=th.float32))
            if algorithm is TQC:
                expected = q_values.mean(dim=2).min().item()
            elif algorithm is SDAC:
                first, second = (value.item() for value in q_values)
                assert model.policy.pessimism == "auto" and model.policy.seen_terminal == 0
                expected = (first + second) / 2
            else:
                expected = min(value.item() for value in q_values)
            values = image(figure).get_array().reshape(5, 5)
            np.testing.assert_allclose(values[row, column], expected, rtol=1e-4, atol=1e-6)
    coordinates = image(figure).get_coordinates()
    np.testing.assert_allclose([coordinates.min(axis=(0, 1)), coordinates.max(axis=(0, 1))], [[-1, -1], [1, 2]])


def test_landscape_is_a_slice_through_the_deterministic_action() -> None:
    model = trained(action_dim=3)
    action, _ = model.predict(OBS, deterministic=True)
    scaled = th.tensor(model.policy.scale_action(action)[None])
    scaled[0, 1] = 0.0
    model.policy.set_training_mode(False)
    expected = model.policy.pessimistic(th.cat(model.critic(th.tensor(OBS[None]), scaled))).item()
    curve, at = lines(plot_q_landscape(model, OBS, dims=[1], resolution=3))
    np.testing.assert_allclose(curve[:, 0], [-1, 0.5, 2])
    np.testing.assert_allclose(curve[1, 1], expected, rtol=1e-5)
    np.testing.assert_allclose(at[0, 0], action[1])


@pytest.mark.parametrize("average_actor", [False, True])
def test_denoising_ends_at_the_actor_samples(average_actor: bool) -> None:
    model: Any = make_model(BoxEnv(), policy_kwargs={"average_actor": average_actor}).learn(30)
    actor = model.policy.actor_target if average_actor else model.policy.actor
    assert actor is not None
    th.manual_seed(5)
    with th.no_grad():
        x_T, _ = actor.sampler.draw_noise(1, 7)
        x_0 = actor.sample(actor.encode(th.tensor(OBS[None])), x_T, None)
    th.manual_seed(5)
    figure = plot_denoising(model, OBS, n_particles=7)
    start, end = (child for child in figure.axes[0].get_children() if isinstance(child, PathCollection))
    for drawn, points in (start, x_T), (end, x_0):
        expected: Any = points[0].numpy() * [1, 1.5] + [0, 0.5]
        np.testing.assert_allclose(np.asarray(drawn.get_offsets()), expected, rtol=1e-5, atol=1e-6)
    assert [len(path) for path in lines(figure)] == 7 * [model.policy.n_sampling_steps + 1]
    assert not actor.noise_predictor._forward_pre_hooks


def test_denoising_of_one_dimension_is_drawn_over_the_steps() -> None:
    figure = plot_denoising(trained(action_dim=1), OBS, n_particles=2)
    assert figure.axes[0].get_xlabel() == "denoising step"
    assert lines(figure)[0][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("training", [False, True])
def test_drawing_leaves_no_trace(training: bool) -> None:
    model = trained()
    model.policy.set_training_mode(training)
    model.critic.q_networks.train(not training)  # a mode of its own
    modes = [module.training for module in model.policy.modules()]
    state = {name: value.clone() for name, value in model.policy.state_dict().items()}
    th_state, np_state = th.get_rng_state(), str(np.random.get_state(legacy=False))
    for plot in ALL_PLOTS:
        plot(model, OBS)
    assert modes == [module.training for module in model.policy.modules()]
    assert all(th.equal(value, state[name]) for name, value in model.policy.state_dict().items())
    assert th.equal(th.get_rng_state(), th_state)
    assert str(np.random.get_state(legacy=False)) == np_state


@pytest.mark.slow
def test_callback_logs_to_tensorboard_and_training_is_the_same(tmp_path: Path) -> None:
    def run(**kwargs: Any) -> Any:
        return SDAC("MlpPolicy", BoxEnv(), learning_starts=20, batch_size=16, tensorboard_log=str(tmp_path), **small()).learn(
            95, **kwargs
        )

    plain, watched = run(), run(callback=PlotCallback(OBS, plot_freq=40))
    for name, value in plain.policy.state_dict().items():
        assert th.equal(value, watched.policy.state_dict()[name]), name
    events = EventAccumulator(str(tmp_path / "SDAC_2"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"plots/action_density", "plots/q_landscape", "plots/denoising"}
    for tag in events.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == [0, 40, 80]
        assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in events.Images(tag))


def test_callback_says_at_once_what_a_model_cannot_show() -> None:
    model = SAC("MlpPolicy", BoxEnv(), **small())
    with pytest.raises(ValueError, match="SAC does not denoise"):
        model.learn(5, callback=PlotCallback(OBS, plot_freq=100))
    assert model.num_timesteps == 0
    callback = PlotCallback(OBS, plot_freq=3, plots=[plot_action_density, plot_q_landscape])
    model.learn(5, callback=callback)
    assert callback._plotted_at == 3


def test_callback_names_each_plot(tmp_path: Path) -> None:
    """Also a function with arguments of ours, and one that comes twice."""
    chosen = [functools.partial(plot_q_landscape, dims=(i,)) for i in (0, 1)]
    model = SDAC("MlpPolicy", BoxEnv(), **small())
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    model.learn(3, callback=PlotCallback(OBS, plot_freq=100, plots=[plot_action_density, *chosen]))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["images"]) == {"plots/action_density", "plots/q_landscape", "plots/q_landscape_2"}


def test_observation_is_what_the_policy_sees() -> None:
    """With VecNormalize, as for ``predict``, the normalised one."""
    model = SDAC("MlpPolicy", VecNormalize(DummyVecEnv([BoxEnv])), learning_starts=20, **small()).learn(40)
    env = model.get_vec_normalize_env()
    assert env is not None
    obs = env.normalize_obs(OBS)
    assert isinstance(obs, np.ndarray)
    action, _ = model.predict(obs, deterministic=True)
    np.testing.assert_allclose(lines(plot_action_density(model, obs, 10))[0][0], action, rtol=1e-5)


class DictEnv(BoxEnv):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_dict_observations(plot: Callable[..., Figure]) -> None:
    model = SDAC("MultiInputPolicy", DictEnv(), **small())
    assert plot(model, {"a": OBS, "b": np.array(1)}).axes
    with pytest.raises(ValueError, match=r"got a dict of \['a'\]"):
        plot(model, {"a": OBS})
    with pytest.raises(ValueError, match="got a ndarray"):
        plot(model, OBS)


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_discrete_observations(plot: Callable[..., Figure]) -> None:
    env = BoxEnv()
    env.observation_space = spaces.Discrete(4)
    assert plot(SDAC("MlpPolicy", env, **small()), np.array(2)).axes


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_observations_that_do_not_fit(plot: Callable[..., Figure]) -> None:
    model = SDAC("MlpPolicy", BoxEnv(), **small())
    with pytest.raises(ValueError, match="shape"):
        plot(model, np.zeros(3))
    with pytest.raises(ValueError, match="without a batch axis"):
        plot(model, np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="got a dict"):
        plot(model, {"a": OBS})


@pytest.mark.parametrize(
    "plot, kwargs, message",
    [
        (plot_action_density, {"n_samples": 0}, "n_samples must be an integer of at least 1, got 0"),
        (plot_action_density, {"dims": [2]}, r"dims must be different integers between 0 and 1, at least one, got \[2\]"),
        (plot_action_density, {"dims": []}, "dims"),
        (plot_q_landscape, {"dims": (0, 0)}, "dims"),
        (plot_q_landscape, {"dims": (-1, 0)}, "dims"),
        (plot_q_landscape, {"dims": (0.5,)}, "dims"),
        (plot_q_landscape, {"resolution": 1}, "resolution must be an integer of at least 2, got 1"),
        (plot_denoising, {"dims": (0, 5)}, "dims"),
        (plot_denoising, {"n_particles": 0}, "n_particles must be an integer of at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(plot: Callable[..., Figure], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot(SDAC("MlpPolicy", BoxEnv(), **small()), OBS, **kwargs)


def test_denoising_has_one_or_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"one or two dimensions of the action, got \[0, 1, 2\]"):
        plot_denoising(trained(action_dim=3, steps=0), OBS, dims=(0, 1, 2))


def test_models_that_have_not_what_is_drawn() -> None:
    ppo = PPO("MlpPolicy", BoxEnv(), **small())
    assert plot_action_density(ppo, OBS).axes
    with pytest.raises(ValueError, match="PPO has no critics of observation and action"):
        plot_q_landscape(ppo, OBS)
    discrete: BaseAlgorithm = PPO("MlpPolicy", IdentityEnv(2), **small())
    with pytest.raises(ValueError, match=r"Actions can be drawn if their space is a Box, got Discrete\(2\)"):
        plot_action_density(discrete, OBS)


def test_plot_freq_is_checked() -> None:
    with pytest.raises(ValueError, match="plot_freq must be an integer of at least 1, got 0"):
        PlotCallback(OBS, 0)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sb3_sdac\[plots\]"'):
        importlib.reload(plotting)


def test_callback_without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r'PlotCallback needs tensorboard, .*pip install "sb3_sdac\[plots\]"'):
        PlotCallback(OBS, 10)
