"""Models that are made and trained in a moment."""

import re
from typing import Any

import numpy as np

from sb3_sdac import SDAC

#: Arguments of the algorithm
TINY: dict[str, Any] = {
    "batch_size": 8,
    "buffer_size": 100,
    "learning_starts": 10,
    "seed": 0,
    "device": "cpu",
}
#: Arguments of the policy
TINY_POLICY: dict[str, Any] = {"net_arch": [16], "n_diffusion_steps": 5, "n_sampling_steps": 2, "n_particles": 2}


def make_model(
    env: Any = "Pendulum-v1", policy: Any = "MlpPolicy", algorithm: Any = SDAC, policy_kwargs: Any = None, **kwargs: Any
) -> Any:
    """
    :param env: environment
    :param policy: policy
    :param algorithm: SDAC or DPMD
    :param policy_kwargs: arguments of the policy other than :data:`TINY_POLICY`
    :param kwargs: arguments of the algorithm other than :data:`TINY`
    :return: a model; its type is Any, as many tests look into it
    """
    return algorithm(policy, env, policy_kwargs={**TINY_POLICY, **(policy_kwargs or {})}, **{**TINY, **kwargs})


def observations(batch_size: int = 7, seed: int = 0, dim: int = 3) -> np.ndarray:
    """
    :param batch_size: B
    :param seed: of the random numbers
    :param dim: of each; Pendulum-v1 has 3
    :return: between -1 and 1, shape (B, dim)
    """
    return np.random.default_rng(seed).uniform(-1, 1, (batch_size, dim)).astype(np.float32)


def all_of(*words: Any) -> str:
    """
    :param words: of a message
    :return: a pattern that asks for all of them, in any order
    """
    return "(?s)" + "".join(f"(?=.*{re.escape(str(word))})" for word in words)
