"""
A film strip of a trained agent, from a saved model::

    python examples/film_strip.py sdac_pendulum.zip Pendulum-v1 --picture film_strip.png

One deterministic episode, its frames evenly spaced in time, each titled with its step and the return up to it. Needs
``pip install ".[plots]"`` and what renders the environment (``gymnasium[classic-control]``, ``gymnasium[mujoco]``).
"""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure

from sb3_sdac import SDAC


def film(model: SDAC, env_id: str, seed: int) -> tuple[list[np.ndarray], list[float]]:
    """
    :param model: trained on observations of the environment as it is (no VecNormalize)
    :param env_id: registered in Gymnasium
    :param seed: of the episode
    :return: frames, shape (height, width, 3), from before the first to after the last step, and the return up to each
    """
    env = gym.make(env_id, render_mode="rgb_array")
    obs, _ = env.reset(seed=seed)
    frames, returns, done = [np.asarray(env.render())], [0.0], False
    while not done:
        action, _ = model.predict(obs, deterministic=True)
        obs, reward, terminated, truncated, _ = env.step(action)
        frames.append(np.asarray(env.render()))
        returns.append(returns[-1] + float(reward))
        done = terminated or truncated
    env.close()
    return frames, returns


def draw(frames: list[np.ndarray], returns: list[float], n_pictures: int, n_steps: int) -> Figure:
    """
    :param frames: of an episode
    :param returns: up to each
    :param n_pictures: in the strip
    :param n_steps: up to which step
    :return: the strip
    """
    figure = Figure(figsize=(1.5 * n_pictures, 1.9), layout="constrained")
    steps = np.linspace(0, min(n_steps, len(frames) - 1), n_pictures).astype(int)
    for axes, step in zip(figure.subplots(1, n_pictures, squeeze=False)[0], steps, strict=True):
        axes.imshow(frames[step])
        axes.set_title(f"step {step}\nreturn {returns[step]:.0f}", fontsize=9)
        axes.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a zip file of SDAC")
    parser.add_argument("env", help="id of the environment")
    parser.add_argument("--picture", type=Path, default=Path("film_strip.png"))
    parser.add_argument("--pictures", type=int, default=8, help="frames in the strip")
    parser.add_argument("--steps", type=int, default=10**9, help="up to this step of the episode (default: all of it)")
    parser.add_argument("--seed", type=int, default=0, help="of the episode")
    arguments = parser.parse_args()
    frames, returns = film(SDAC.load(arguments.model, device="cpu"), arguments.env, arguments.seed)
    draw(frames, returns, arguments.pictures, arguments.steps).savefig(arguments.picture, dpi=100)


if __name__ == "__main__":
    main()
