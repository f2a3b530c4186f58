"""Environments whose observations say where they come from, and in which something is not a number, once."""

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


UNIT_BOX = spaces.Box(-1, 1, (2,), np.float32)


class FaultyEnv(gym.Env):
    """
    Episodes of 5 steps in which something is not a number at environment step ``when``, and then never again.

    :param fault: ``"observation"``, ``"reward"``, or none of them
    :param when: counted over all episodes, from 1; 0 for the reset
    :param value: what to give instead
    :param dict_obs: put the observation, with another one, into a dict
    """

    def __init__(
        self, fault: str = "", when: int = -1, value: float = np.nan, dict_obs: bool = False, actions: Any = UNIT_BOX
    ):
        box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.observation_space = spaces.Dict({"good": box, "bad": box}) if dict_obs else box
        self.action_space = actions
        self.fault, self.when, self.value, self.dict_obs, self.count = fault, when, value, dict_obs, 0

    def _fails(self, what: str) -> bool:
        if (self.fault, self.when) != (what, self.count):
            return False
        self.when = -1
        return True

    def _observation(self) -> Any:
        bad = np.full(3, self.count, np.float32)
        if self._fails("observation"):
            bad[1] = self.value
        return {"good": np.zeros(3, np.float32), "bad": bad} if self.dict_obs else bad

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        reward = self.value if self._fails("reward") else 1.0
        return self._observation(), reward, self.count % 5 == 0, False, {}
