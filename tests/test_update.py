"""One update on a batch made by hand: targets, losses, who learns from what, and what options, bfloat16 and PyTorch change."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.update_helpers import (
    OPTIONS,
    B,
    batch,
    changed,
    give_q,
    make_policy,
    make_update,
    options,
    score_matching_loss,
    snapshot,
    state,
)
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples

from sb3_sdac import score_matching as sm
from sb3_sdac.compilation import has_bfloat16, rounded_products
from sb3_sdac.layers import MAX_FEATURE_NORM, EnsembleLinear, NormLimit
from sb3_sdac.options import UpdateOptions
from sb3_sdac.update import Update, concatenate, rounds_products
from sb3_sdac.value_bins import ValueBins

# The critics' loss


@pytest.mark.parametrize("discounts", [None, th.linspace(0.1, 0.9, B).unsqueeze(1)], ids=["one step", "n steps"])
@pytest.mark.parametrize("pessimism", [0, 0.3, 1])
def test_td_target_by_hand(pessimism: float, discounts: th.Tensor | None) -> None:
    """y = scale r + (1 - done) discount Q_target(s', a'), and the loss sums the critics' mean squared errors."""
    update, data = make_update(pessimism=pessimism), batch(discounts)
    critic, critic_target = update.policy.critic, update.policy.critic_target
    assert critic_target is not None
    for parameter in critic_target.parameters():
        parameter.data.mul_(1.5)  # or they would be the same networks
    next_actions = th.linspace(-1, 1, B).unsqueeze(1)
    loss, metrics = update.critic_loss(data, next_actions, options(gamma=0.9, reward_scale=0.5))
    next_q_values = th.cat(critic_target(data.next_observations, next_actions), dim=1)  # (B, 2)
    next_q = next_q_values.mean(dim=1) - pessimism * (next_q_values[:, 0] - next_q_values[:, 1]).abs() / 2
    current_q = critic(data.observations, data.actions)
    expected = 0.0
    for q_values in current_q:
        for i in range(B):
            discount = 0.9 if discounts is None else discounts[i].item()
            target = 0.5 * data.rewards[i].item() + (1 - data.dones[i].item()) * discount * next_q[i].item()
            expected += (q_values[i].item() - target) ** 2 / B
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["q_value"].item() == pytest.approx(th.cat(current_q).mean().item(), rel=1e-4)
    assert metrics["critic_loss"] is loss and metrics.keys() == {"critic_loss", "q_value"}


def test_q_is_the_mean_until_a_terminal_state_is_met() -> None:
    """pessimism="auto": the mean of the critics, and the least of them from the first batch with a terminal state on."""
    update, data = make_update(pessimism="auto"), batch()
    q_values = th.tensor([[1.0, 5.0], [3.0, 4.0]])  # (C, 2)
    expected = {0.0: [2.0, 4.5], 1.0: [1.0, 4.0]}
    for dones, pessimism in ((0 * data.dones, 0.0), (data.dones, 1.0), (0 * data.dones, 1.0)):
        _, metrics = update.critic_loss(data._replace(dones=dones), data.actions, OPTIONS)
        assert update.policy.pessimistic(q_values).tolist() == expected[pessimism]
        assert metrics["pessimism"].item() == pessimism
    update.policy.pessimism = 0.5
    assert update.policy.pessimistic(q_values).tolist() == [1.5, 4.25]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_critic_loss_of_distributions_by_hand(batch_norm: bool) -> None:
    """Cross-entropy against the TD target, made from the values of the next distributions."""
    update = make_update(batch_norm=batch_norm, n_bins=21, max_value=20.0, pessimism=1.0)
    data, next_actions = batch(), th.linspace(-1, 1, B).unsqueeze(1)
    outputs, next_q_values = (x.detach() for x in update.critic_outputs(data, next_actions))
    assert outputs.shape == (2, B, 21) and next_q_values.shape == (2, B)
    support = 10 * np.sinh(np.arcsinh(2) * np.linspace(-1, 1, 21))
    if not batch_norm:
        assert update.policy.critic_target is not None
        logits = update.policy.critic_target.outputs(data.next_observations, next_actions, normalise_batch=False).detach()
        by_hand = logits.double().softmax(-1).numpy() @ support
        np.testing.assert_allclose(next_q_values, by_hand, rtol=1e-4, atol=1e-5)
    target = 0.5 * data.rewards.squeeze(1) + (1 - data.dones.squeeze(1)) * 0.9 * next_q_values.amin(dim=0)
    expected = -(ValueBins(21, 20.0).project(target) * outputs.log_softmax(-1)).sum(-1).mean(1).sum()
    loss, metrics = update.critic_loss(data, next_actions, options(gamma=0.9, reward_scale=0.5))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    mean_value = (outputs.double().softmax(-1).numpy() @ support).mean()
    assert metrics["q_value"].item() == pytest.approx(mean_value, rel=1e-3, abs=1e-5)
    assert metrics["targets_out_of_range"] == 0


def test_share_of_targets_out_of_range() -> None:
    update, data = make_update(n_bins=21, max_value=20.0), batch()
    rewards = data.rewards.clone()
    rewards[1], rewards[4] = -1000.0, 1000.0
    _, metrics = update.critic_loss(data._replace(rewards=rewards), data.actions, options(reward_scale=1.0))
    assert metrics["targets_out_of_range"] == 2 / B


def test_batch_norm_td_target_by_hand() -> None:
    """Both sides of the TD error come from one batch of (s, a) and (s', a'), normalised together (CrossQ)."""
    update, data = make_update(batch_norm=True), batch()
    critic = update.policy.critic
    assert update.policy.critic_target is None
    next_actions = th.linspace(-1, 1, B).unsqueeze(1)
    x = th.cat([th.cat([data.observations, data.actions], 1), th.cat([data.next_observations, next_actions], 1)])
    values = []
    for c in range(2):
        hidden = x.double()
        for layer in [critic.q_networks.first, *critic.q_networks.rest]:
            if isinstance(layer, EnsembleLinear):
                hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-3).sqrt()
                hidden = hidden @ layer.weight[c].detach().double() + layer.bias[c].detach().double()
            else:
                hidden = layer(hidden)
        values.append(hidden.squeeze(1))
    next_q = th.minimum(*values)[B:]
    target = 0.5 * data.rewards.squeeze(1) + (1 - data.dones.squeeze(1)) * 0.9 * next_q
    expected = sum((q_values[:B] - target).square().mean().item() for q_values in values)
    loss, _ = update.critic_loss(data, next_actions, options(gamma=0.9, reward_scale=0.5))
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_no_gradient_through_the_target(batch_norm: bool) -> None:
    data = batch()
    outputs, next_q_values = make_update(batch_norm=batch_norm).critic_outputs(data, data.actions)
    assert outputs.requires_grad and not next_q_values.requires_grad
    assert outputs.shape == (2, B, 1) and next_q_values.shape == (2, B)


def test_observations_in_one_batch() -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Box(-1, 1, (3,), np.float32)})
    first, second = ({key: th.randn(4, *box.shape) for key, box in space.items()} for _ in range(2))  # type: ignore[misc]
    joined = concatenate(first, second)
    assert isinstance(joined, dict) and joined.keys() == first.keys()
    for key in first:
        assert th.equal(joined[key], th.cat([first[key], second[key]]))
    assert th.equal(concatenate(th.zeros(2, 3), th.ones(2, 3)), th.tensor([[0.0] * 3] * 2 + [[1.0] * 3] * 2))  # type: ignore[arg-type]


# The actor's loss


def test_reward_scale_and_temperature_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q proportional to the scaled rewards, the weights do not depend on the scale: ent_coef has the reward's unit."""
    results = []
    for scale, of_q in ((0.2, 0.2), (20.0, 20.0), (20.0, 0.2)):
        update = make_update(ent_coef=0.7)
        give_q(monkeypatch, update, lambda actions, of_q=of_q: of_q * actions.sum(-1))  # type: ignore[misc]
        results.append(score_matching_loss(update, batch(), options(reward_scale=scale, score_matching="reverse_sampling")))
    th.testing.assert_close(results[0], results[1])
    assert results[2][1] > 1.01 * results[0][1]


@pytest.mark.parametrize("score_matching", sm.SCORE_TARGETS)
def test_actor_loss_touches_the_actor_only(score_matching: str) -> None:
    update = make_update()
    loss, _ = score_matching_loss(update, batch(), options(score_matching=score_matching))
    loss.backward()
    policy = update.policy
    assert policy.critic_target is not None
    assert all(parameter.grad is None for parameter in [*policy.critic.parameters(), *policy.critic_target.parameters()])
    assert all(parameter.grad is not None for parameter in policy.actor.noise_predictor.parameters())


def test_gradient_assisted_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q = -4 (a - 0.3)^2 and random numbers of ours, everything after the prediction in NumPy."""
    update, data = make_update(ent_coef=2.0, n_diffusion_steps=B), batch()
    rng = np.random.default_rng(0)
    t, noise, noises = np.arange(B)[:, None], rng.normal(size=(B, 1)), rng.normal(size=(B, 8, 1))
    x_0 = rng.uniform(-1, 1, (B, 8, 1))

    def tensor(array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array, dtype=th.float32)

    monkeypatch.setattr(th, "randint", lambda *args, **kwargs: th.as_tensor(t))
    monkeypatch.setattr(th, "randn_like", lambda *args, **kwargs: tensor(noise))
    proposal = (lambda *args: (tensor(x_0), tensor(noises)), lambda *args, **kwargs: None)
    monkeypatch.setitem(sm.PROPOSALS, "by hand", proposal)
    give_q(monkeypatch, update, lambda actions: -4 * (actions - 0.3).square().sum(-1))
    actor, diffusion = update.policy.actor, update.policy.actor.sampler.diffusion
    encoded_actor = actor.encode(data.observations)
    loss, ess = update.score_matching_loss(
        encoded_actor, data.observations, data.actions, options(proposal="by hand", reward_scale=0.5)
    )

    x_t = diffusion.q_sample(data.actions, th.as_tensor(t), tensor(noise))
    predicted = actor.predict_noise(encoded_actor, x_t, th.as_tensor(t)).detach().numpy()
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


def test_every_diffusion_step_is_learned() -> None:
    """All T of them, and not only those at which actions are drawn; x_t and the prediction belong to t and the noise."""
    update, data = make_update(), batch()
    actor, seen = update.policy.actor, set()
    for _ in range(30):
        encoded_actor = actor.encode(data.observations)
        t, noise, x_t, predicted = update.noised(encoded_actor, data.actions)
        assert th.equal(x_t, actor.sampler.diffusion.q_sample(data.actions, t, noise))
        assert th.equal(predicted, actor.predict_noise(encoded_actor, x_t, t)) and predicted.requires_grad
        seen.update(t.flatten().tolist())
    assert seen == {0, 1, 2, 3, 4}


def test_a_new_score_target_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed candidates, weights and temperature, with Q's gradients if it asks for them, and the actor learns by it."""
    calls: list[sm.Candidates] = []

    def towards_zero(
        diffusion: Any, t: th.Tensor, predicted: th.Tensor, candidates: sm.Candidates, weights: th.Tensor, temperature: Any
    ) -> th.Tensor:
        calls.append(candidates)
        assert t.shape == (B, 1) and predicted.shape == (B, 2) and weights.shape == candidates.q_values.shape == (B, 8)
        th.testing.assert_close(weights, sm.softmax_weights(candidates.q_values, temperature))
        return predicted.square().mean()

    for needs_gradients in (False, True):
        monkeypatch.setitem(sm.SCORE_TARGETS, "towards zero", sm.ScoreTarget(towards_zero, needs_gradients))
        update, data = make_update(action_dim=2), batch(action_dim=2)
        chosen = options(score_matching="towards zero")
        losses = [update(data, chosen, step_actor=True, step_targets=False)["actor_loss"].item() for _ in range(100)]
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
        gradients = calls[-1].gradients
        assert calls[-1].noise.shape == (B, 8, 2)
        assert (None if gradients is None else gradients.shape) == ((B, 8, 2) if needs_gradients else None)


@pytest.mark.parametrize("needs_gradients", [True, False])
def test_q_and_its_gradient(needs_gradients: bool) -> None:
    """By finite differences; nothing of it reaches the critics."""
    update = make_update(action_dim=2, pessimism=0.0)
    encoded_critic = update.encode_critic(batch().observations)
    x_0 = 2 * th.rand(B, 4, 2, generator=th.Generator().manual_seed(0)) - 1
    with th.no_grad():
        q_values, gradients = update.q_values_and_gradients(encoded_critic, x_0.clone(), OPTIONS, needs_gradients)
    assert th.equal(q_values, update.policy.q(encoded_critic, x_0)) and not q_values.requires_grad
    assert (gradients is not None) == needs_gradients
    if gradients is not None:
        step = 1e-2 * th.tensor([1.0, 0.0])
        difference = update.policy.q(encoded_critic, x_0 + step) - update.policy.q(encoded_critic, x_0 - step)
        th.testing.assert_close(gradients[..., 0], difference.detach() / 2e-2, rtol=1e-2, atol=1e-3)
    assert all(parameter.grad is None for parameter in update.policy.parameters())


# The actions of the update


@pytest.mark.parametrize("clip", [True, False])
def test_actions_are_clipped_on_demand(clip: bool) -> None:
    update = make_update(exploration_noise=2.0)
    observations = batch().next_observations
    encoded = update.policy.actor.encode(observations)
    actions = update.draw_actions(encoded, observations, options(clip_target_actions=clip))
    assert (actions.abs().max() <= 1) == clip and not actions.requires_grad


@pytest.mark.parametrize(("n_train_particles", "drawn"), [(3, 3), (None, 2)])
def test_one_noise_prediction_per_actor_update(n_train_particles: int | None, drawn: int) -> None:
    """No redundant work: the noise predictor runs once per sampling step and once for the loss, not once per candidate."""
    update = make_update(n_sampling_steps=3, n_train_particles=n_train_particles)
    rows: list[int] = []
    update.policy.actor.noise_predictor.register_forward_hook(lambda module, args, output: rows.append(output.numel()))
    update(batch(), OPTIONS, step_actor=True, step_targets=True)
    assert rows == [drawn * B] * 3 + [B]
    rows.clear()
    update(batch(), OPTIONS, step_actor=False, step_targets=True)
    assert rows == [drawn * B] * 3


@pytest.mark.parametrize("noised_actions", ["next", "current"])
@pytest.mark.parametrize("n_train_particles", [1, 2])
def test_features_are_extracted_no_more_than_needed(n_train_particles: int, noised_actions: str) -> None:
    """The actor's where actions are drawn; the critics' to learn, to weigh candidates, and to choose if there is a choice."""
    update = make_update(n_train_particles=n_train_particles)
    calls: list[str] = []
    for name in ("actor", "critic", "critic_target"):
        extractor = getattr(update.policy, name).features_extractor
        extractor.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
    for step_actor in (True, False):
        calls.clear()
        update(batch(), options(noised_actions=noised_actions), step_actor, step_targets=True)
        draws = 2 if step_actor and noised_actions == "current" else 1
        critic = 1 + step_actor + draws * (n_train_particles > 1)
        assert Counter(calls) == {"actor": draws, "critic": critic, "critic_target": 1}


# One update as a whole


class Recorded(Update):
    """Looks at what score matching is handed, and when."""

    def __init__(self, policy: Any, look: Callable[..., None]):
        super().__init__(policy)
        self.look = look

    def score_matching_loss(
        self, encoded_actor: th.Tensor, obs: PyTorchObs, actions: th.Tensor, options: UpdateOptions
    ) -> tuple[th.Tensor, th.Tensor]:
        self.look(encoded_actor, obs, actions)
        return super().score_matching_loss(encoded_actor, obs, actions, options)


@pytest.mark.parametrize("noised_actions", ["next", "current"])
def test_score_matching_is_handed_what_belongs_together(noised_actions: str) -> None:
    """Observations, and their encoding by an actor as it is before the update's steps."""
    policy, data = make_policy(), batch()
    observations = data.next_observations if noised_actions == "next" else data.observations
    before, calls = snapshot(policy.critic), []

    def look(encoded_actor: th.Tensor, obs: th.Tensor, actions: th.Tensor) -> None:
        calls.append(actions)
        assert obs is observations and encoded_actor.requires_grad and not actions.requires_grad
        assert th.equal(encoded_actor, policy.actor.encode(observations))
        assert not changed(before, policy.critic)

    update = Recorded(policy, look)
    update(data, options(noised_actions=noised_actions), step_actor=True, step_targets=True)
    assert len(calls) == 1 and changed(before, policy.critic)
    update(data, options(noised_actions=noised_actions), step_actor=False, step_targets=True)
    assert len(calls) == 1


@pytest.mark.parametrize("step_targets", [True, False])
@pytest.mark.parametrize("step_actor", [True, False])
def test_who_learns(step_actor: bool, step_targets: bool) -> None:
    """The critics always, the others when it is their turn; a loss leaves no gradient on other networks."""
    update = make_update(average_actor=True)
    before = {name: snapshot(getattr(update.policy, name)) for name in ("actor", "critic", "actor_target", "critic_target")}
    metrics = update(batch(), OPTIONS, step_actor, step_targets)
    found = {name for name, parameters in before.items() if changed(parameters, getattr(update.policy, name))}
    targets = {"critic_target", "actor_target"} if step_targets else set()
    assert found == {"critic"} | ({"actor"} if step_actor else set()) | targets
    assert step_actor or all(parameter.grad is None for parameter in update.policy.actor.parameters())
    of_actor = {"actor_loss", "reverse_ess"} if step_actor else set()
    assert metrics.keys() == {"critic_loss", "q_value", "ent_coef", "reward_scale", "pessimism"} | of_actor
    assert all(value.numel() == 1 for value in metrics.values())


def test_targets_are_polyak_averages() -> None:
    update = make_update(average_actor=True)
    policy = update.policy
    for network in (policy.actor, policy.critic):
        for parameter in network.parameters():
            parameter.data.add_(1.0)
    before = {name: snapshot(getattr(policy, name)) for name in ("critic_target", "actor_target")}
    update.step_targets(0.25)
    for target_name, name in (("critic_target", "critic"), ("actor_target", "actor")):
        online = getattr(policy, name).parameters()
        for old, new, target in zip(before[target_name], online, getattr(policy, target_name).parameters(), strict=True):
            th.testing.assert_close(target.data, 0.75 * old + 0.25 * new.data)


def test_acting_leaves_the_statistics_alone() -> None:
    """Those of the critics and of the actor, and score matching does; an averaged actor gets the actor's as they are."""
    update = make_update(batch_norm=True, average_actor=True)
    policy = update.policy
    assert policy.actor_target is not None
    data = batch()  # observations beyond the limit of their norm, so that their scale moves, too
    data = data._replace(observations=1000 * data.observations, next_observations=1000 * data.next_observations)
    norm, norm_target = policy.actor.noise_predictor.norm, policy.actor_target.noise_predictor.norm
    assert isinstance(norm, NormLimit)
    statistics: list[th.Tensor] = [*policy.critic.q_networks.buffers(), *norm.buffers()]
    before = [buffer.clone() for buffer in statistics]
    policy.predict(data.observations.numpy())
    score_matching_loss(update, data, OPTIONS)
    assert all(map(th.equal, before, statistics)) and len(before) == 2 * 2 + 3
    policy.set_training_mode(True)
    update(data, OPTIONS, step_actor=True, step_targets=True)
    assert not any(map(th.equal, before, statistics))
    assert all(map(th.equal, norm.buffers(), norm_target.buffers()))


# Options


def test_options_are_compared_by_value() -> None:
    """A captured update is replayed for equal ones only, and nobody changes them under it."""
    same = UpdateOptions(**dataclasses.asdict(OPTIONS))
    assert same == OPTIONS and same is not OPTIONS and hash(same) == hash(OPTIONS)
    assert len({OPTIONS, same, options(gamma=0.5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        same.gamma = 0.5  # type: ignore[misc]


#: Another value of every option
OTHERS: dict[str, Any] = {
    "gamma": 0.9,
    "tau": 0.5,
    "n_reverse_samples": 7,
    "score_matching": "reverse_sampling",
    "proposal": "clipped_normal",
    "noised_actions": "current",
    "target_ess": 0.6,
    "clip_target_actions": False,
    "reward_scale": 0.7,
    "temperature_rate": 0.05,
    "mixed_precision": True,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(UpdateOptions)])
def test_every_option_changes_the_update(name: str) -> None:
    """Given the same random numbers; with the same option it is the same, bit by bit."""
    base = options(temperature_rate=0.5)
    results = []
    for chosen in (base, base, dataclasses.replace(base, **{name: OTHERS[name]})):
        update = make_update(exploration_noise=1.0)
        th.manual_seed(0)
        for _ in range(2):
            update(batch(), chosen, step_actor=True, step_targets=True)
        results.append(state(update))
    first, again, other = results
    assert all(th.equal(value, again[key]) for key, value in first.items())
    assert any(not th.equal(value, other[key]) for key, value in first.items())


# Mixed precision: how much bfloat16 changes, where it is at work, and what stays float32. In the size of HalfCheetah-v5

LARGE, OBS_DIM, ACTION_DIM = 256, 17, 6
MIXED = options(n_reverse_samples=4, mixed_precision=True)
#: Where PyTorch's products of float32 can round; elsewhere only sampling uses bfloat16, which is then slow
ROUNDS = has_bfloat16(th.device("cpu"))


def make_large(**kwargs: Any) -> Update:
    """With the networks that models have by default; running statistics stay as they are from one computation to the next."""
    defaults = {"net_arch": [256, 256, 256], "n_diffusion_steps": 20, "n_sampling_steps": 5, "batch_norm": True, "n_bins": 101}
    update = make_update(obs_dim=OBS_DIM, action_dim=ACTION_DIM, **{**defaults, **kwargs})
    update.policy.set_training_mode(False)
    return update


def large_batch() -> ReplayBufferSamples:
    return batch(size=LARGE, obs_dim=OBS_DIM, action_dim=ACTION_DIM)


def in_both(update: Update, function: Callable[[UpdateOptions], Any]) -> Iterator[Any]:
    """What the function returns in float32 and with bfloat16, as within an update, given the same random numbers."""
    for mixed_precision in (False, True):
        chosen = dataclasses.replace(MIXED, mixed_precision=mixed_precision)
        th.manual_seed(0)
        with rounded_products(rounds_products(update.policy, chosen)):
            yield function(chosen)


def draw(update: Update) -> Iterator[th.Tensor]:
    obs = large_batch().next_observations
    return in_both(update, lambda chosen: update.draw_actions(update.policy.actor.encode(obs), obs, chosen))


def with_a_high_level(update: Update) -> None:
    """Q around 100 through the last layer's bias, differences between actions around 1 through its weights."""
    *_, last = update.policy.critic.q_networks.rest
    assert isinstance(last, EnsembleLinear)
    with th.no_grad():
        last.weight.mul_(50)
        last.bias.fill_(100)


def with_learned_values(update: Update) -> None:
    """Critics that have learned Q = 100 + tanh(v s) - |a - tanh(W s)|^2, the level from their hidden layers, too."""
    critic, generator = update.policy.critic, th.Generator().manual_seed(0)
    w, v = (th.randn(OBS_DIM, n, generator=generator) / OBS_DIM**0.5 for n in (ACTION_DIM, 1))
    optimizer = th.optim.Adam(critic.parameters(), lr=2e-3, fused=True)
    for _ in range(300):
        s = th.randn(LARGE, OBS_DIM, generator=generator)
        a = 2 * th.rand(LARGE, ACTION_DIM, generator=generator) - 1
        q = 100 + (s @ v).tanh().squeeze(1) - (a - (s @ w).tanh()).square().sum(dim=1)
        optimizer.zero_grad()
        critic.loss(critic.outputs(s, a, normalise_batch=True), q).mean().backward()
        optimizer.step()
    critic.optimizer.zero_grad()


@pytest.mark.parametrize("beta_schedule, bound", [("linear", 2e-3), ("vp", 1e-2)])
def test_actions_without_a_choice(beta_schedule: str, bound: float) -> None:
    """A single particle moves by little, except the few that start near where the sampling chain forks."""
    actions, mixed = draw(make_large(beta_schedule=beta_schedule))
    assert mixed.dtype == th.float32
    differences = (mixed - actions).abs()
    assert 0 < differences.mean() < 2e-3
    assert differences.flatten().quantile(0.99) < bound
    assert (differences.amax(dim=1) > 0.01).float().mean() < 0.03


def test_actions_of_large_features() -> None:
    """Features of the largest norm are rounded more: 99 of 100 actions still by less than the exploration noise."""
    update = make_large()
    norm = update.policy.actor.noise_predictor.norm
    assert isinstance(norm, NormLimit)
    norm.running_scale.fill_(MAX_FEATURE_NORM / OBS_DIM**0.5)
    actions, mixed = draw(update)
    differences = (mixed - actions).abs()
    assert 0 < differences.mean() < 5e-3
    assert differences.flatten().quantile(0.99) < update.policy.exploration_noise


@pytest.mark.parametrize(
    "prepare, n_bins",
    [(None, 1), (with_a_high_level, 1), (with_learned_values, 1), (with_learned_values, 101)],
    ids=["fresh", "level", "learned", "distributions"],
)
def test_actions_with_a_choice(prepare: Callable[[Update], None] | None, n_bins: int) -> None:
    """Where the critics choose another particle, they do so among equals: hardly any value is lost by it."""
    update = make_large(n_train_particles=4, n_bins=n_bins)
    if prepare is not None:
        prepare(update)
    actions, mixed = draw(update)
    assert 0 < ((mixed - actions).abs().amax(dim=1) > 0.01).float().mean() < 0.1
    with th.no_grad():
        encoded_critic = update.encode_critic(large_batch().next_observations)
        q_values = update.policy.q(encoded_critic, 2 * th.rand(LARGE, 16, ACTION_DIM) - 1)
        spread = q_values.std(dim=1).mean()
        loss = update.policy.q(encoded_critic, actions) - update.policy.q(encoded_critic, mixed)
    if prepare is not None:
        assert 80 < q_values.mean() < 120 and 0.3 < spread < 3
    assert loss.abs().mean() < 0.02 * spread


@pytest.mark.parametrize("n_bins", [1, 101])
def test_the_critics_gradient(n_bins: int) -> None:
    """Rounded products turn it by less than one degree, and move the TD targets by little."""
    update = make_large(n_bins=n_bins)
    with_learned_values(update)
    critic, data = update.policy.critic, large_batch()
    next_actions = 2 * th.rand(LARGE, ACTION_DIM) - 1

    def learning_pass(chosen: UpdateOptions) -> tuple[th.Tensor, th.Tensor]:
        outputs, next_values = update.critic_outputs(data, next_actions)
        assert outputs.dtype == next_values.dtype == th.float32
        targets = data.rewards.squeeze(1) + 0.99 * next_values.mean(dim=0)
        critic.optimizer.zero_grad()
        critic.loss(outputs, targets).mean(dim=1).sum().backward()
        gradient = th.cat([parameter.grad.flatten() for parameter in critic.parameters() if parameter.grad is not None])
        return gradient, next_values

    (gradient, next_values), (mixed_gradient, mixed_next_values) = in_both(update, learning_pass)
    assert th.equal(gradient, mixed_gradient) != ROUNDS
    assert th.cosine_similarity(gradient, mixed_gradient, dim=0) > 1 - 1.5e-4
    assert 0.99 < mixed_gradient.norm() / gradient.norm() < 1.01
    error = mixed_next_values - next_values
    assert error.mean().abs() < 0.01 and error.square().mean().sqrt() < 0.02 * next_values.std()


@pytest.mark.parametrize("prepare", [None, with_learned_values], ids=["fresh", "learned"])
def test_candidates_keep_their_differences(prepare: Callable[[Update], None] | None) -> None:
    """
    What their weights, the temperature and the actor's target go by.

    With hidden units in bfloat16 the errors of critics trained on Pendulum had 0.8 temperatures, and ``ent_coef="auto"`` rose
    by half.
    """
    update = make_large()
    if prepare is not None:
        prepare(update)
    x_0 = 2 * th.rand(LARGE, 4, ACTION_DIM, generator=th.Generator().manual_seed(0)) - 1

    @th.no_grad()
    def candidates(chosen: UpdateOptions) -> tuple[th.Tensor, ...]:
        encoded_critic = update.encode_critic(large_batch().observations)
        q_values, gradients = update.q_values_and_gradients(encoded_critic, x_0.clone(), chosen, needs_gradients=True)
        assert gradients is not None and gradients.dtype == q_values.dtype == th.float32
        return q_values - q_values.mean(dim=1, keepdim=True), gradients, sm.solve_temperature(q_values, 0.28 * 4)

    (differences, gradients, temperature), (mixed_differences, mixed_gradients, mixed_temperature) = in_both(
        update, candidates
    )
    assert th.equal(differences, mixed_differences) != ROUNDS
    assert (mixed_differences - differences).square().mean().sqrt() < 0.02 * differences.std()
    assert th.cosine_similarity(gradients.flatten(), mixed_gradients.flatten(), dim=0) > 1 - 1e-3
    assert mixed_temperature.item() == pytest.approx(temperature.item(), rel=0.05)


@pytest.mark.parametrize("score_matching", sm.SCORE_TARGETS)
def test_without_batch_norm_score_matching_is_float32(score_matching: str) -> None:
    """Bit by bit: what is not normalised would lose by rounding what it varies by."""
    update = make_large(batch_norm=False)

    def loss(chosen: UpdateOptions) -> list[th.Tensor]:
        update.policy.log_ent_coef.zero_()
        chosen = dataclasses.replace(chosen, score_matching=score_matching, temperature_rate=0.5)
        return [*score_matching_loss(update, large_batch(), chosen), update.policy.log_ent_coef.clone()]

    in_float32, mixed = in_both(update, loss)
    assert all(th.equal(a, b) for a, b in zip(in_float32, mixed, strict=True))


CONFIGURATIONS = pytest.mark.parametrize(
    "policy_kwargs, changes",
    [
        ({"batch_norm": True, "n_bins": 101}, {}),
        ({"batch_norm": True, "n_bins": 101}, {"noised_actions": "current"}),
        ({"batch_norm": True, "n_bins": 101}, {"score_matching": "reverse_sampling"}),
        ({"eta": 1.0, "average_actor": True}, {"score_matching": "reverse_sampling", "noised_actions": "current"}),
    ],
    ids=["default", "current", "reverse sampling", "paper"],
)


@CONFIGURATIONS
@pytest.mark.parametrize("mixed_precision", [True, False])
def test_what_bfloat16_touches(
    policy_kwargs: dict[str, Any], changes: dict[str, Any], mixed_precision: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations where actions are sampled, products of all that is normalised; losses and all that is kept are float32."""
    update = make_update(net_arch=[32, 32], n_train_particles=2, **policy_kwargs)
    policy = update.policy
    autocast: dict[str, set[bool]] = {}
    precisions: set[str] = set()

    def spy(part: Any, name: str) -> None:
        function = getattr(part, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            grad = name == "forward" and result.requires_grad
            autocast.setdefault("learning" if grad else name, set()).add(th.is_autocast_enabled("cpu"))
            precisions.add(th.get_float32_matmul_precision())
            return result

        monkeypatch.setattr(part, name, call)

    spy(policy.actor.noise_predictor, "forward")  # under the name "learning" when it predicts the noise for the loss
    spy(policy, "best_of")
    for part, name in (
        *[(update, "critic_outputs"), (update, "q_values_and_gradients"), (policy.critic, "encode"), (policy.actor, "encode")],
        *[(sm, "softmax_weights"), (sm, "denoising_loss"), (policy.actor.sampler.diffusion, "q_sample"), (policy, "explore")],
    ):
        spy(part, name)
    before = th.get_float32_matmul_precision()
    for i in range(4):
        update(batch(), options(mixed_precision=mixed_precision, **changes), i % 2 == 0, step_targets=True)
    # Exploration noise is added within, elementwise, in float32
    assert autocast.pop("forward") == autocast.pop("best_of") == autocast.pop("explore") == {mixed_precision}
    assert {"learning", "critic_outputs", "encode", "denoising_loss", "q_values_and_gradients"} <= autocast.keys()
    assert all(states == {False} for states in autocast.values()), autocast
    assert precisions == {"medium" if mixed_precision and policy.batch_norm else before}
    assert th.get_float32_matmul_precision() == before
    for net in (policy.actor, policy.critic):
        for parameter in net.parameters():
            assert parameter.dtype == th.float32 and parameter.grad is not None and parameter.grad.dtype == th.float32
        kept = [value for values in net.optimizer.state_dict()["state"].values() for value in values.values()]
        assert kept and all(value.dtype == th.float32 for value in kept)
    assert all(value.dtype == th.float32 for value in policy.state_dict().values() if value.is_floating_point())
    assert policy.predict(np.zeros(3, np.float32))[0].dtype == np.float32


def test_an_update_that_raises_leaves_no_rounding_behind() -> None:
    update = make_update(batch_norm=True)
    before = th.get_float32_matmul_precision()
    with pytest.raises(KeyError, match="no target"):
        update(batch(), options(mixed_precision=True, score_matching="no target"), step_actor=True, step_targets=True)
    assert th.get_float32_matmul_precision() == before


@CONFIGURATIONS
def test_without_mixed_precision_all_is_float32(
    policy_kwargs: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what the update gives without any autocast; with it the numbers differ, which shows that they can."""
    results = []
    for mixed_precision, remove in ((False, False), (False, True), (True, False)):
        update = make_update(net_arch=[32, 32], **policy_kwargs)
        with monkeypatch.context() as patch:
            if remove:
                patch.setattr(th, "autocast", lambda *args, **kwargs: nullcontext())
            th.manual_seed(0)
            for i in range(4):
                update(batch(), options(mixed_precision=mixed_precision, **changes), i % 2 == 0, step_targets=True)
        results.append(state(update))
    assert all(th.equal(results[0][name], value) for name, value in results[1].items())
    for part in ("actor", "critic"):
        assert any(not th.equal(results[0][name], value) for name, value in results[2].items() if name.startswith(part))
