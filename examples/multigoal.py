"""
Four equally good goals: does the policy keep all of them?

The multi-goal environment of soft Q-learning (Haarnoja et al. 2017, arXiv 1702.08165, section 5.1): a point starts in the
middle of the plane, four goals lie around it. Trains SDAC and SAC, lets both act stochastically and counts where episodes end.

    python examples/multigoal.py
    python examples/multigoal.py --redraw --table benchmarks/results/multigoal.csv --picture docs/images/multigoal.png
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_sdac import SDAC

GOALS = np.array([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]])
GOAL_NAMES = ["east", "west", "north", "south"]
#: A goal counts as covered if this share of the episodes ends there
COVERED = 0.02


class MultiGoalEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A point whose velocity is the action; reward: minus the distance to the nearest goal, minus ``action_cost`` |action|^2.

    Start, bounds and the bonus of 10 within a distance of 1 of a goal, where an episode ends, are those of the published
    environment. Its action cost is 30: there the best speed is a third of what the box allows, and values settle far more
    slowly. With 3 a goal is four or five fast steps away.

    :param action_cost: factor on the squared length of the action
    """

    max_steps = 30

    def __init__(self, action_cost: float = 3.0) -> None:
        self.action_cost = action_cost
        self.observation_space = spaces.Box(-7, 7, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.position = np.zeros(2)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = 0.1 * self.np_random.standard_normal(2)
        self.steps = 0
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        action = np.clip(action, -1, 1)
        self.position = np.clip(self.position + action, -7, 7)
        self.steps += 1
        distances = np.linalg.norm(GOALS - self.position, axis=1)
        at_goal = bool(distances.min() < 1)
        reward = float(10 * at_goal - distances.min() - self.action_cost * np.square(action).sum())
        info = {"goal": int(distances.argmin())} if at_goal else {}
        return self.position.astype(np.float32), reward, at_goal, self.steps >= self.max_steps, info


def make_models(seed: int, learning_starts: int = 5000) -> dict[str, OffPolicyAlgorithm]:
    """
    :param seed: of all
    :param learning_starts: random steps before learning, which see all goals
    :return: what is compared, by name: the same networks, learning rate, horizon and random steps, one update per step
    """
    common: dict[str, Any] = {
        "learning_starts": learning_starts,
        "gamma": 0.9,
        # Falls to 0, for goals that are equally good lead in turn as long as the critics change
        "learning_rate": LinearSchedule(1.5e-3, 0, 1),
        "seed": seed,
        "device": "cpu",
    }
    net = {"net_arch": [64, 64], "activation_fn": nn.ReLU}
    # ent_coef: as large as the critics' errors, where "auto" sets one so low that the leading goal takes all. batch_norm:
    # target critics err less here. The rest: with what the learning rate was chosen
    sdac_kwargs: dict[str, Any] = {
        "n_reverse_samples": 16,
        "ent_coef": 2.0,
        "tau": 0.01,
        "reward_scale": 0.2,
        "n_steps": 1,
        "replay_recency": 1.0,
        "policy_kwargs": {**net, "batch_norm": False, "n_bins": 1, "beta_schedule": "linear"},
    }
    return {
        "SDAC": SDAC("MlpPolicy", MultiGoalEnv(), **sdac_kwargs, **common),
        "SAC": SAC("MlpPolicy", MultiGoalEnv(), policy_kwargs=dict(net), **common),
        "SAC, temperature 1": SAC("MlpPolicy", MultiGoalEnv(), ent_coef=1.0, policy_kwargs=dict(net), **common),
    }


def rollouts(
    model: OffPolicyAlgorithm, n_episodes: int = 100, seed: int = 0
) -> tuple[list[np.ndarray], list[int | None], float]:
    """
    Episodes of the stochastic policy.

    :param model: the model
    :param n_episodes: how many
    :param seed: of the starts and of the policy
    :return: the positions of each episode, shape (steps + 1, 2); the goal where it ended, if at any; the mean return
    """
    th.manual_seed(seed)
    env = MultiGoalEnv()
    paths, goals, returns = [], [], []
    for episode in range(n_episodes):
        obs, info = env.reset(seed=seed if episode == 0 else None)
        path, total, done = [obs], 0.0, False
        while not done:
            action, _ = model.predict(obs, deterministic=False)
            obs, reward, terminated, truncated, info = env.step(action)
            path.append(obs)
            total += reward
            done = terminated or truncated
        paths.append(np.array(path))
        goals.append(info.get("goal"))
        returns.append(total)
    return paths, goals, float(np.mean(returns))


def make_row(name: str, seed: int, goals: list[int | None], mean_return: float) -> dict[str, Any]:
    """
    :param name: of the algorithm
    :param seed: of its training
    :param goals: where each episode ended, see :func:`rollouts`
    :param mean_return: of the episodes
    :return: a row of the table
    """
    ends = {goal_name: goals.count(goal) for goal, goal_name in enumerate(GOAL_NAMES)}
    covered = sum(count >= COVERED * len(goals) for count in ends.values())
    return {
        "algorithm": name,
        "seed": seed,
        "goals_covered": covered,
        **ends,
        "no_goal": goals.count(None),
        "mean_return": round(mean_return, 1),
    }


def draw_picture(paths: dict[str, list[np.ndarray]], first_actions: dict[str, np.ndarray], path: Path) -> None:
    """
    :param paths: of every episode, by algorithm; coloured by the goal where it ended, over the distance to the nearest goal
    :param first_actions: actions at the origin, by algorithm, shape (n, 2)
    :param path: where to save the picture
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    colours = ["tab:blue", "tab:orange", "tab:green", "tab:purple", "black"]  # the last for no goal
    figure = Figure(figsize=(3.3 * len(paths) + 0.9, 7.6), layout="constrained")
    axes = figure.subplots(2, len(paths), squeeze=False)
    x, y = np.meshgrid(*2 * [np.linspace(-7, 7, 141)])
    distance = np.linalg.norm(GOALS[:, :, None, None] - [x, y], axis=1).min(axis=0)
    for (name, episodes), (upper, lower) in zip(paths.items(), axes.T, strict=True):
        shade = upper.contourf(x, y, distance, levels=12, cmap="Greys", alpha=0.5)
        for episode in episodes:
            ends = np.linalg.norm(GOALS - episode[-1], axis=1)
            upper.plot(*episode.T, linewidth=0.6, alpha=0.6, color=colours[ends.argmin() if ends.min() < 1 else -1])
        upper.plot(*GOALS.T, "r*", markersize=11)
        upper.set(title=f"{name}\n{len(episodes)} episodes from the origin", aspect="equal", xlabel="position x")
        upper.set(xticks=[-5, 0, 5], yticks=[-5, 0, 5], xlim=(-7, 7), ylim=(-7, 7))
        *_, density = lower.hist2d(*first_actions[name].T, bins=40, range=[[-1, 1]] * 2, cmap="magma", density=True, vmin=0)
        lower.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor="tab:red", linestyle="--", linewidth=1.5))
        lower.set(title=f"{len(first_actions[name]):,} actions at the origin", aspect="equal", xlabel="velocity x")
        lower.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1], xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        figure.colorbar(density, ax=lower, shrink=0.75, label="density" if lower is axes[1, -1] else "")
    axes[0, 0].set_ylabel("position y")
    axes[1, 0].set_ylabel("velocity y")
    figure.colorbar(shade, ax=list(axes[0]), shrink=0.75, label="distance to the nearest goal")
    handles = [Line2D([], [], color=colour) for colour in colours]
    handles += [Line2D([], [], color="red", marker="*", linestyle="", markersize=11)]
    handles += [Line2D([], [], color="tab:red", linestyle="--")]
    names = [*(f"ends {name}" for name in GOAL_NAMES), "ends at no goal", "goal", "limits of the action"]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=80)


def draw_goals(rows: list[dict[str, Any]], path: Path) -> None:
    """
    The environment, and for each algorithm and seed the share of the episodes that end at each goal.

    :param rows: of the table
    :param path: where to save the picture
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    colours = ["tab:blue", "tab:orange", "tab:green", "tab:purple"]
    figure = Figure(figsize=(4.4 + 2.6 * len(algorithms), 3.8), layout="constrained")
    plane, *axes = figure.subplots(1, 1 + len(algorithms), width_ratios=[1.7, *[1] * len(algorithms)])
    x, y = np.meshgrid(*2 * [np.linspace(-7, 7, 141)])
    distance = np.linalg.norm(GOALS[:, :, None, None] - [x, y], axis=1).min(axis=0)
    shade = plane.contourf(x, y, distance, levels=12, cmap="Greys", alpha=0.6)
    for goal, colour, goal_name in zip(GOALS, colours, GOAL_NAMES, strict=True):
        plane.plot(*goal, "*", color=colour, markersize=15)
        plane.annotate(goal_name, (goal[0], goal[1] + 0.8), ha="center")
    plane.plot(0, 0, "ko", markersize=5)
    plane.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor="tab:red", linestyle="--"))
    plane.annotate("start, and the limits\nof one step's action", (0, -1.2), ha="center", va="top", fontsize=8)
    plane.set(title="four goals, equally good", xlabel="position x", ylabel="position y", aspect="equal")
    figure.colorbar(shade, ax=plane, shrink=0.9, label="distance to the nearest goal")
    for axis, algorithm in zip(axes, algorithms, strict=True):
        own = [row for row in rows if row["algorithm"] == algorithm]
        seeds, below = [str(row["seed"]) for row in own], np.zeros(len(own))
        for key, colour in zip([*GOAL_NAMES, "no_goal"], [*colours, "lightgrey"], strict=True):
            share = np.array([float(row[key]) for row in own])
            axis.bar(seeds, share, bottom=below, color=colour, label=key.replace("_", " "))
            below += share
        mean_return = np.mean([float(row["mean_return"]) for row in own])
        axis.set(title=f"{algorithm}\nmean return {mean_return:.1f}, {len(own)} seeds", xlabel="seed", ylim=(0, 100))
    axes[0].set_ylabel("episodes of 100 that end at each goal")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description="SDAC and SAC between four equal goals.")
    parser.add_argument("--seeds", type=int, default=5, help="train with seeds 0 to this minus 1")
    parser.add_argument("--timesteps", type=int, default=10_000, help="environment steps, of which 5000 are random")
    parser.add_argument("--table", type=Path, default=Path("multigoal.csv"), help="where to save the table")
    parser.add_argument("--picture", type=Path, default=Path("multigoal.png"), help="where to save the picture of the table")
    parser.add_argument("--paths", type=Path, default=Path("multigoal_paths.png"), help="and that of the episodes of seed 0")
    parser.add_argument("--redraw", action="store_true", help="train nothing: draw the picture of the table that is there")
    arguments = parser.parse_args()
    th.set_num_threads(1)

    if arguments.redraw:
        with arguments.table.open(newline="", encoding="utf-8") as file:
            draw_goals(list(csv.DictReader(file)), arguments.picture)
        return
    rows: list[dict[str, Any]] = []
    pictured: dict[str, list[np.ndarray]] = {}
    first_actions: dict[str, np.ndarray] = {}
    for seed in range(arguments.seeds):
        for name, model in make_models(seed).items():
            paths, goals, mean_return = rollouts(model.learn(arguments.timesteps))
            if seed == 0:
                pictured[name] = paths
                first_actions[name], _ = model.predict(np.zeros((3000, 2), np.float32))
            rows.append(make_row(name, seed, goals, mean_return))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    with arguments.table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_goals(rows, arguments.picture)
    draw_picture(pictured, first_actions, arguments.paths)


if __name__ == "__main__":
    main()
