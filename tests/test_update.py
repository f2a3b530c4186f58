"""One update on a batch made by hand: targets, losses, who learns from what, delays and the temperature."""

import functools
import math
import operator
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from logged import logged
from reading import nothing_read_back
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_sdac import PAPER_DPMD, PAPER_SDAC, SDAC
from sb3_sdac import score_matching as sm
from sb3_sdac.networks import EnsembleLinear, NormLimit, ValueBins, limiting_scale
from sb3_sdac.sdac import TEMPERATURE_RATE, _concatenate

B = 8


def make_model(**kwargs: Any) -> SDAC:
    """Small, and in float32 on every processor: the tests compute what they compare with."""
    defaults: dict[str, Any] = {
        "n_diffusion_steps": 5,
        "n_sampling_steps": 2,
        "n_particles": 2,
        "n_reverse_samples": 8,
        "buffer_size": 100,
        "seed": 0,
        "mixed_precision": False,
        "batch_norm": False,  # with it, and with distributions over values: the tests at the end of this file
        "n_bins": 1,
        "policy_delay": 2,
        "policy_kwargs": {"net_arch": [16]},
    }
    model = SDAC("MlpPolicy", "Pendulum-v1", **{**defaults, **kwargs})
    model.set_logger(configure(None, []))
    return model


def batch(discounts: th.Tensor | None = None) -> ReplayBufferSamples:
    generator = th.Generator().manual_seed(0)
    observations, next_observations = th.randn(2, B, 3, generator=generator)
    actions, rewards = 2 * th.rand(2, B, 1, generator=generator) - 1
    dones = th.tensor([[0.0], [1.0]]).repeat(B // 2, 1)
    return ReplayBufferSamples(observations, actions, next_observations, dones, rewards, discounts)


def give_batch(model: SDAC, monkeypatch: pytest.MonkeyPatch, data: ReplayBufferSamples) -> None:
    monkeypatch.setattr(model.replay_buffer, "sample", lambda *args, **kwargs: data)


def snapshot(module: nn.Module) -> list[th.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def changed(before: list[th.Tensor], module: nn.Module) -> bool:
    return any(not th.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("discounts", [None, th.linspace(0.1, 0.9, B).unsqueeze(1)])
@pytest.mark.parametrize("pessimism", [0, 0.3, 1])
def test_td_target_by_hand(monkeypatch: pytest.MonkeyPatch, pessimism: float, discounts: th.Tensor | None) -> None:
    """y = scale r + (1 - done) discount Q_target(s', a'), and the loss sums the critics' mean squared errors."""
    model = make_model(gamma=0.9, reward_scale=0.5, pessimism=pessimism)
    assert model.critic_target is not None
    data = batch(discounts)
    next_actions = th.linspace(-1, 1, B).unsqueeze(1)
    monkeypatch.setattr(model, "_sample_actions", lambda *args: next_actions)
    give_batch(model, monkeypatch, data)
    with th.no_grad():
        next_q_values = th.cat(model.critic_target(data.next_observations, next_actions), dim=1)  # (B, 2)
        next_q = next_q_values.mean(dim=1) - pessimism * (next_q_values[:, 0] - next_q_values[:, 1]).abs() / 2
        current_q = model.critic(data.observations, data.actions)
    loss = 0.0
    for q_values in current_q:
        for i in range(B):
            discount = 0.9 if discounts is None else discounts[i].item()
            target = 0.5 * data.rewards[i].item() + (1 - data.dones[i].item()) * discount * next_q[i].item()
            loss += (q_values[i].item() - target) ** 2 / B
    model.train(1)
    assert logged(model)["critic_loss"] == pytest.approx(loss, rel=1e-5)


def test_q_is_the_mean_until_a_terminal_state_is_met(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pessimism="auto": the mean of the critics, and the least of them from the first batch with a terminal state on."""
    model = make_model()
    data = batch()
    q_values = th.tensor([[1.0, 5.0], [3.0, 4.0]])  # (C, 2)
    expected = {0.0: [2.0, 4.5], 1.0: [1.0, 4.0]}
    for dones, pessimism in ((0 * data.dones, 0.0), (data.dones, 1.0), (0 * data.dones, 1.0)):
        give_batch(model, monkeypatch, data._replace(dones=dones))
        model.train(1)
        assert model.critic.pessimistic(q_values).tolist() == expected[pessimism]
        assert logged(model)["pessimism"] == pessimism
    model.save(tmp_path / "model.zip")
    assert SDAC.load(tmp_path / "model.zip").critic.pessimistic(q_values).tolist() == expected[1]
    fixed = SDAC.load(tmp_path / "model.zip", pessimism=0.5)
    assert fixed.critic.pessimistic(q_values).tolist() == [1.5, 4.25]


def test_reward_scale_and_temperature_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q proportional to the scaled rewards, the weights do not depend on the scale: ent_coef has the reward's unit."""
    weights = []
    for scale in (0.2, 20.0):
        model = make_model(reward_scale=scale, ent_coef=0.7, score_matching="reverse_sampling")
        monkeypatch.setattr(model.critic, "q", lambda encoded, actions, scale=scale: scale * actions.sum(-1))
        seen: list[th.Tensor] = []
        original = sm.softmax_weights
        monkeypatch.setattr(sm, "softmax_weights", lambda *args, seen=seen, f=original: seen.append(f(*args)) or seen[-1])
        th.manual_seed(0)
        model._score_matching_loss(model.actor.encode(batch().next_observations), th.zeros(0), th.zeros(B, 1))
        monkeypatch.setattr(sm, "softmax_weights", original)
        weights.append(seen[0])
    th.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("score_matching", ["reverse_sampling", "gradient_assisted", "mirror_descent"])
def test_actor_loss_touches_the_actor_only(score_matching: str) -> None:
    model = make_model(score_matching=score_matching, ent_coef=1.0)
    data = batch()
    encoded = model.critic.encode(data.next_observations).detach()
    loss, _ = model._score_matching_loss(model.actor.encode(data.next_observations), encoded, th.zeros(B, 1))
    loss.backward()
    assert model.critic_target is not None
    assert all(parameter.grad is None for parameter in [*model.critic.parameters(), *model.critic_target.parameters()])
    assert all(parameter.grad is not None for parameter in model.actor.noise_predictor.parameters())


def test_critic_loss_touches_the_critic_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(policy_delay=2)
    give_batch(model, monkeypatch, batch())
    model._n_updates = 1  # no actor step on this one
    actor, critic = snapshot(model.actor), snapshot(model.critic)
    model.train(1)
    assert not changed(actor, model.actor) and changed(critic, model.critic)
    assert all(parameter.grad is None for parameter in model.actor.parameters())


def test_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the authors' code, what is delayed happens on update 0, then on every n-th."""
    model = make_model(policy_delay=3, target_update_interval=2, average_actor=True)
    assert model.actor_target is not None
    give_batch(model, monkeypatch, batch())
    happened: dict[str, list[int]] = {"actor": [], "critic": [], "critic_target": [], "actor_target": []}
    for update in range(7):
        before = {name: snapshot(getattr(model, name)) for name in happened}
        model.train(1)
        for name, updates in happened.items():
            if changed(before[name], getattr(model, name)):
                updates.append(update)
    assert happened["actor"] == [0, 3, 6]
    assert happened["critic"] == list(range(7))
    assert happened["critic_target"] == [0, 2, 4, 6]
    assert happened["actor_target"] == [0, 2, 4, 6]
    assert (model._n_updates, model._n_actor_updates) == (7, 3)


def test_targets_are_polyak_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tau=0.25, average_actor=True)
    assert model.actor_target is not None
    give_batch(model, monkeypatch, batch())
    before = {name: snapshot(getattr(model, name)) for name in ("critic_target", "actor_target")}
    model.train(1)
    for target_name, name in (("critic_target", "critic"), ("actor_target", "actor")):
        online = getattr(model, name).parameters()
        for old, new, target in zip(before[target_name], online, getattr(model, target_name).parameters(), strict=True):
            th.testing.assert_close(target.data, 0.75 * old + 0.25 * new.data)


def test_critic_steps_repeat_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official DPMD steps Adam twice with one gradient: from rest, each of Adam's first steps moves by the learning rate."""
    moves = []
    for critic_steps in (1, 2):
        model = make_model(critic_steps=critic_steps, qf_learning_rate=1e-3)
        give_batch(model, monkeypatch, batch())
        *_, bias = model.critic.q_networks.parameters()
        before = bias.detach().clone()
        model.train(1)
        moves.append((bias - before).abs().max().item())
    assert moves[0] == pytest.approx(1e-3, rel=1e-3)
    assert moves[1] == pytest.approx(2e-3, rel=1e-3)


@pytest.mark.parametrize("anchor", ["next", "current"])
@pytest.mark.parametrize("critic_steps", [1, 2])
def test_score_matching_is_handed_what_belongs_together(
    monkeypatch: pytest.MonkeyPatch, critic_steps: int, anchor: str
) -> None:
    """Encodings of the anchor's observations by networks as they are then (official DPMD: after the first of two steps)."""
    model = make_model(critic_steps=critic_steps, anchor=anchor)
    data = batch()
    give_batch(model, monkeypatch, data)
    observations = data.next_observations if anchor == "next" else data.observations
    original = model._score_matching_loss
    calls = []

    def spy(encoded_actor: th.Tensor, encoded_critic: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        calls.append(actions)
        assert encoded_actor.requires_grad and not encoded_critic.requires_grad and not actions.requires_grad
        assert th.equal(encoded_actor, model.actor.encode(observations))
        assert th.equal(encoded_critic, model.critic.encode(observations))
        return original(encoded_actor, encoded_critic, actions)

    monkeypatch.setattr(model, "_score_matching_loss", spy)
    model.train(1)
    assert len(calls) == 1


@pytest.mark.parametrize(("anchor", "again"), [("next", [0, 0]), ("current", [1, 0])])
def test_features_are_extracted_once(monkeypatch: pytest.MonkeyPatch, anchor: str, again: list[int]) -> None:
    """With and without an actor step: each network sees each observation once, and again to draw fresh actions there."""
    model = make_model(anchor=anchor, policy_delay=2)
    give_batch(model, monkeypatch, batch())
    calls: list[str] = []
    for name in ("actor", "critic", "critic_target"):
        extractor = getattr(model, name).features_extractor
        extractor.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
    for more in again:
        calls.clear()
        model.train(1)
        assert Counter(calls) == {"actor": 1 + more, "critic": 2 + more, "critic_target": 1}


def test_gradient_assisted_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q = -4 (a - 0.3)^2 and random numbers of ours, everything after the prediction in NumPy."""
    model = make_model(score_matching="gradient_assisted", ent_coef=2.0, reward_scale=0.5, n_diffusion_steps=B)
    rng, data = np.random.default_rng(0), batch()
    t, noise, noises = np.arange(B)[:, None], rng.normal(size=(B, 1)), rng.normal(size=(B, 8, 1))
    x_0 = rng.uniform(-1, 1, (B, 8, 1))

    def tensor(array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array, dtype=th.float32)

    monkeypatch.setattr(th, "randint", lambda *args, **kwargs: th.as_tensor(t))
    monkeypatch.setattr(th, "randn_like", lambda *args, **kwargs: tensor(noise))
    proposal = (lambda *args: (tensor(x_0), tensor(noises)), lambda *args, **kwargs: None)
    monkeypatch.setitem(sm.PROPOSALS, model.proposal, proposal)
    monkeypatch.setattr(model.critic, "q", lambda encoded, actions: -4 * (actions - 0.3).square().sum(-1))
    encoded, diffusion = model.actor.encode(data.observations), model.actor.diffusion
    loss, ess = model._score_matching_loss(encoded, encoded[None], data.actions)

    x_t = diffusion.q_sample(data.actions, th.as_tensor(t), tensor(noise))
    predicted = model.actor.predict_noise(encoded, x_t, th.as_tensor(t)).detach().numpy()
    sigma = diffusion.noise_to_signal.numpy()[t][:, None]  # (B, 1, 1)
    temperature = 0.5 * 2.0  # of rewards times 0.5
    logits = -4 * (x_0 - 0.3) ** 2 / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    of_gradients = sigma * 8 * (x_0 - 0.3) / temperature
    assert 0.1 < np.mean(np.abs(of_gradients) > 5) < 0.9
    share = 1 / (1 + (sigma / 0.5) ** 2)
    targets = share * of_gradients.clip(-5, 5) + (1 - share) * noises
    expected = np.mean((predicted - (weights * targets).sum(axis=1)) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert ess.item() == pytest.approx(np.mean(1 / (weights**2).sum(axis=1)), rel=1e-4)


@pytest.mark.parametrize("score_matching", ["gradient_assisted", "reverse_sampling", "mirror_descent"])
def test_every_diffusion_step_is_learned(monkeypatch: pytest.MonkeyPatch, score_matching: str) -> None:
    """All T of them, and not only those at which actions are drawn."""
    model = make_model(score_matching=score_matching, ent_coef=1.0)
    original, seen = model.actor.diffusion.q_sample, set()

    def spy(x_0: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        seen.update(t.flatten().tolist())
        return original(x_0, t, noise)

    monkeypatch.setattr(model.actor.diffusion, "q_sample", spy)
    encoded = model.actor.encode(batch().observations), model.critic.encode(batch().observations).detach()
    for _ in range(30):
        model._score_matching_loss(*encoded, batch().actions)
    assert seen == {0, 1, 2, 3, 4}


def test_score_target_sees_the_critics_before_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    give_batch(model, monkeypatch, batch())
    before = snapshot(model.critic)
    original = model._score_matching_loss
    unchanged = []

    def spy(*args: Any) -> tuple[th.Tensor, th.Tensor]:
        unchanged.append(not changed(before, model.critic))
        return original(*args)

    monkeypatch.setattr(model, "_score_matching_loss", spy)
    model.train(1)
    assert unchanged == [True] and changed(before, model.critic)


@pytest.mark.parametrize("clip", [True, False])
def test_actions_of_the_update_are_clipped_on_demand(clip: bool) -> None:
    model = make_model(clip_target_actions=clip, exploration_noise=2.0)
    observations = batch().next_observations
    with th.no_grad():
        actions = model._sample_actions(model.actor.encode(observations), model.critic.encode(observations))
    assert (actions.abs().max() <= 1) == clip


def test_n_target_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(n_particles=2, n_target_particles=3)
    drawn: list[int] = []
    original = model.actor.draw_noise

    def draw_noise(batch_size: int, n_particles: int) -> tuple[th.Tensor, th.Tensor | None]:
        drawn.append(n_particles)
        return original(batch_size, n_particles)

    monkeypatch.setattr(model.actor, "draw_noise", draw_noise)
    give_batch(model, monkeypatch, batch())
    model.train(1)
    model.predict(np.zeros(3, dtype=np.float32))
    assert drawn == [3, 3]
    assert make_model(n_particles=2, n_target_particles=None).policy.n_target_particles == 2


def test_data_temperature_hits_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first batch the logged effective sample size is the one asked for; an initial value is approached instead."""
    model = make_model(target_ess=0.5, n_reverse_samples=16)
    give_batch(model, monkeypatch, batch())
    model.train(1)
    assert logged(model)["reverse_ess"] == pytest.approx(8.0, rel=1e-3)

    slow = make_model(target_ess=0.5, n_reverse_samples=16, ent_coef="auto_100.0")
    give_batch(slow, monkeypatch, batch())
    slow.train(1)
    assert slow.log_ent_coef is not None
    solution = model.ent_coef_tensor.item()
    assert slow.log_ent_coef.item() == pytest.approx(0.95 * math.log(100) + 0.05 * math.log(solution), rel=1e-3)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_unit_of_the_rewards_does_not_matter(monkeypatch: pytest.MonkeyPatch, batch_norm: bool) -> None:
    """Rewards times 100 teach the same, with a temperature times 100; with a fixed scale they do not."""
    models = []
    for factor, reward_scale in ((1, "auto"), (100, "auto"), (1, 0.2), (100, 0.2)):
        model = make_model(reward_scale=reward_scale, batch_norm=batch_norm)
        data = batch()
        give_batch(model, monkeypatch, data._replace(rewards=factor * data.rewards))
        th.manual_seed(0)
        model.train(20)
        models.append(model)

    def distance(model: SDAC, other: SDAC) -> float:
        pairs = zip(snapshot(model.policy), snapshot(other.policy), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs if a.dim() > 0)  # without the temperature

    assert models[1].ent_coef_tensor.item() == pytest.approx(100 * models[0].ent_coef_tensor.item(), rel=1e-3)
    assert distance(models[0], models[1]) < 1e-3 < 1e-2 < distance(models[2], models[3])


def test_unit_of_the_rewards_enters_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Rewards times 128, the defaults, a real environment: the same weights, bit by bit, so only rounding tells units apart.

    A power of two changes no digit of a floating-point number. One thing is replaced, the logarithm in which the temperature
    is kept, which does round: here the temperature is moved by the same rule as a number.
    """

    def set_temperature(model: SDAC, q_values: th.Tensor) -> None:
        solution = sm.solve_temperature(q_values, model.target_ess * model.n_reverse_samples) / model.reward_scale_tensor
        old = temperatures.get(model, solution)
        temperatures[model] = old * (solution / old) ** TEMPERATURE_RATE

    temperatures: dict[SDAC, th.Tensor] = {}
    monkeypatch.setattr(SDAC, "_set_temperature", set_temperature)
    monkeypatch.setattr(SDAC, "ent_coef_tensor", property(lambda model: temperatures[model]))
    models = []
    for factor in (1, 128):
        env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), functools.partial(operator.mul, factor))
        model = SDAC("MlpPolicy", env, learning_starts=50, policy_kwargs={"net_arch": [32, 32]}, seed=0, device="cpu")
        start = snapshot(model.policy)
        model.learn(350)
        assert model._n_updates == 300
        assert changed(start, model.policy)
        models.append(model)
    one, many = models
    assert all(th.equal(a, b) for a, b in zip(snapshot(one.policy), snapshot(many.policy), strict=True))
    assert temperatures[many] == 128 * temperatures[one]
    assert many.reward_scale_tensor == one.reward_scale_tensor / 128


def test_scaled_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root mean square 0.2 over all batches; a rare large reward counts at most 2; zeros are left alone."""
    model = make_model()
    seen = [th.zeros(B, 1), th.zeros(B, 1), 30 * th.randn(B, 1), 2 * th.randn(B, 1)]
    for i, rewards in enumerate(seen):
        give_batch(model, monkeypatch, batch()._replace(rewards=rewards))
        model.train(1)
        scale, so_far = float(model.reward_scale_tensor), th.cat(seen[: i + 1])
        expected = 0.2 / so_far.square().mean().sqrt().item() if i > 1 else 1.0
        assert scale == pytest.approx(expected, rel=1e-5)
        assert logged(model)["reward_scale"] == pytest.approx(scale, rel=1e-5)
    model, spike = make_model(), th.zeros(B, 1)
    spike[0] = 500
    give_batch(model, monkeypatch, batch()._replace(rewards=th.zeros(B, 1)))
    for _ in range(200):
        model.train(1)
    give_batch(model, monkeypatch, batch()._replace(rewards=spike))
    model.train(1)
    assert float(model.reward_scale_tensor) * 500 == pytest.approx(2)
    assert make_model(reward_scale=0.3).reward_scale_tensor == 0.3


def test_data_temperature_is_free_of_the_reward_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Q times c gives the same weights and a coefficient times c."""
    coefficients = []
    for scale in (1.0, 100.0):
        model = make_model()
        data = batch()
        encoded = model.critic.encode(data.next_observations).detach()
        original = model.critic.q
        monkeypatch.setattr(model.critic, "q", lambda e, a, scale=scale, f=original: scale * f(e, a))
        th.manual_seed(0)
        loss, ess = model._score_matching_loss(model.actor.encode(data.next_observations), encoded, th.zeros(B, 1))
        coefficients.append((model.ent_coef_tensor.item(), loss.item(), ess.item()))
    assert coefficients[1][0] == pytest.approx(100 * coefficients[0][0], rel=1e-4)
    assert coefficients[1][1:] == pytest.approx(coefficients[0][1:], rel=1e-3)


def test_fixed_coefficient_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(ent_coef=0.3)
    give_batch(model, monkeypatch, batch())
    model.train(3)
    assert model.ent_coef_tensor.item() == pytest.approx(0.3)
    assert model.log_ent_coef is None


@pytest.mark.parametrize(("ent_coef", "target_per_dim"), [("paper", 0.9), ("paper_1.5", 1.5)])
def test_paper_temperature(monkeypatch: pytest.MonkeyPatch, ent_coef: str, target_per_dim: float) -> None:
    """It starts at 5, moves on updates 0, 250, ... only, and tends to exp(-target) / sqrt(2 pi e) / 0.1 whatever the data."""
    model = make_model(**{**PAPER_SDAC, "n_sampling_steps": 2, "n_particles": 1, "n_reverse_samples": 2, "ent_coef": ent_coef})
    assert model.ent_coef_tensor.item() == pytest.approx(5)
    give_batch(model, monkeypatch, batch())
    values = []
    for _ in range(252):
        model.train(1)
        values.append(model.ent_coef_tensor.item())
    assert np.flatnonzero(np.diff(values)).tolist() == [249]  # between the updates 249 and 250
    assert values[0] == pytest.approx(5 * math.exp(-7e-3), rel=1e-4)  # Adam's first step is its learning rate
    assert model._target_entropy is not None
    for _ in range(1500):
        model._step_paper_temperature(model._target_entropy)
    fixed_point = math.exp(-target_per_dim) / math.sqrt(2 * math.pi * math.e) / 0.1
    assert model.ent_coef_tensor.item() == pytest.approx(fixed_point, rel=1e-3)
    if ent_coef == "paper":
        assert fixed_point == pytest.approx(0.984, abs=1e-3)


def test_mirror_descent_statistics_move_on_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the actor is not stepped, and by the min Q of the next actions."""
    model = make_model(score_matching="mirror_descent", ent_coef=1.0, policy_delay=2)
    give_batch(model, monkeypatch, batch())
    mean, std = 0.0, 1.0
    for _ in range(3):
        seen: list[th.Tensor] = []

        def track(q_values: th.Tensor, seen: list[th.Tensor] = seen) -> None:
            seen.append(q_values)
            SDAC._track_q_statistics(model, q_values)

        monkeypatch.setattr(model, "_track_q_statistics", track)
        model.train(1)
        (q_values,) = seen
        assert q_values.shape == (B,)
        mean += 1e-3 * (q_values.mean().item() - mean)
        std += 1e-3 * (q_values.std(correction=0).item() - std)
        assert model.q_running_mean.item() == pytest.approx(mean, rel=1e-4)
        assert model.q_running_std.item() == pytest.approx(std, rel=1e-6)


def test_temperature_given_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``load`` is told wins over the saved coefficient; what it is told again changes nothing."""
    model = make_model(ent_coef="paper")
    give_batch(model, monkeypatch, batch())
    model.train(1)
    model.save(tmp_path / "model.zip")
    now = model.ent_coef_tensor.item()
    assert now != pytest.approx(5, rel=1e-3)
    for ent_coef, value in (("paper", now), ("auto", now), (0.2, 0.2), ("auto_0.3", 0.3), ("paper_1.5", 5.0)):
        loaded = SDAC.load(tmp_path / "model.zip", ent_coef=ent_coef)
        assert loaded.ent_coef_tensor.item() == pytest.approx(value), ent_coef
    started = SDAC.load(tmp_path / "model.zip", ent_coef="auto_0.3")
    started.policy.log_ent_coef.data.fill_(math.log(0.7))  # learned since
    started.save(tmp_path / "again.zip")
    assert SDAC.load(tmp_path / "again.zip").ent_coef_tensor.item() == pytest.approx(0.7)
    fixed = make_model(ent_coef=0.2)
    fixed.set_parameters(str(tmp_path / "model.zip"))
    assert fixed.ent_coef_tensor.item() == pytest.approx(0.2)


def test_one_noise_prediction_per_actor_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """No redundant work: the noise predictor runs once per sampling step and once for the loss, not once per candidate."""
    model = make_model(n_sampling_steps=3, n_target_particles=2)
    give_batch(model, monkeypatch, batch())
    rows: list[int] = []
    model.actor.noise_predictor.register_forward_hook(lambda module, args, output: rows.append(output.numel()))
    model.train(1)
    assert rows == [2 * B] * 3 + [B]
    rows.clear()
    model.train(1)  # the actor is not stepped on this one
    assert rows == [2 * B] * 3


def test_metrics_are_means_since_the_last_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several calls of train(), each metric over the updates that made it; the log after shows none of it again."""
    model = make_model(policy_delay=2, reward_scale=0.2, pessimism=1)
    give_batch(model, monkeypatch, batch())
    track = model._track
    tracked: dict[str, list[float]] = {}

    def spy(**metrics: th.Tensor) -> None:
        for name, value in metrics.items():
            tracked.setdefault(name, []).append(value.item())
        track(**metrics)

    monkeypatch.setattr(model, "_track", spy)
    model.train(3)
    model.train(2)
    assert {name: len(values) for name, values in tracked.items()} == {
        **{"critic_loss": 5, "q_value": 5, "ent_coef": 5},
        **{"actor_loss": 3, "reverse_ess": 3},
    }
    log = logged(model)
    for name, values in tracked.items():
        assert len(set(values)) > 1
        assert log[name] == pytest.approx(np.mean(values), rel=1e-5)
        assert type(log[name]) is float

    assert logged(model) == {}
    tracked.clear()
    model.train(1)  # the actor is not stepped on this one
    log = logged(model)
    assert set(log) == {"critic_loss", "q_value", "ent_coef", "learning_rate", "qf_learning_rate", "n_updates"}
    assert log["critic_loss"] == pytest.approx(tracked["critic_loss"][0])


def test_every_dump_of_the_logger_has_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of EvalCallback, not only that of ``dump_logs``, which comes when episodes end."""
    model = make_model()
    give_batch(model, monkeypatch, batch())
    for _ in range(2):
        model.train(3)
        assert model.logger.name_to_count["train/critic_loss"] == 3
        assert model.logger.name_to_value["train/critic_loss"] > 0
        model.logger.dump()
        assert "train/critic_loss" not in model.logger.name_to_value


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"anchor": "current"}, {"n_steps": 3}, {"score_matching": "reverse_sampling"}, PAPER_SDAC, PAPER_DPMD],
    ids=["default", "current", "n steps", "reverse sampling", "SDAC", "DPMD"],
)
def test_an_update_reads_nothing_back(kwargs: dict[str, Any], mixed_precision: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every number that Python asks for waits until all is computed; train() asks for none, from batch to log."""
    small = {"n_diffusion_steps": 5, "n_sampling_steps": 2, "n_particles": 2, "n_reverse_samples": 8, "learning_starts": 20}
    model = make_model(**{**kwargs, **small, "mixed_precision": mixed_precision})
    model.learn(20)  # fills the replay buffer

    def is_exempt(tensor: th.Tensor) -> bool:
        # Adam that is not fused, for the paper's temperature, counts its steps in a tensor on the CPU
        return any(tensor is state["step"] for state in model.ent_coef_optimizer.state.values())

    for read in (float, th.nonzero, lambda x: x[x > 0], th.where, lambda x: x.numpy()):
        with pytest.raises(AssertionError, match="was called"), nothing_read_back():
            read(th.zeros(1))
    with monkeypatch.context() as not_a_cpu, nothing_read_back(is_exempt):
        not_a_cpu.setattr(model, "_record_metrics", lambda: None)
        model.train(4, 8)
    with pytest.raises(AssertionError, match="was called"), nothing_read_back():
        model.dump_logs()  # this is the one that waits
    assert model._n_updates == 4


# Batch normalisation: critics without targets (CrossQ)


def test_batch_norm_td_target_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of the TD error come from one batch of (s, a) and (s', a'), normalised together."""
    model = make_model(batch_norm=True, gamma=0.9, reward_scale=0.5)
    assert model.critic_target is None
    data = batch()
    next_actions = th.linspace(-1, 1, B).unsqueeze(1)
    monkeypatch.setattr(model, "_sample_actions", lambda *args: next_actions)
    give_batch(model, monkeypatch, data)
    x = th.cat([th.cat([data.observations, data.actions], 1), th.cat([data.next_observations, next_actions], 1)])
    values = []
    for c in range(2):
        hidden = x.double()
        for layer in [model.critic.q_networks.first, *model.critic.q_networks.rest]:
            if isinstance(layer, EnsembleLinear):
                hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-3).sqrt()
                hidden = hidden @ layer.weight[c].detach().double() + layer.bias[c].detach().double()
            else:
                hidden = layer(hidden)
        values.append(hidden.squeeze(1))
    next_q = th.minimum(*values)[B:]
    target = 0.5 * data.rewards.squeeze(1) + (1 - data.dones.squeeze(1)) * 0.9 * next_q
    loss = sum((q_values[:B] - target).square().mean().item() for q_values in values)
    model.train(1)
    assert logged(model)["critic_loss"] == pytest.approx(loss, rel=1e-4)


def test_batch_norm_has_no_gradient_through_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(batch_norm=True)
    data = batch()
    outputs, next_q_values = model._critic_outputs(data, data.actions)
    assert outputs.requires_grad and not next_q_values.requires_grad
    assert outputs.shape == (2, B, 1) and next_q_values.shape == (2, B)


def test_running_statistics_approach_those_of_the_batch() -> None:
    """Folded into the layers they give what normalising the batch itself gives, once they have seen enough of it."""
    critic = make_model(batch_norm=True).critic
    obs, actions = 3 * th.randn(4096, 3) + 1, 2 * th.rand(4096, 1) - 1
    with th.no_grad():
        before = critic.q_values(critic.encode(obs), actions)
        for _ in range(1000):
            values = critic.values(critic.outputs(obs, actions, normalise_batch=True))
        after = critic.q_values(critic.encode(obs), actions)
    assert (before - values).abs().max() > 0.1
    th.testing.assert_close(after, values, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    "stds, scales",
    [
        ([3.0, 4.0], [1.0, 1.0]),
        ([100.0, 100.0], [200**0.5 / 100] * 2),
        ([1.0, 1.0, 50.0], [1.0, 1.0, 398**0.5 / 50]),  # any power of 1 is 1, so the others have the rest of 400
        ([1e-3] * 900, [1.0] * 900),
        ([1.0] * 900, [20 / 30] * 900),  # no power of 1 helps
        ([50.0] * 900, [20 / 30 / 50] * 900),
    ],
    ids=["below", "equal", "units", "many small", "many units", "many"],
)
def test_limiting_scale(stds: list[float], scales: list[float]) -> None:
    """Worked out by hand for a norm of 20."""
    th.testing.assert_close(limiting_scale(th.tensor(stds), 20.0), th.tensor(scales), rtol=1e-4, atol=0)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_limiting_scale_is_a_power(spread: float) -> None:
    """Those of 300 features as they may come: one power for all, between 0 and 1, and the norm is the largest allowed."""
    stds = 30 * (spread * th.rand(300)).exp()
    scales = limiting_scale(stds, 20.0)
    powers = -scales.log() / stds.log()
    th.testing.assert_close(powers, powers[:1].expand(300), rtol=1e-4, atol=0)
    assert 0 < powers[0] < 1
    assert (stds * scales).norm().item() == pytest.approx(20, rel=1e-4)


@pytest.mark.parametrize("before", [False, True])
def test_updates_count_denormals_as_zero(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    """Within updates, also where one raises; outside it is as it was."""

    def denormal() -> float:
        return (th.tensor(1e-39) * 1).item()

    seen: list[float] = []

    def update(*args: Any) -> dict[str, th.Tensor]:
        seen.append(denormal())
        if len(seen) == 3:
            raise KeyError
        return {}

    model = make_model()
    monkeypatch.setattr(model, "_run_update", update)
    give_batch(model, monkeypatch, batch())
    assert th.set_flush_denormal(before)
    try:
        outside = [denormal()]
        model.train(2)
        outside.append(denormal())
        with pytest.raises(KeyError):
            model.train(1)
        outside.append(denormal())
    finally:
        th.set_flush_denormal(False)
    assert seen == [0, 0, 0]
    assert outside == [0, 0, 0] if before else all(outside)


def test_acting_leaves_the_statistics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the critics and of the actor; an averaged actor gets the actor's as they are."""
    model = make_model(batch_norm=True, average_actor=True, target_update_interval=1)
    assert model.actor_target is not None
    data = batch()  # observations beyond the limit of their norm, so that their scale moves, too
    data = data._replace(observations=1000 * data.observations, next_observations=1000 * data.next_observations)
    give_batch(model, monkeypatch, data)
    norm, norm_target = model.actor.noise_predictor.norm, model.actor_target.noise_predictor.norm
    assert isinstance(norm, NormLimit)
    statistics: list[th.Tensor] = [*model.critic.q_networks.buffers(), *norm.buffers()]
    before = [buffer.clone() for buffer in statistics]
    model.predict(model.observation_space.sample())
    model._score_matching_loss(model.actor.encode(data.observations), model.critic.encode(data.observations), data.actions)
    assert all(map(th.equal, before, statistics)) and len(before) == 2 * 2 + 3
    model.train(1)
    assert not any(map(th.equal, before, statistics))
    assert all(map(th.equal, norm.buffers(), norm_target.buffers()))


def test_a_batch_of_one_has_no_variance() -> None:
    model = make_model(batch_norm=True, batch_size=1, learning_starts=5)
    model.learn(10)
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())


def test_batch_norm_with_dict_observations() -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Box(-1, 1, (3,), np.float32)})
    first, second = ({key: th.randn(4, *box.shape) for key, box in space.items()} for _ in range(2))  # type: ignore[misc]
    joined = _concatenate(first, second)
    assert isinstance(joined, dict) and joined.keys() == first.keys()
    for key in first:
        assert th.equal(joined[key], th.cat([first[key], second[key]]))


def test_few_rows_are_normalised_like_many() -> None:
    """Layers scale their inputs where these are fewer than the weights, and else their weights; the values are the same."""
    critic = make_model(batch_norm=True).critic
    obs, actions = 3 * th.randn(64, 3) + 1, 2 * th.rand(64, 1) - 1
    with th.no_grad():
        for _ in range(50):
            critic.outputs(obs, actions, normalise_batch=True)
        many = critic.q_values(critic.encode(obs), actions)
        few = th.cat([critic.q_values(critic.encode(obs[i : i + 2]), actions[i : i + 2]) for i in range(0, 64, 2)], dim=1)
    th.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)


# Critics that give distributions over values (HL-Gauss)


def test_targets_keep_their_mean() -> None:
    """Also in batches, as long as the tails of the target's distribution lie between the outermost values."""
    bins = ValueBins(101, 200.0)
    assert (bins.support[0], bins.support[50], bins.support[-1]) == pytest.approx((-200, 0, 200))
    targets = th.tensor([[0.0, 1e-3, -1.3], [8.0, 17.3, -44.4]])
    probabilities = bins.project(targets)
    assert probabilities.shape == (2, 3, 101) and probabilities.min() > -1e-6
    th.testing.assert_close(probabilities.sum(dim=-1), th.ones(2, 3))
    th.testing.assert_close(bins.mean(probabilities.clamp(min=1e-30).log()), targets, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [0.0, 0.3, -15.2, 120.0])
def test_projection_by_numerical_integration(target: float) -> None:
    """The weight of a value is the mean of its hat function over a normal distribution of 0.75 local widths."""
    bins = ValueBins(101, 200.0)
    support = bins.support.double().numpy()
    width = (np.arcsinh(20) / 50) * np.hypot(target, 10)  # of a bin there: d value / d asinh(value / 10) = hypot(value, 10)
    grid = target + 0.75 * width * np.linspace(-8, 8, 200_001)
    density = np.exp(-0.5 * ((grid - target) / (0.75 * width)) ** 2)
    density /= density.sum()
    expected = [density @ np.interp(grid, support, np.eye(101)[i]) for i in range(101)]
    np.testing.assert_allclose(bins.project(th.tensor(target)), expected, atol=1e-5)


def test_targets_out_of_range_count_as_the_largest_value() -> None:
    bins = ValueBins(101, 200.0)
    th.testing.assert_close(bins.project(th.tensor([1e4, -1e4])), bins.project(th.tensor([200.0, -200.0])), rtol=0, atol=0)
    assert bins.mean(bins.project(th.tensor(1e4)).clamp(min=1e-30).log()) == pytest.approx(200, rel=0.03)


def test_cross_entropy_learns_the_mean_of_the_targets() -> None:
    """One distribution for many targets is worth their mean, as with squared errors."""
    bins = ValueBins(101, 200.0)
    targets = th.tensor([3.0, 4.0, 4.5, 20.0])
    logits = th.zeros(101, requires_grad=True)
    optimizer = th.optim.Adam([logits], lr=0.1)
    for _ in range(2000):
        optimizer.zero_grad()
        bins.loss(logits, targets).mean().backward()
        optimizer.step()
    assert bins.mean(logits).item() == pytest.approx(targets.mean().item(), rel=1e-3)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_critic_loss_of_distributions_by_hand(monkeypatch: pytest.MonkeyPatch, batch_norm: bool) -> None:
    """Cross-entropy against the TD target, made from the values of the next distributions."""
    model = make_model(batch_norm=batch_norm, n_bins=21, gamma=0.9, reward_scale=0.5, pessimism=1.0)
    data = batch()
    next_actions = th.linspace(-1, 1, B).unsqueeze(1)
    monkeypatch.setattr(model, "_sample_actions", lambda *args: next_actions)
    give_batch(model, monkeypatch, data)
    outputs, next_q_values = (x.detach() for x in model._critic_outputs(data, next_actions))
    assert outputs.shape == (2, B, 21) and next_q_values.shape == (2, B)
    support = 10 * np.sinh(np.arcsinh(2) * np.linspace(-1, 1, 21))  # up to 20 = 2 / (1 - gamma)
    if not batch_norm:
        assert model.critic_target is not None
        logits = model.critic_target.outputs(data.next_observations, next_actions, normalise_batch=False).detach()
        by_hand = logits.double().softmax(-1).numpy() @ support
        np.testing.assert_allclose(next_q_values, by_hand, rtol=1e-4, atol=1e-5)
    target = 0.5 * data.rewards.squeeze(1) + (1 - data.dones.squeeze(1)) * 0.9 * next_q_values.amin(dim=0)
    bins = ValueBins(21, 20.0)
    loss = -(bins.project(target) * outputs.log_softmax(-1)).sum(-1).mean(1).sum()
    model.train(1)
    metrics = logged(model)
    assert metrics["critic_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["q_value"] == pytest.approx((outputs.double().softmax(-1).numpy() @ support).mean(), rel=1e-3, abs=1e-5)
    assert metrics["targets_out_of_range"] == 0


@pytest.mark.parametrize("kwargs, largest", [({"gamma": 0.95}, 40), ({"gamma": 1.0}, 2e4), ({"max_value": 7.0}, 7)])
def test_largest_value(kwargs: dict[str, float], largest: float, tmp_path: Path) -> None:
    """From the discount factor unless given; weights that were learned with it keep it."""
    policy_kwargs = {"net_arch": [16], **{name: kwargs[name] for name in kwargs if name == "max_value"}}
    model = make_model(n_bins=21, gamma=kwargs.get("gamma", 0.99), policy_kwargs=policy_kwargs)
    model.save(tmp_path / "model.zip")
    for each in (model, SDAC.load(tmp_path / "model.zip"), SDAC.load(tmp_path / "model.zip", gamma=0.9)):
        assert each.critic.q_networks.bins is not None
        assert each.critic.q_networks.bins.support[[0, -1]].tolist() == pytest.approx([-largest, largest])


def test_values_begin_near_zero() -> None:
    critic = make_model(n_bins=101).critic
    values = critic.q_values(critic.encode(th.randn(50, 3)), 2 * th.rand(50, 1) - 1)
    assert 0 < values.abs().max() < 0.5


@pytest.mark.parametrize(
    "kwargs, share, words",
    [
        ({"reward_scale": 1.0}, 1 / B, "beyond 200 in size.*a smaller reward_scale"),
        ({"policy_kwargs": {"net_arch": [16], "max_value": 0.1}}, 1 / B, "beyond 0.1 in size.*a larger policy_kwargs"),
        ({"n_bins": 1, "reward_scale": 1.0}, None, ""),
    ],
    ids=["fixed scale", "auto", "plain values"],
)
def test_targets_out_of_range_are_said(
    kwargs: dict[str, Any], share: float | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rewards that make larger values than the distributions reach; not with plain values."""
    model = make_model(**{"n_bins": 101, "reward_scale": "auto", **kwargs})
    data = batch()
    rewards = 0 * data.rewards
    rewards[1] = -1000.0
    give_batch(model, monkeypatch, data._replace(rewards=rewards))
    with pytest.warns(UserWarning, match=words) if share else nullcontext():
        model.train(1)
    assert logged(model).get("targets_out_of_range") == share
