"""The unit of the rewards: it does not matter, however large or small they are."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers.models import make_model
from helpers.update_helpers import B, batch, changed, fill, make_update, options, score_matching_loss, snapshot, state
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_sdac import SDAC
from sb3_sdac import score_matching as sm
from sb3_sdac.compilation import Compiled, has_compiler
from sb3_sdac.options import UpdateOptions
from sb3_sdac.rewards import MAX_SCALE, RewardStatistics, largest_value
from sb3_sdac.update import Update


def test_scaled_rewards() -> None:
    """Root mean square 0.2 over all batches; zeros are left alone."""
    statistics, so_far = RewardStatistics(), th.zeros(0, 1)
    generator = th.Generator().manual_seed(0)
    for i, factor in enumerate((0.0, 0.0, 30.0, 2.0)):
        rewards = factor * th.randn(B, 1, generator=generator)
        statistics.track(rewards)
        so_far = th.cat([so_far, rewards])
        expected = 0.2 / so_far.square().mean().sqrt().item() if i > 1 else 1.0
        assert statistics.scale().item() == pytest.approx(expected, rel=1e-5)


def test_a_rare_large_reward_counts_at_most_ten_times_as_much() -> None:
    statistics, spike = RewardStatistics(), th.zeros(B, 1)
    for _ in range(200):
        statistics.track(spike)
    spike[0] = 500
    statistics.track(spike)
    assert 500 * statistics.scale().item() == pytest.approx(2)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_rewards_of_any_size(size: float) -> None:
    statistics = RewardStatistics()
    statistics.track(size * (2 * th.rand(B, 1) - 1))
    scale = statistics.scale()
    assert scale.dtype == th.float32 and scale.isfinite() and 0 < scale <= MAX_SCALE
    assert size * scale.item() == pytest.approx(0.2 / 3**0.5 * 3, rel=0.9)  # uniform: the root mean square is size / sqrt(3)


@pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiled_statistics_are_the_same() -> None:
    """What torch.compile writes to a float64 of shape () gets lost, on a CPU: the scale stayed 1."""
    eager, fast = RewardStatistics(), RewardStatistics()

    def track(rewards: th.Tensor) -> th.Tensor:
        fast.track(rewards)
        return fast.scale()

    compiled = Compiled(track)
    for i in range(3):
        rewards = 30 * th.randn(B, 1, generator=th.Generator().manual_seed(i))
        eager.track(rewards)
        th.testing.assert_close(compiled(rewards), eager.scale())
    for name, value in eager.state_dict().items():
        th.testing.assert_close(fast.state_dict()[name], value)
        assert value > 0


@pytest.mark.parametrize("gamma, largest", [(0.99, 200), (0.95, 40), (0.0, 2), (1.0, 2e4)])
def test_largest_value(gamma: float, largest: float) -> None:
    assert largest_value(gamma) == pytest.approx(largest)


def test_the_update_tracks_what_it_scales() -> None:
    """A fixed scale is a number, and then nothing is tracked."""
    update, data = make_update(), batch()
    _, metrics = update.critic_loss(data, data.actions, options(reward_scale="auto"))
    expected = 0.2 / data.rewards.square().mean().sqrt().item()
    assert metrics["reward_scale"].item() == pytest.approx(expected, rel=1e-5)
    assert update.reward_scale(options(reward_scale="auto")) == metrics["reward_scale"]
    _, metrics = update.critic_loss(data, data.actions, options(reward_scale=0.3))
    assert "reward_scale" not in metrics and update.reward_statistics.n_batches == 1
    assert update.reward_scale(options(reward_scale=0.3)) == 0.3


@pytest.mark.parametrize("batch_norm", [False, True])
def test_unit_of_the_rewards_does_not_matter(batch_norm: bool) -> None:
    """Rewards times 100 teach the same, with a temperature times 100; with a fixed scale they do not."""
    updates = []
    for factor, reward_scale in ((1, "auto"), (100, "auto"), (1, 0.2), (100, 0.2)):
        update, data = make_update(batch_norm=batch_norm), batch()
        th.manual_seed(0)
        for i in range(20):
            chosen = options(reward_scale=reward_scale, temperature_rate=0.05 if i else 1.0)
            update(data._replace(rewards=factor * data.rewards), chosen, step_actor=i % 2 == 0, step_targets=True)
        updates.append(update)

    def distance(update: Update, other: Update) -> float:
        pairs = zip(snapshot(update.policy), snapshot(other.policy), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs if a.dim() > 0)  # without the temperature

    temperatures = [update.policy.log_ent_coef.exp().item() for update in updates]
    assert temperatures[1] == pytest.approx(100 * temperatures[0], rel=1e-3)
    assert distance(updates[0], updates[1]) < 1e-3 < 1e-2 < distance(updates[2], updates[3])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_updates_with_rewards_of_any_size(size: float) -> None:
    """Also where both follow each other, so that the temperature lags by sixty decades."""
    model = fill(make_model(n_steps=1), reward_factor=size)
    model.train(10, 8)
    fill(model, reward_factor=1 / size)
    model.train(10, 8)
    assert all(value.isfinite().all() for value in state(model.update).values())


class ExactTemperature(Update):
    """The temperature is moved by the same rule, but as a number: the logarithm in which it is kept rounds."""

    temperature: th.Tensor | None = None

    def score_matching_loss(
        self, encoded_actor: th.Tensor, obs: PyTorchObs, actions: th.Tensor, options: UpdateOptions
    ) -> tuple[th.Tensor, th.Tensor]:
        assert options.temperature_rate is not None
        target, (propose, draw) = sm.SCORE_TARGETS[options.score_matching], sm.PROPOSALS[options.proposal]
        diffusion = self.policy.actor.sampler.diffusion
        t, _, x_t, predicted_noise = self.noised(encoded_actor, actions)
        with th.no_grad():
            random_numbers = draw((len(actions), options.n_reverse_samples, actions.shape[1]))
            x_0, noise = propose(diffusion, x_t, t, random_numbers)
            encoded_critic = self.encode_critic(obs)
            q_values, gradients = self.q_values_and_gradients(encoded_critic, x_0, options, target.needs_gradients)
            solution = sm.solve_temperature(q_values, options.target_ess * options.n_reverse_samples)
            solution = solution / self.reward_scale(options)
            old = solution if self.temperature is None else self.temperature
            self.temperature = old * (solution / old) ** options.temperature_rate
            temperature = self.temperature * self.reward_scale(options)
            weights = sm.softmax_weights(q_values, temperature)
        candidates = sm.Candidates(noise, q_values, gradients)
        loss = target.loss(diffusion, t, predicted_noise, candidates, weights, temperature)
        return loss, sm.effective_sample_size(weights).mean()


class Exact(SDAC):
    update_class = ExactTemperature


def test_unit_of_the_rewards_enters_nowhere() -> None:
    """
    Rewards times 128, the defaults, a real environment: the same weights, bit by bit, so only rounding tells units apart.

    A power of two changes no digit of a floating-point number. Only the temperature's logarithm is replaced.
    """
    models: list[Any] = []
    for factor in (1, 128):
        env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), functools.partial(operator.mul, factor))
        model = Exact("MlpPolicy", env, learning_starts=50, policy_kwargs={"net_arch": [32, 32]}, seed=0, device="cpu")
        start = snapshot(model.policy)
        model.learn(350)
        assert model._n_updates == 300
        assert changed(start, model.policy)
        models.append(model)
    one, many = models
    assert all(th.equal(a, b) for a, b in zip(snapshot(one.policy), snapshot(many.policy), strict=True))
    assert many.update.temperature == 128 * one.update.temperature
    assert many.update.reward_statistics.scale() == one.update.reward_statistics.scale() / 128


def test_data_temperature_is_free_of_the_reward_scale() -> None:
    """Q times c gives the same weights and a coefficient times c."""
    results = []
    for scale in (1.0, 100.0):
        update, data = make_update(), batch()
        *_, weight, bias = update.policy.critic.q_networks.parameters()
        weight.data.mul_(scale)
        bias.data.mul_(scale)
        loss, ess = score_matching_loss(update, data, options(temperature_rate=1.0))
        results.append((update.policy.log_ent_coef.exp().item(), loss.item(), ess.item()))
    assert results[1][0] == pytest.approx(100 * results[0][0], rel=1e-4)
    assert results[1][1:] == pytest.approx(results[0][1:], rel=1e-3)


class Scaled(gym.RewardWrapper):
    """Pendulum's rewards, between -16 and 0, as a function makes them of them and of their number."""

    def __init__(self, change: Callable[[float, int], float]):
        super().__init__(gym.make("Pendulum-v1"))
        self.change, self.count = change, 0

    def reward(self, reward: Any) -> float:
        self.count += 1
        return self.change(float(reward), self.count)


SIZES: dict[str, Callable[[float, int], float]] = {
    "all -2e19": lambda reward, count: -2e19,
    "up to 1e30": lambda reward, count: reward * 5e28,
    "down to 1e-30": lambda reward, count: reward * 1e-30,
    "all zero": lambda reward, count: 0.0,
    "mixed in one batch": lambda reward, count: reward * (5e28 if count % 7 == 0 else 1e-30),
    "small, then large": lambda reward, count: reward * (1e-30 if count < 60 else 5e28),
    "one large": lambda reward, count: 1e30 if count == 40 else reward,
    "below what float32 has": lambda reward, count: reward * 1e-44,
}


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_rewards_of_any_size_are_learned_from(size: str, n_steps: int) -> None:
    model = make_model(Scaled(SIZES[size]), n_steps=n_steps)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(150)
    after = model.policy.state_dict()
    assert all(th.isfinite(value).all() for value in after.values())
    assert not th.equal(after["critic.q_networks.rest.1.weight"], before["critic.q_networks.rest.1.weight"])
    obs = th.as_tensor(np.stack([[1.0, 0.0, 0.0], [-1.0, 0.0, 4.0]]), dtype=th.float32)
    values = model.critic.q_values(model.critic.encode(obs), th.zeros(2, 1))
    assert th.isfinite(values).all() and values.abs().max() <= 200  # in scaled rewards
    assert np.isfinite(model.predict(obs.numpy())[0]).all()


@pytest.mark.parametrize("reward", [2e30, -1e31, -np.inf, np.nan])
def test_other_rewards_are_named(reward: float) -> None:
    with pytest.raises(ValueError, match=r"reward at environment step .* (is larger than 1e\+30|is not finite)"):
        make_model(Scaled(lambda _, count: reward if count == 5 else 0.0)).learn(20)


def test_learning_that_diverges_names_the_rewards() -> None:
    """The environment's actions and observations are not to blame."""
    model = make_model(Scaled(lambda reward, count: -1e30), reward_scale=1e-30).learn(60)
    with th.no_grad():
        model.actor.noise_predictor.first.bias.fill_(th.nan)
    with pytest.raises(ValueError, match=r"largest reward in the replay buffer is 1e\+30 in size\. reward_scale='auto'"):
        model.learn(60, reset_num_timesteps=False)
