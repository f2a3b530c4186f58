"""
Four equally good goals: does the policy keep all of them?

The multi-goal environment of soft Q-learning (Haarnoja et al. 2017, arXiv 1702.08165, section 5.1): a point starts in the
middle of the plane, four goals lie around it. Trains SDAC and SAC, lets both act stochastically and counts where episodes end.

    python examples/multigoal.py
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

GOALS = np.array([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]])


class MultiGoalEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A point mass whose velocity is the action; the reward is minus the distance to the nearest goal, minus 30 |action|^2.

    Costs, bonus and start are those of the published environment; an episode lasts 30 steps unless it ends within a distance
    of 1 of a goal, which earns 10.
    """

    max_steps = 30

    def __init__(self, action_cost: float = 30.0) -> None:
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
