"""
Act with an exported policy, without PyTorch and Stable-Baselines3: needs onnxruntime, numpy and gymnasium.

    python examples/onnx_acting.py pendulum.onnx Pendulum-v1

The file is made by ``sb3_sdac.export.export_onnx(SDAC.load("sdac_pendulum"), "pendulum.onnx")`` where PyTorch is.
Prints the returns of ten episodes; with the model of examples/pendulum.py expect about -150 +/- 80.
"""

import sys
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime


def act(session: onnxruntime.InferenceSession, obs: Any) -> np.ndarray:
    """
    :param session: with an exported policy
    :param obs: one observation, as the environment gives it
    :return: the action for it
    """
    inputs = obs if isinstance(obs, dict) else {"obs": obs}
    # A batch of one
    [actions] = session.run(["actions"], {name: np.asarray(value)[np.newaxis] for name, value in inputs.items()})
    return actions[0]


def main(path: str, env_id: str, n_episodes: int = 10) -> None:
    """
    :param path: the exported policy
    :param env_id: an environment of Gymnasium
    :param n_episodes: episodes to run
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    env = gym.make(env_id)
    returns = []
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=episode)
        total, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(act(session, obs))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    print(f"{np.mean(returns):.0f} +/- {np.std(returns):.0f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
