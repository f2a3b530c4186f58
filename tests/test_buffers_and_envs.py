"""Replay buffers and wrappers of SB3: hindsight, normalisation, n-step returns, time limits, stacked frames, images."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers.counting import CountingEnv
from helpers.logged import logged
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage
from stable_baselines3.her import HerReplayBuffer

from sb3_sdac import SDAC

SMALL: dict[str, Any] = {
    "n_diffusion_steps": 5,
    "n_sampling_steps": 2,
    "n_particles": 2,
    "n_reverse_samples": 8,
    "batch_size": 8,
    "buffer_size": 200,
    "learning_starts": 20,
    "seed": 0,
}


def make_model(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> SDAC:
    policy_kwargs = {"net_arch": [16], **kwargs.pop("policy_kwargs", {})}
    return SDAC(policy, env, policy_kwargs=policy_kwargs, **{**SMALL, **kwargs})


# TD targets


def td_targets(
    model: SDAC, indices: list[int], next_q: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[float], list[float]]:
    """
    Where the critic is drawn to at some transitions, and the observations at which the target critics were asked.

    A critic of zeros has the squared target for its loss.
    """
    asked = []

    def target_q_values(encoded: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return th.full((1, *actions.shape[:-1]), next_q)

    def target_encode(obs: th.Tensor) -> th.Tensor:
        asked.append(obs[0, 0].item())
        return obs

    buffer = model.replay_buffer
    assert buffer is not None
    monkeypatch.setattr(model.critic_target, "q_values", target_q_values)
    monkeypatch.setattr(model.critic_target, "encode", target_encode)
    targets = []
    for index in indices:
        for parameter in model.critic.parameters():
            th.nn.init.zeros_(parameter)
        monkeypatch.setattr(buffer, "sample", lambda n, env, i=index: buffer._get_samples(np.full(n, i), env))
        model.train(gradient_steps=1, batch_size=4)
        targets.append(logged(model)["critic_loss"] ** 0.5)
    return targets, asked


def model_of_counting(length: int, terminates: bool, **kwargs: Any) -> SDAC:
    kwargs = {"batch_norm": False, "gamma": 0.9, "reward_scale": 0.5, "gradient_steps": 0, "learning_starts": 0, **kwargs}
    kwargs = {"n_steps": 1, "n_bins": 1, **kwargs}
    model = make_model(CountingEnv(length, terminates), policy_kwargs={"n_critics": 1}, **kwargs)
    return model.learn(12)


@pytest.mark.parametrize("terminates", [True, False], ids=["termination", "timeout"])
def test_timeout_is_not_a_terminal_state(terminates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of 4 steps: the last one is bootstrapped from its terminal observation unless it terminates."""
    model = model_of_counting(4, terminates)
    targets, asked = td_targets(model, [2, 3, 4], 10.0, monkeypatch)
    bootstrapped = 0.5 + 0.9 * 10
    np.testing.assert_allclose(targets, [bootstrapped, 0.5 if terminates else bootstrapped, bootstrapped], rtol=1e-6)
    assert asked == [3, 4, 1]


def test_without_timeout_handling_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_counting(4, False, replay_buffer_kwargs={"handle_timeout_termination": False})
    np.testing.assert_allclose(td_targets(model, [3], 10.0, monkeypatch)[0], [0.5], rtol=1e-6)


@pytest.mark.parametrize("terminates", [True, False], ids=["termination", "timeout"])
def test_n_step_returns(terminates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of 5 steps, 3-step returns: fewer steps are summed, and the discount is that of as many, near the end."""
    model = model_of_counting(5, terminates, n_steps=3)
    targets, asked = td_targets(model, [0, 2, 3, 4, 5], 10.0, monkeypatch)
    expected = []
    for count in (0, 2, 3, 4, 0):
        n_steps = min(3, 5 - count)
        rewards = sum(0.9**i for i in range(n_steps))
        ends = terminates and count + n_steps == 5
        expected.append(0.5 * rewards + (0 if ends else 0.9**n_steps * 10))
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert asked == [3, 5, 5, 5, 3]


# Hindsight experience replay


@pytest.mark.parametrize("image", [False, True])
def test_her(image: bool) -> None:
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=4, continuous=True, image_obs_space=image), 2)
    model = make_model(
        env,
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 4, "goal_selection_strategy": "future"},
        policy_kwargs={"features_extractor_kwargs": {"cnn_output_dim": 8}},
    )
    model.learn(60)
    assert model._n_updates > 0
    assert isinstance(model.replay_buffer, HerReplayBuffer)
    batch = model.replay_buffer.sample(200)
    assert isinstance(batch.observations, dict)
    assert set(batch.observations) == {"observation", "achieved_goal", "desired_goal"}
    observation = env.reset()
    assert isinstance(observation, dict)
    # The environment's goal is always the same; others come from hindsight, and some of them were reached
    relabelled = (batch.observations["desired_goal"] != th.as_tensor(observation["desired_goal"][0])).flatten(1).any(dim=1)
    assert 0 < relabelled.sum() < 200
    assert set(batch.rewards[relabelled].flatten().tolist()) == {-1.0, 0.0}
    assert model.predict(observation)[0].shape == (2, 4)


# Normalisation


@pytest.mark.parametrize("dict_obs", [False, True])
def test_vec_normalize(dict_obs: bool) -> None:
    """Stored as they came, also those that ended an episode; normalised with the statistics of the day when sampled."""
    if dict_obs:
        venv = make_vec_env(
            lambda: gym.wrappers.TimeLimit(SimpleMultiObsEnv(discrete_actions=False, channel_last=False), 8), 2
        )
        env = VecNormalize(venv, norm_obs_keys=["vec"])
    else:
        env = VecNormalize(make_vec_env("Pendulum-v1", 2, env_kwargs={"max_episode_steps": 8}))
    model = make_model(env, "MultiInputPolicy" if dict_obs else "MlpPolicy")
    model.learn(60)
    assert model._n_updates > 0 and model._vec_normalize_env is env
    buffer = model.replay_buffer
    assert buffer is not None and buffer.dones.any()
    for kind in ("observations", "next_observations"):
        if dict_obs:
            stored = getattr(buffer, kind)["vec"][: buffer.pos]
            assert -1e-6 <= stored.min() < stored.max() <= 1 + 1e-6
        else:  # cosine and sine of an angle
            circle = np.square(getattr(buffer, kind)[: buffer.pos, :, :2]).sum(axis=-1)
            np.testing.assert_allclose(circle, 1, rtol=1e-5)

    np.random.seed(0)
    raw = buffer.sample(64)
    np.random.seed(0)
    sampled = buffer.sample(64, env=env)
    np.testing.assert_allclose(sampled.rewards, env.normalize_reward(raw.rewards.numpy()), rtol=1e-6)
    assert not np.allclose(sampled.rewards, raw.rewards)
    for kind in ("observations", "next_observations"):
        plain, normalised = getattr(raw, kind), getattr(sampled, kind)
        if dict_obs:
            assert th.equal(normalised["img"], plain["img"])
            plain, normalised = plain["vec"], normalised["vec"]
        rms = env.obs_rms["vec"] if isinstance(env.obs_rms, dict) else env.obs_rms
        np.testing.assert_allclose(normalised, (plain.numpy() - rms.mean) / np.sqrt(rms.var + 1e-8), rtol=1e-4, atol=1e-5)
        assert not np.allclose(normalised, plain)


@pytest.mark.parametrize("kwargs", [{"n_steps": 1}, {"n_steps": 2}, {"replay_recency": 1.0, "n_steps": 1}])
def test_train_samples_normalised(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an update is given are rows of the buffer, by the statistics of now."""
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    model = make_model(env, **kwargs).learn(25)
    batches: list[Any] = []
    monkeypatch.setattr(model, "_run_update", lambda batch, *args: batches.append(batch) or {})  # type: ignore[func-returns-value]
    model.train(gradient_steps=2, batch_size=8)
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer) and len(batches) == 2
    for name in ("observations", "next_observations", "rewards"):
        stored = getattr(buffer, name)[:25].reshape(25, -1)
        rows: Any = env.normalize_reward(stored) if name == "rewards" else env.normalize_obs(stored)
        assert not np.allclose(rows, stored)
        for row in getattr(batches[0], name).numpy():
            if name != "rewards" or model.n_steps == 1:  # else they are sums
                assert np.isclose(rows, row, atol=1e-5).all(axis=1).any()


# Images


@pytest.mark.parametrize("channel_first", [False, True])
def test_stacked_images(channel_first: bool) -> None:
    kwargs = {"screen_height": 40, "screen_width": 36, "discrete": False, "channel_first": channel_first}
    env = VecFrameStack(make_vec_env(FakeImageEnv, 2, env_kwargs=kwargs), n_stack=3)
    policy_kwargs = {"features_extractor_kwargs": {"features_dim": 8}}
    model = make_model(env, "CnnPolicy", policy_kwargs=policy_kwargs, batch_norm=False)
    assert model.critic_target is not None
    assert isinstance(model.get_env(), VecFrameStack if channel_first else VecTransposeImage)
    model.learn(26)
    assert model._n_updates == 3
    assert isinstance(model.actor.features_extractor, NatureCNN)
    assert isinstance(model.replay_buffer, ReplayBuffer)
    assert model.replay_buffer.observations.shape == (100, 2, 3, 40, 36)
    assert model.replay_buffer.observations.dtype == np.uint8
    # Without the wrapper that moves the channels, predict does it
    observation = env.reset()
    assert isinstance(observation, np.ndarray)
    assert model.predict(observation)[0].shape == (2, 5)


def test_every_extractor_of_images_learns() -> None:
    """The actor's and, with one of their own, the critics'; the targets' follows."""
    env = DummyVecEnv([lambda: FakeImageEnv(screen_height=36, screen_width=36, discrete=False)])
    policy_kwargs = {"features_extractor_kwargs": {"features_dim": 8}}
    model = make_model(env, "CnnPolicy", policy_kwargs=policy_kwargs, batch_norm=False)
    assert model.critic_target is not None
    parts = [model.actor.features_extractor, model.critic.features_extractor, model.critic_target.features_extractor]
    before = [[parameter.clone() for parameter in part.parameters()] for part in parts]
    model.learn(24)
    for old, part in zip(before, parts, strict=True):
        assert isinstance(part, NatureCNN)
        assert not any(th.equal(*pair) for pair in zip(old, part.parameters(), strict=True))
