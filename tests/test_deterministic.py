"""One seed, one training: bit-equal networks and replay buffers, which watching does not change."""

from typing import Any

import numpy as np
import pytest
import torch as th
from helpers.models import make_model
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

from sb3_sdac import DPMD


def trained(seed: int, callback: BaseCallback | None = None, n_envs: int = 1, **kwargs: Any) -> dict[str, Any]:
    """Everything a training leaves behind, as arrays."""
    model = make_model(make_vec_env("Pendulum-v1", n_envs), seed=seed, learning_starts=20, **kwargs)
    model.learn(40, callback=callback)
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer) and model._n_updates > 0
    names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    arrays = {name: getattr(buffer, name)[: buffer.pos] for name in names}
    parts = {**model.policy.state_dict(), **model.update.reward_statistics.state_dict()}
    if kwargs.get("algorithm") is DPMD:
        parts.update(model.update.q_statistics.state_dict())
    return {**arrays, **{name: value.numpy() for name, value in parts.items()}}


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"algorithm": DPMD, "policy_kwargs": {"average_actor": True}},
        {
            **{"noised_actions": "current", "proposal": "clipped_normal", "score_matching": "reverse_sampling"},
            "policy_kwargs": {"eta": 1.0, "batch_norm": False, "n_bins": 1},
        },
        {"n_envs": 2, "gradient_steps": -1, "action_noise": NormalActionNoise(np.zeros(1), np.ones(1)), "n_steps": 3},
    ],
    ids=["default", "DPMD", "paper", "envs"],
)
def test_same_seed_same_training(kwargs: dict[str, Any]) -> None:
    first = trained(seed=0, **kwargs)
    th.rand(1), np.random.rand()  # what else went on in the process does not matter
    assert_equal(first, trained(seed=0, **kwargs))
    other = trained(seed=1, **kwargs)
    assert not any(np.array_equal(first[name], other[name]) for name in ("observations", "actions", "rewards"))
    assert not np.array_equal(first["actor.noise_predictor.first.weight"], other["actor.noise_predictor.first.weight"])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_evaluation_does_not_disturb_training(eta: float) -> None:
    """Deterministic predictions consume no random numbers; stochastic ones do, which shows that the test can fail."""
    alone = trained(seed=0, policy_kwargs={"eta": eta})
    for deterministic in (True, False):
        env = make_vec_env("Pendulum-v1", env_kwargs={"max_episode_steps": 5}, seed=9)
        callback = EvalCallback(env, eval_freq=7, n_eval_episodes=2, deterministic=deterministic, verbose=0)
        watched = trained(seed=0, callback=callback, policy_kwargs={"eta": eta})
        assert callback.n_calls == 40 and np.isfinite(callback.last_mean_reward)
        if deterministic:
            assert_equal(alone, watched)
        else:
            assert not np.array_equal(alone["actions"], watched["actions"])
