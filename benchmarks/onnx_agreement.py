"""
How near an exported policy is to ``predict(deterministic=True)``, on 1,000 observations of Ant-v5 under random actions.

Prints a Markdown table: observations whose actions differ by more than 1e-5, the largest difference, and how many are another
choice among the particles; between ONNX Runtime and PyTorch, and between PyTorch and itself one observation at a time.
"""

import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_sdac import PAPER_SDAC, SDAC
from sb3_sdac.export import DeterministicActor, export_onnx

#: Name, arguments, whether with VecNormalize, environment steps of training
MODELS: list[tuple[str, dict[str, Any], bool, int]] = [
    ("default, untrained", {}, False, 0),
    ("default, 20 updates", {"train_freq": 10}, False, 300),
    ("the same with VecNormalize", {"train_freq": 10}, True, 300),
    ("paper, untrained", PAPER_SDAC, False, 0),
]


def collect(n_observations: int) -> np.ndarray:
    """
    :param n_observations: how many
    :return: observations of Ant-v5, shape (n_observations, 105)
    """
    env = gym.make("Ant-v5")
    env.action_space.seed(0)
    observed = [env.reset(seed=0)[0]]
    while len(observed) < n_observations:
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        observed.append(env.reset()[0] if terminated or truncated else obs)
    return np.array(observed)


def main() -> None:
    """Print the table, row by row."""
    th.set_num_threads(1)
    raw = collect(1000)
    print("| policy | ONNX Runtime and PyTorch | PyTorch, batches of 1,000 and of 1 |\n| --- | --- | --- |", flush=True)
    for name, arguments, normalize, n_steps in MODELS:
        env: VecEnv = make_vec_env("Ant-v5", seed=0)
        env = VecNormalize(env) if normalize else env
        model = SDAC("MlpPolicy", env, seed=0, **{**arguments, "buffer_size": 1000}).learn(n_steps)
        obs = env.normalize_obs(raw) if isinstance(env, VecNormalize) else raw
        predicted = model.predict(obs, deterministic=True)[0]
        singly = np.concatenate([model.predict(one[np.newaxis], deterministic=True)[0] for one in np.asarray(obs)])
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(model, Path(folder) / "ant.onnx")
            session = onnxruntime.InferenceSession(Path(folder) / "ant.onnx", providers=["CPUExecutionProvider"])
        [found] = session.run(["actions"], {"obs": raw})
        particles = DeterministicActor(model).candidates(th.as_tensor(raw))[0].numpy()
        cells = []
        for other in (found, singly):
            differences = np.abs(other - predicted).max(axis=1)
            nearest = [np.abs(particles - actions[:, np.newaxis]).max(axis=2) for actions in (other, predicted)]
            # Particles that are the same action are no choice
            chosen = np.take_along_axis(nearest[1], nearest[0].argmin(axis=1)[:, np.newaxis], axis=1)
            flips = int((chosen > 1e-3).sum())
            cells.append(f"{(differences > 1e-5).sum()} above 1e-5, largest {differences.max():.0e}, {flips} other choices")
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
