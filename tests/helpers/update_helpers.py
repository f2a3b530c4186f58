"""What the tests of updates share: policies without an algorithm, transitions made by hand, models with something to learn."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_sdac.options import UpdateOptions
from sb3_sdac.policies import DiffusionPolicy
from sb3_sdac.update import Update

B, OBS_DIM = 8, 3
OPTIONS = UpdateOptions(
    gamma=0.99,
    tau=0.005,
    n_reverse_samples=8,
    score_matching="gradient_assisted",
    proposal="truncated_normal",
    noised_actions="next",
    target_ess=0.28,
    clip_target_actions=True,
    reward_scale="auto",
    temperature_rate=None,
    mixed_precision=False,
)
#: Target critics, and critics that give plain values: what is simple to compute by hand
PLAIN: dict[str, Any] = {"batch_norm": False, "n_bins": 1}
SMALL: dict[str, Any] = {"net_arch": [16], "n_diffusion_steps": 5, "n_sampling_steps": 2, "n_particles": 2}


def options(**changes: Any) -> UpdateOptions:
    """
    :param changes: other values than in :data:`OPTIONS`
    :return: the options
    """
    return dataclasses.replace(OPTIONS, **changes)


def make_policy(obs_dim: int = OBS_DIM, action_dim: int = 1, **kwargs: Any) -> DiffusionPolicy:
    """
    :param obs_dim: dimension of the observations
    :param action_dim: A
    :param kwargs: arguments other than :data:`PLAIN` and :data:`SMALL`
    :return: a policy without an algorithm, always the same one, in training mode
    """
    th.manual_seed(0)
    box = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    policy = DiffusionPolicy(
        box, spaces.Box(-1, 1, (action_dim,), np.float32), lambda progress: 1e-3, **{**PLAIN, **SMALL, **kwargs}
    )
    policy.set_training_mode(True)
    return policy


def make_update(ent_coef: float = 1.0, **kwargs: Any) -> Update:
    """
    :param ent_coef: temperature
    :param kwargs: arguments of the policy, see :func:`make_policy`
    :return: updates of a policy without an algorithm
    """
    policy = make_policy(**kwargs)
    policy.log_ent_coef.data.fill_(np.log(ent_coef))
    return Update(policy)


def batch(
    discounts: th.Tensor | None = None, size: int = B, obs_dim: int = OBS_DIM, action_dim: int = 1
) -> ReplayBufferSamples:
    """
    :param discounts: as n-step replay has them, shape (size, 1)
    :param size: B
    :param obs_dim: dimension of the observations
    :param action_dim: A
    :return: random transitions, always the same ones, into a terminal state every other time
    """
    generator = th.Generator().manual_seed(0)
    observations, next_observations = th.randn(2, size, obs_dim, generator=generator)
    actions = 2 * th.rand(size, action_dim, generator=generator) - 1
    rewards = 2 * th.rand(size, 1, generator=generator) - 1
    dones = th.tensor([[0.0], [1.0]]).repeat(size // 2, 1)
    return ReplayBufferSamples(observations, actions, next_observations, dones, rewards, discounts)


def score_matching_loss(update: Update, data: ReplayBufferSamples, chosen: UpdateOptions) -> tuple[th.Tensor, th.Tensor]:
    """
    :param update: of a policy
    :param data: B transitions
    :param chosen: options
    :return: the actor's loss at their actions, and the effective sample size, with random numbers that are always the same
    """
    th.manual_seed(0)
    encoded = update.policy.actor.encode(data.observations)
    return update.score_matching_loss(encoded, data.observations, data.actions, chosen)


def give_q(monkeypatch: pytest.MonkeyPatch, update: Update, q: Callable[[th.Tensor], th.Tensor]) -> None:
    """
    Both critics say the same.

    :param monkeypatch: takes it back
    :param update: of a policy whose critics give plain values
    :param q: from actions, shape (B, K, A), to values, shape (B, K)
    """

    def outputs(encoded: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return q(actions).unsqueeze(-1).expand(2, -1, -1, -1)  # (B, K) -> (C, B, K, 1)

    monkeypatch.setattr(update.policy.critic.q_networks, "outputs", outputs)


def fill(model: Any, n_transitions: int = 50, reward_factor: float = 1.0) -> Any:
    """
    Give a model something to learn from, without environment steps, and a logger.

    :param model: of Pendulum-v1
    :param n_transitions: how much, one in four into a terminal state
    :param reward_factor: on rewards between -1 and 1
    :return: the model
    """
    random_state = np.random.RandomState(0)
    for i in range(n_transitions):
        obs, next_obs = random_state.standard_normal((2, 1, OBS_DIM))
        action, reward = random_state.uniform(-1, 1, (2, 1, 1))
        model.replay_buffer.add(obs, next_obs, action, reward_factor * reward[0], np.array([i % 4 == 3]), [{}])
    model.set_logger(configure(None, []))
    return model


def snapshot(module: nn.Module) -> list[th.Tensor]:
    """
    :param module: a network
    :return: copies of its parameters
    """
    return [parameter.detach().clone() for parameter in module.parameters()]


def changed(before: list[th.Tensor], module: nn.Module) -> bool:
    """
    :param before: from :func:`snapshot`
    :param module: the network
    :return: whether any parameter is another one since
    """
    return any(not th.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def state(update: Update) -> dict[str, th.Tensor]:
    """
    :param update: of a policy
    :return: copies of all that updates change, but for the optimizers' states
    """
    parts = {**update.policy.state_dict(), **update.reward_statistics.state_dict()}
    return {name: value.clone() for name, value in parts.items()}
