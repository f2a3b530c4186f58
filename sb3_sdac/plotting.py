"""
Look at a policy: its actions for one observation, the critics' values around them, and how denoising makes them.

Every function takes a model, trained or not, and one observation and returns a Matplotlib ``Figure``, to be saved with
``figure.savefig("actions.png")``; without pyplot, so no display is needed. :class:`PlotCallback` shows them in TensorBoard.
Actions are in the unit of the environment.

The observation is one as ``model.predict`` takes it, without a batch axis: what the policy sees. With ``VecNormalize`` that
is a normalised one, ``env.normalize_obs(obs)``.

Drawing leaves no trace in the model or its training: random states and training modes are put back. To draw the same
actions again, seed PyTorch before (``torch.manual_seed``).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure as LoggedFigure
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_sdac.arguments import is_count, require
from sb3_sdac.policies import DiffusionPolicy

require("matplotlib.axes", "plots", "sb3_sdac.plotting")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

Obs = np.ndarray | dict[str, np.ndarray]
#: Action dimensions that are drawn if none are named; a figure of all pairs of many would be too small to read
MAX_DIMS = 5
DETERMINISTIC = "deterministic action"


def plot_action_density(model: BaseAlgorithm, obs: Obs, n_samples: int = 1000, dims: Sequence[int] | None = None) -> Figure:
    """
    The policy's distribution of actions for one observation, with exploration noise: ``predict(obs, deterministic=False)``.

    One dimension gives a histogram, two a density in the plane, more those of all pairs beside each dimension's own.

    :param model: any model of SB3 with ``Box`` actions
    :param obs: one observation, as the policy sees it
    :param n_samples: actions to draw, at least 1
    :param dims: which dimensions of the flattened action to show; by default all, the first five if there are more
    :return: the figure, with a cross at the deterministic action
    :raises ValueError: for another action space, an observation that does not fit, or arguments out of range
    """
    if not is_count(n_samples):
        raise ValueError(f"n_samples must be an integer of at least 1, got {n_samples!r}")
    dims = _check_dims(model, dims)
    with _undisturbed(model):
        centre = _deterministic_action(model, obs)
        actions, _ = model.predict(_repeat(model, obs, n_samples), deterministic=False)
    actions = actions.reshape(n_samples, -1)
    low, high = _bounds(model)

    def draw_one(axes: Axes, i: int) -> None:
        axes.hist(actions[:, i], bins=50, range=(low[i], high[i]))
        axes.axvline(centre[i], color="black", linestyle=":", label=DETERMINISTIC)
        axes.set_xlim(low[i], high[i])

    def draw_two(axes: Axes, i: int, j: int) -> None:
        box = [[low[i], high[i]], [low[j], high[j]]]
        # Logarithmic, for a policy that is nearly sure fills few of the bins with most of its samples
        *_, mesh = axes.hist2d(actions[:, i], actions[:, j], bins=30, range=box, cmap="Blues", norm="log")
        axes.plot(centre[i], centre[j], "kx", clip_on=False, label=DETERMINISTIC)
        if len(dims) == 2:
            axes.figure.colorbar(mesh, ax=axes, label="samples per bin")

    title = f"{n_samples:,} actions for one observation\n(the axes end at the limits of the action)"
    return _corner(dims, draw_one, draw_two, "samples per bin", title)


def plot_q_landscape(model: BaseAlgorithm, obs: Obs, dims: Sequence[int] | None = None, resolution: int = 41) -> Figure:
    """
    The critics' values over the action box, in the slice through the deterministic action.

    Of SDAC its Q, as ``pessimism`` makes it, of the others the least of their critics, of which TQC's are the means of their
    quantiles. In the critics' unit: with SDAC that of the scaled rewards, as ``train/q_value`` is logged.

    :param model: one with critics of observation and action: SDAC, and SB3's SAC, TD3, DDPG, TQC, CrossQ
    :param obs: one observation, as the policy sees it
    :param dims: as for :func:`plot_action_density`: one dimension gives a curve, two a plane, more all pairs
    :param resolution: points per dimension, at least 2
    :return: the figure, with a cross at the deterministic action
    :raises ValueError: for a model without such critics, an observation that does not fit, or arguments out of range
    """
    if not (is_count(resolution) and resolution >= 2):
        raise ValueError(f"resolution must be an integer of at least 2, got {resolution!r}")
    dims = _check_dims(model, dims)
    critic = getattr(model.policy, "critic", None)
    if critic is None:
        raise ValueError(
            f"{type(model).__name__} has no critics of observation and action; a landscape of Q can be drawn for SDAC, SAC, "
            "TD3, DDPG, TQC and CrossQ"
        )
    low, high = _bounds(model)
    grid = np.linspace(-1, 1, resolution, dtype=np.float32)
    with _undisturbed(model):
        centre = _deterministic_action(model, obs)
    scaled_centre = 2 * (centre - low) / (high - low) - 1

    def values(*slice_dims: int) -> np.ndarray:
        points = np.stack(np.meshgrid(*[grid] * len(slice_dims), indexing="ij"), axis=-1).reshape(-1, len(slice_dims))
        actions = np.tile(scaled_centre.astype(np.float32), (len(points), 1))  # (M, A)
        actions[:, slice_dims] = points
        with _undisturbed(model):
            tensor, _ = model.policy.obs_to_tensor(_repeat(model, obs, len(points)))
            return _q(model, critic, tensor, th.as_tensor(actions, device=model.device))

    def draw_one(axes: Axes, i: int) -> None:
        axes.plot(low[i] + (grid + 1) / 2 * (high[i] - low[i]), values(i))
        axes.axvline(centre[i], color="black", linestyle=":", label=DETERMINISTIC)
        axes.set_xlim(low[i], high[i])

    def draw_two(axes: Axes, i: int, j: int) -> None:
        x, y = (low[k] + (grid + 1) / 2 * (high[k] - low[k]) for k in (i, j))
        mesh = axes.pcolormesh(x, y, values(i, j).reshape(resolution, resolution).T, shading="gouraud", cmap="viridis")
        axes.plot(centre[i], centre[j], "kx", clip_on=False, label=DETERMINISTIC)
        axes.figure.colorbar(mesh, ax=axes, label="Q" if len(dims) == 2 else "")

    unit = "scaled rewards" if isinstance(model.policy, DiffusionPolicy) else "rewards"
    title = f"Q around the deterministic action, in {unit}\n(the axes end at the limits of the action)"
    return _corner(dims, draw_one, draw_two, "Q", title)


def plot_denoising(model: BaseAlgorithm, obs: Obs, dims: Sequence[int] = (0, 1), n_particles: int = 100) -> Figure:
    """
    The paths of particles from noise (x_T, grey) to actions (x_0, coloured by where they end on the first dimension).

    Without the critics' choice among particles and without exploration noise. A single dimension is drawn over the steps.

    :param model: SDAC, or another model whose policy is a :class:`~sb3_sdac.DiffusionPolicy`
    :param obs: one observation, as the policy sees it
    :param dims: one or two dimensions of the flattened action
    :param n_particles: particles to draw, at least 1
    :return: the figure
    :raises ValueError: for a model without diffusion, an observation that does not fit, or arguments out of range
    """
    if not isinstance(model.policy, DiffusionPolicy):
        raise ValueError(
            f"{type(model).__name__} does not denoise; plot_denoising needs a model with a diffusion policy: SDAC"
        )
    if not is_count(n_particles):
        raise ValueError(f"n_particles must be an integer of at least 1, got {n_particles!r}")
    low, high = _bounds(model)
    dims = _check_dims(model, dims[:1] if len(low) == 1 and tuple(dims) == (0, 1) else dims)
    if len(dims) > 2:
        raise ValueError(f"dims must be one or two dimensions of the action, got {list(dims)}")
    actor = model.policy.actor if model.policy.actor_target is None else model.policy.actor_target
    path: list[th.Tensor] = []  # x_T first
    hook = actor.noise_predictor.register_forward_pre_hook(lambda module, args: path.append(args[1]))
    try:
        with _undisturbed(model):
            tensor, _ = model.policy.obs_to_tensor(_repeat(model, obs, 1))
            path.append(actor.sample(actor.encode(tensor), *actor.sampler.draw_noise(1, n_particles)))
    finally:
        hook.remove()
    # (S + 1) times (1, N, A) -> (S + 1, N, A)
    points = low + (th.cat(path).cpu().numpy() + 1) / 2 * (high - low)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    x = points[:, :, dims[0]] if len(dims) == 2 else np.tile(np.arange(len(points))[:, None], (1, n_particles))
    y = points[:, :, dims[-1]]
    axes.plot(x, y, color="grey", linewidth=0.5, alpha=0.5)
    axes.scatter(x[0], y[0], s=8, color="grey", label="$x_T$, noise")
    axes.scatter(x[-1], y[-1], s=14, c=points[-1, :, dims[0]], cmap="turbo", zorder=3, label=f"$x_0$, by action {dims[0]}")
    corner, size = low[dims], (high - low)[dims]
    if len(dims) == 1:
        corner, size = np.array([0, corner[0]]), np.array([len(points) - 1, size[0]])
    box = Rectangle(tuple(corner), *size, fill=False, edgecolor="tab:red", linestyle="--", label="limits of the action")
    axes.add_patch(box)
    axes.set(xlabel=f"action {dims[0]}" if len(dims) == 2 else "denoising step", ylabel=f"action {dims[-1]}")
    axes.set_title(f"{n_particles} particles for one observation, {len(points) - 1} denoising steps", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


class PlotCallback(BaseCallback):
    """
    Shows figures of one observation in TensorBoard, under ``plots/``: at the start, and every ``plot_freq`` environment steps.

    :param obs: one observation, as the policy sees it
    :param plot_freq: environment steps, summed over all environments, from one drawing to the next; at least 1
    :param plots: functions of model and observation that return a figure; for SAC or TQC leave out ``plot_denoising``
    :raises ModuleNotFoundError: without TensorBoard
    """

    def __init__(
        self,
        obs: Obs,
        plot_freq: int,
        plots: Sequence[Callable[[Any, Any], Figure]] = (plot_action_density, plot_q_landscape, plot_denoising),
    ):
        super().__init__()
        require("tensorboard", "plots", "PlotCallback")
        if not is_count(plot_freq):
            raise ValueError(f"plot_freq must be an integer of at least 1, got {plot_freq!r}")
        self.obs = obs
        self.plot_freq = plot_freq
        self.plots = plots
        self._plotted_at = 0

    def _on_training_start(self) -> None:  # so that what does not fit shows at once
        self._plot()

    def _on_step(self) -> bool:
        if self.num_timesteps - self._plotted_at >= self.plot_freq:
            self._plot()
        return True

    def _plot(self) -> None:
        self._plotted_at = self.num_timesteps
        names: list[str] = []
        for plot in self.plots:
            function = plot.func if isinstance(plot, functools.partial) else plot
            names.append(function.__name__.removeprefix("plot_"))
            number = f"_{names.count(names[-1])}" if names.count(names[-1]) > 1 else ""
            figure = LoggedFigure(plot(self.model, self.obs), close=False)  # pyplot does not know it
            self.logger.record(f"plots/{names[-1]}{number}", figure, exclude=("stdout", "log", "json", "csv"))
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)


@contextmanager
def _undisturbed(model: BaseAlgorithm) -> Iterator[None]:
    """Evaluation mode without gradients; random states and every module's mode are put back afterwards."""
    modes = [(module, module.training) for module in model.policy.modules()]
    with th.random.fork_rng([model.device] if model.device.type == "cuda" else []), th.no_grad():
        model.policy.set_training_mode(False)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _bounds(model: BaseAlgorithm) -> tuple[np.ndarray, np.ndarray]:
    """:return: the bounds of the flattened action, shape (A,) each"""
    if not isinstance(model.action_space, spaces.Box):
        raise ValueError(f"Actions can be drawn if their space is a Box, got {model.action_space}")
    return model.action_space.low.astype(float).flatten(), model.action_space.high.astype(float).flatten()


def _check_dims(model: BaseAlgorithm, dims: Sequence[int] | None) -> list[int]:
    action_dim = len(_bounds(model)[0])
    if dims is None:
        return list(range(min(action_dim, MAX_DIMS)))
    valid = all(isinstance(dim, (int, np.integer)) and 0 <= dim < action_dim for dim in dims)
    if not valid or len(dims) == 0 or len(set(dims)) < len(dims):
        raise ValueError(f"dims must be different integers between 0 and {action_dim - 1}, at least one, got {list(dims)}")
    return [int(dim) for dim in dims]


def _repeat(model: BaseAlgorithm, obs: Obs, n: int) -> Obs:
    """
    :param obs: one observation
    :param n: how often
    :return: a batch of n times the same, shape (n, ...)
    """
    space = model.observation_space
    keys, given_keys = (set(of) if isinstance(of, (dict, spaces.Dict)) else None for of in (space, obs))
    if keys != given_keys:
        given = type(obs).__name__ if given_keys is None else f"dict of {sorted(given_keys)}"
        raise ValueError(f"obs must be one observation of {space}, got a {given}")
    _, is_batch = model.policy.obs_to_tensor(obs)  # raises ValueError if the shape is no observation's
    if is_batch:
        raise ValueError(f"obs must be one observation of {space}, without a batch axis; pass obs[0] of a VecEnv's")
    if isinstance(obs, dict):
        return {key: np.repeat(np.asarray(value)[None], n, axis=0) for key, value in obs.items()}
    return np.repeat(np.asarray(obs)[None], n, axis=0)


def _deterministic_action(model: BaseAlgorithm, obs: Obs) -> np.ndarray:
    """:return: flattened, in the unit of the environment, shape (A,)"""
    action, _ = model.predict(_repeat(model, obs, 1), deterministic=True)
    return action.flatten()


def _q(model: BaseAlgorithm, critic: th.nn.Module, obs: PyTorchObs, actions: th.Tensor) -> np.ndarray:
    """
    :param model: whose critic
    :param critic: SB3's interface: a tuple of one value per critic, or TQC's quantiles, shape (M, C, quantiles)
    :param obs: M observations
    :param actions: actions in [-1, 1], shape (M, A)
    :return: shape (M,)
    """
    values = critic(obs, actions)
    if isinstance(values, th.Tensor):
        values = values.mean(dim=2).unbind(dim=1)  # (M, C, quantiles) -> C times (M,)
    stacked = th.stack([value.flatten() for value in values])  # (C, M)
    q_values = model.policy.pessimistic(stacked) if isinstance(model.policy, DiffusionPolicy) else stacked.amin(dim=0)
    return q_values.detach().cpu().numpy()


def _corner(
    dims: list[int], draw_one: Callable[[Axes, int], None], draw_two: Callable[[Axes, int, int], None], label: str, title: str
) -> Figure:
    """
    One dimension, a plane, or all pairs below a diagonal of single dimensions.

    :param dims: dimensions of the action
    :param draw_one: draws a dimension
    :param draw_two: draws a pair, the first along x
    :param label: what ``draw_one`` has along y
    :param title: of the figure
    :return: the figure
    """
    size = 4.0 if len(dims) <= 2 else 2.2 * len(dims)
    figure = Figure(figsize=(size * 1.2, size), layout="constrained")
    figure.suptitle(title, fontsize=10)
    if len(dims) == 2:
        axes = figure.subplots()
        draw_two(axes, *dims)
        axes.set(xlabel=f"action {dims[0]}", ylabel=f"action {dims[1]}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
        return figure
    grid = figure.subplots(len(dims), len(dims), squeeze=False)
    for row, j in enumerate(dims):
        for column, i in enumerate(dims):
            axes = grid[row, column]
            if column > row:
                axes.set_axis_off()
                continue
            if column == row:
                draw_one(axes, i)
                axes.set_ylabel(label)
            else:
                draw_two(axes, i, j)
                axes.set_ylabel(f"action {j}")
            axes.set_xlabel(f"action {i}")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    return figure
