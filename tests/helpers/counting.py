"""An environment whose observations say where they come from, for the tests that look at transitions."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class CountingEnv(gym.Env):
    """
    Reward 1 at every step and an observation that counts them; ends after ``length`` steps in one of two ways.

    :param length: steps per episode
    :param terminates: end by termination, or by truncation
    """

    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length: int, terminates: bool):
        self.length, self.terminates, self.count = length, terminates, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        over = self.count == self.length
        return np.full(1, self.count, np.float32), 1.0, over and self.terminates, over and not self.terminates, {}
