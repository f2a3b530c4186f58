"""How much bfloat16 changes in an update, where it is at work, and what stays float32."""

import json
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_sdac import PAPER_DPMD, PAPER_SDAC, SDAC, sdac
from sb3_sdac import score_matching as sm
from sb3_sdac.networks import MAX_FEATURE_NORM, EnsembleLinear, NormLimit

T = TypeVar("T")
B, OBS_DIM, ACTION_DIM = 256, 17, 6


class CheetahSpaces(gym.Env):
    """Only its spaces matter: those of HalfCheetah."""

    observation_space = spaces.Box(-np.inf, np.inf, (OBS_DIM,))
    action_space = spaces.Box(-1, 1, (ACTION_DIM,))


def make_model(**kwargs: Any) -> SDAC:
    model = SDAC("MlpPolicy", CheetahSpaces(), **{"buffer_size": 10, "seed": 0, "device": "cpu", **kwargs})
    model.set_logger(configure(None, []))
    model.policy.set_training_mode(False)  # running statistics stay as they are from one computation to the next
    return model


def batch(batch_size: int = B) -> ReplayBufferSamples:
    generator = th.Generator().manual_seed(0)
    observations, next_observations = th.randn(2, batch_size, OBS_DIM, generator=generator)
    actions = 2 * th.rand(batch_size, ACTION_DIM, generator=generator) - 1
    rewards = th.randn(batch_size, 1, generator=generator)
    return ReplayBufferSamples(observations, actions, next_observations, th.zeros(batch_size, 1), rewards, None)


def in_both(model: SDAC, function: Callable[[], T]) -> tuple[T, T]:
    """What the function returns in float32 and with bfloat16, given the same random numbers."""
    results = []
    for model._mixed_precision in (False, True):
        th.manual_seed(0)
        results.append(function())
    return results[0], results[1]


def sample_actions(model: SDAC) -> th.Tensor:
    observations = batch().next_observations
    with th.no_grad():
        return model._sample_actions(model.actor.encode(observations), model.critic.encode(observations))


def with_a_high_level(model: SDAC) -> None:
    """Q around 100 through the last layer's bias, differences between actions around 1 through its weights."""
    *_, last = model.critic.q_networks.rest
    assert isinstance(last, EnsembleLinear)
    with th.no_grad():
        last.weight.mul_(50)
        last.bias.fill_(100)


def with_learned_values(model: SDAC) -> None:
    """Critics that have learned Q = 100 + tanh(v s) - |a - tanh(W s)|^2, the level from their hidden layers, too."""
    generator = th.Generator().manual_seed(0)
    w, v = (th.randn(OBS_DIM, n, generator=generator) / OBS_DIM**0.5 for n in (ACTION_DIM, 1))
    optimizer = th.optim.Adam(model.critic.parameters(), lr=2e-3, fused=True)
    for _ in range(300):
        s = th.randn(B, OBS_DIM, generator=generator)
        a = 2 * th.rand(B, ACTION_DIM, generator=generator) - 1
        q = 100 + (s @ v).tanh().squeeze(1) - (a - (s @ w).tanh()).square().sum(dim=1)
        optimizer.zero_grad()
        model.critic.loss(model.critic.outputs(s, a, normalise_batch=model.batch_norm), q).mean().backward()
        optimizer.step()


# How much it changes


@pytest.mark.parametrize("beta_schedule, bound", [("linear", 2e-3), ("vp", 1e-2)])
def test_actions_without_a_choice(beta_schedule: str, bound: float) -> None:
    """A single particle moves by little, except the few that start near where the sampling chain forks."""
    actions, mixed = in_both(
        model := make_model(n_target_particles=1, beta_schedule=beta_schedule), lambda: sample_actions(model)
    )
    assert mixed.dtype == th.float32
    differences = (mixed - actions).abs()
    assert 0 < differences.mean() < 2e-3
    assert differences.flatten().quantile(0.99) < bound
    assert (differences.amax(dim=1) > 0.01).float().mean() < 0.03


def test_actions_of_large_features() -> None:
    """Features of the largest norm are rounded more: 99 of 100 actions still by less than the exploration noise."""
    model = make_model(n_target_particles=1)
    norm = model.actor.noise_predictor.norm
    assert isinstance(norm, NormLimit)
    norm.running_scale.fill_(MAX_FEATURE_NORM / OBS_DIM**0.5)
    actions, mixed = in_both(model, lambda: sample_actions(model))
    differences = (mixed - actions).abs()
    assert 0 < differences.mean() < 5e-3
    assert differences.flatten().quantile(0.99) < model.exploration_noise


@pytest.mark.parametrize(
    "prepare, n_bins",
    [(None, 1), (with_a_high_level, 1), (with_learned_values, 1), (with_learned_values, 101)],
    ids=["fresh", "level", "learned", "distributions"],
)
def test_actions_with_a_choice(prepare: Callable[[SDAC], None] | None, n_bins: int) -> None:
    """Where the critics choose another particle, they do so among equals: hardly any value is lost by it."""
    model = make_model(n_target_particles=4, n_bins=n_bins)
    if prepare is not None:
        prepare(model)
    actions, mixed = in_both(model, lambda: sample_actions(model))
    assert 0 < ((mixed - actions).abs().amax(dim=1) > 0.01).float().mean() < 0.1
    with th.no_grad():
        encoded = model.critic.encode(batch().next_observations)
        q_values = model.critic.q(encoded, 2 * th.rand(B, 16, ACTION_DIM) - 1)
        spread = q_values.std(dim=1).mean()
        loss = model.critic.q(encoded, actions) - model.critic.q(encoded, mixed)
    if prepare is not None:
        assert 80 < q_values.mean() < 120 and 0.3 < spread < 3
    assert loss.abs().mean() < 0.02 * spread


@pytest.mark.parametrize("n_bins", [1, 101])
def test_the_critics_gradient(n_bins: int) -> None:
    """Hidden layers in bfloat16 turn it by less than one degree, and move the TD targets by little."""
    model = make_model(n_bins=n_bins)
    with_learned_values(model)
    data = batch()
    next_actions = 2 * th.rand(B, ACTION_DIM) - 1

    def learning_pass() -> tuple[th.Tensor, th.Tensor]:
        outputs, next_values = model._critic_outputs(data, next_actions)
        assert outputs.dtype == next_values.dtype == th.float32
        targets = data.rewards.squeeze(1) + 0.99 * next_values.mean(dim=0)
        model.critic.optimizer.zero_grad()
        model.critic.loss(outputs, targets).mean(dim=1).sum().backward()
        gradient = th.cat([parameter.grad.flatten() for parameter in model.critic.parameters() if parameter.grad is not None])
        return gradient, next_values

    (gradient, next_values), (mixed_gradient, mixed_next_values) = in_both(model, learning_pass)
    assert not th.equal(gradient, mixed_gradient) and th.cosine_similarity(gradient, mixed_gradient, dim=0) > 1 - 1.5e-4
    assert 0.99 < mixed_gradient.norm() / gradient.norm() < 1.01
    error = mixed_next_values - next_values
    assert error.mean().abs() < 0.01 and error.square().mean().sqrt() < 0.02 * next_values.std()


@pytest.mark.parametrize("score_matching", ["gradient_assisted", "reverse_sampling"])
def test_weights_and_score_target_are_the_same(score_matching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Q of the candidates stays float32, and all that follows from it, bit by bit.

    In bfloat16 the errors of critics trained on Pendulum had 0.8 temperatures, and ``ent_coef="auto"`` rose by half.
    """
    model = make_model(score_matching=score_matching)
    seen: list[th.Tensor] = []
    for name in ("softmax_weights", "denoising_loss"):
        function = getattr(sm, name)

        def spy(*args: Any, function: Callable[..., th.Tensor] = function) -> th.Tensor:
            seen.extend(arg for arg in args if isinstance(arg, th.Tensor))
            return function(*args)

        monkeypatch.setattr(sm, name, spy)

    def score_matching_loss() -> list[th.Tensor]:
        seen.clear()
        data = batch()
        encoded_critic = model.critic.encode(data.observations).detach()
        loss, ess = model._score_matching_loss(model.actor.encode(data.observations), encoded_critic, data.actions)
        return [*seen, loss, ess, model.ent_coef_tensor]

    in_float32, mixed = in_both(model, score_matching_loss)
    assert len(in_float32) == len(mixed) > 6
    assert all(th.equal(a, b) and a.dtype == th.float32 for a, b in zip(in_float32, mixed, strict=True))


# Where it is at work


def small_model(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> SDAC:
    policy_kwargs = {**kwargs.pop("policy_kwargs", {}), "net_arch": [32, 32]}
    model = make_model(**kwargs, policy_kwargs=policy_kwargs)
    monkeypatch.setattr(model.replay_buffer, "sample", lambda *args, **kwargs: batch(8))
    return model


CONFIGURATIONS = pytest.mark.parametrize(
    "kwargs",
    [{}, {"anchor": "current"}, {"critic_steps": 2}, {"score_matching": "reverse_sampling"}, PAPER_SDAC, PAPER_DPMD],
    ids=["default", "current", "two critic steps", "reverse sampling", "SDAC", "DPMD"],
)


@CONFIGURATIONS
@pytest.mark.parametrize("mixed_precision", [True, False])
def test_what_is_touched(kwargs: dict[str, Any], mixed_precision: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sampling and what the critics learn from with batch normalisation; losses and all that is kept are float32."""
    particles = {"n_particles": 2, "n_target_particles": 2}
    model = small_model(monkeypatch, **{**kwargs, **particles, "mixed_precision": mixed_precision})
    autocast: dict[str, set[bool]] = {}

    def spy(part: Any, name: str) -> None:
        function = getattr(part, name)

        def call(*args: Any) -> Any:
            result = function(*args)
            grad = name == "forward" and result.requires_grad
            autocast.setdefault("learning" if grad else name, set()).add(th.is_autocast_enabled("cpu"))
            return result

        monkeypatch.setattr(part, name, call)

    spy(model.actor.noise_predictor, "forward")  # under the name "learning" when it predicts the noise for the loss
    spy(model.policy, "best_of")
    spy(model.critic.q_networks, "normalise_batch")
    for part, name in (
        *[(model, "_critic_outputs"), (model, "_q_values_and_gradients"), (model.critic, "encode"), (model.actor, "encode")],
        *[(sm, "softmax_weights"), (sm, "denoising_loss"), (model.actor.diffusion, "q_sample"), (model.policy, "explore")],
    ):
        spy(part, name)
    model.train(4)
    assert autocast.pop("forward") == autocast.pop("best_of") == {mixed_precision}
    assert autocast.pop("normalise_batch", None) == ({mixed_precision} if model.batch_norm else None)
    assert {"learning", "_critic_outputs", "encode", "denoising_loss"} <= autocast.keys()
    assert all(states == {False} for states in autocast.values()), autocast
    for net in (model.actor, model.critic):
        for parameter in net.parameters():
            assert parameter.dtype == th.float32 and parameter.grad is not None and parameter.grad.dtype == th.float32
        state = [value for values in net.optimizer.state_dict()["state"].values() for value in values.values()]
        assert state and all(value.dtype == th.float32 for value in state)
    assert all(value.dtype == th.float32 for value in model.policy.state_dict().values() if value.is_floating_point())
    assert model.predict(np.zeros(OBS_DIM, np.float32))[0].dtype == np.float32


@CONFIGURATIONS
def test_without_it_all_is_float32(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit what the update gives without any autocast; with it the numbers differ, which shows that they can."""
    policies = []
    for mixed_precision, remove in ((False, False), (False, True), (True, False)):
        model = small_model(monkeypatch, **kwargs, mixed_precision=mixed_precision)
        with monkeypatch.context() as patch:
            if remove:
                patch.setattr(th, "autocast", lambda *args, **kwargs: nullcontext())
            th.manual_seed(0)
            model.train(4)
        policies.append(model.policy.state_dict())
    assert all(th.equal(policies[0][name], value) for name, value in policies[1].items())
    for part in ("actor", "critic"):
        assert any(not th.equal(policies[0][name], value) for name, value in policies[2].items() if name.startswith(part))


@pytest.mark.parametrize("hardware", [True, False])
def test_it_follows_the_processor(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdac, "_has_bfloat16", lambda device: hardware)
    assert make_model()._mixed_precision is make_model(mixed_precision="auto")._mixed_precision is hardware
    for mixed_precision in (True, False):
        assert make_model(mixed_precision=mixed_precision)._mixed_precision is mixed_precision


@pytest.mark.parametrize(
    "device, avx512_bf16, amx, cuda, expected",
    [
        ("cpu", True, False, False, True),
        ("cpu", False, True, False, True),
        ("cpu", False, False, True, False),
        ("cuda", False, False, True, True),
        ("cuda:1", False, False, True, True),
        ("cuda", True, True, False, False),
        ("mps", True, True, True, False),
    ],
)
def test_processors(
    device: str, avx512_bf16: bool, amx: bool, cuda: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(th.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(th.cpu, "_is_amx_tile_supported", lambda: amx)
    # Emulated by a device that is too old, it would be slower than float32
    monkeypatch.setattr(th.cuda, "is_bf16_supported", lambda including_emulation=True: cuda or including_emulation)
    current: list[th.device] = []  # that it is asked of

    def make_current(device: th.device) -> nullcontext:
        current.append(device)
        return nullcontext()

    monkeypatch.setattr(th.cuda, "device", make_current)
    assert sdac._has_bfloat16(th.device(device)) is expected
    assert current == ([th.device(device)] if device.startswith("cuda") else [])


@pytest.mark.parametrize("mixed_precision", ["auto", True])
def test_a_file_does_not_carry_it_along(mixed_precision: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved where there is bfloat16, loaded where there is none: "auto" is decided anew, what was asked for stays."""
    monkeypatch.setattr(sdac, "_has_bfloat16", lambda device: True)
    model = small_model(monkeypatch, mixed_precision=mixed_precision)
    model.train(2)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    assert data["mixed_precision"] == mixed_precision and "_mixed_precision" not in data

    monkeypatch.setattr(sdac, "_has_bfloat16", lambda device: False)
    loaded = SDAC.load(tmp_path / "model.zip", env=CheetahSpaces(), device="cpu")
    assert (loaded.mixed_precision, loaded._mixed_precision) == (mixed_precision, mixed_precision is True)
    assert all(th.equal(loaded.policy.state_dict()[name], value) for name, value in model.policy.state_dict().items())
    loaded.set_logger(model.logger)
    monkeypatch.setattr(loaded.replay_buffer, "sample", lambda *args, **kwargs: batch(8))
    loaded.train(2)
    assert loaded._n_updates == 4
    assert SDAC.load(tmp_path / "model.zip", device="cpu", mixed_precision=False)._mixed_precision is False
