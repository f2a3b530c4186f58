"""Layers: the limit on the features' norm, and our Mish is PyTorch's."""

import pytest
import torch as th
from helpers.models import make_model
from torch import nn

from sb3_sdac.layers import MAX_FEATURE_NORM, Mish, NormLimit, limiting_scale


def test_mish_is_mish() -> None:
    """Value and gradient, also where exp(x) or its square overflow."""
    x = th.cat([th.linspace(-30, 30, 2001), th.tensor([-200.0, -90.0, 45.0, 88.0, 89.0, 1e4])])
    results = []
    for function, argument in ((Mish(), x.clone()), (nn.Mish(), x.double())):
        argument.requires_grad_()
        value = function(argument)
        (gradient,) = th.autograd.grad(value.sum(), argument)
        results.append((value.detach().double(), gradient.double()))
    th.testing.assert_close(results[0], results[1], rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_norm_of_the_features_is_limited(batch_norm: bool) -> None:
    """
    Training mode learns mean and variance, evaluation mode applies them and changes nothing.

    A large feature has what the norm leaves to it, one with a standard deviation of 1 keeps it, a constant becomes 0;
    untrained, all pass as they come.
    """
    actor = make_model(policy_kwargs={"batch_norm": batch_norm}).actor
    first = actor.noise_predictor.first
    standard = th.randn(256, 3, generator=th.Generator().manual_seed(0))
    standard = (standard - standard.mean(dim=0)) / standard.std(dim=0)
    obs = th.tensor([0.0, 1.0, 50.0]) * standard + 5

    def by_hand(features: th.Tensor) -> th.Tensor:
        return features @ first.weight[:, :3].T + first.bias

    actor.set_training_mode(False)
    th.testing.assert_close(actor.encode(obs), by_hand(obs))
    actor.set_training_mode(True)
    for _ in range(1500):  # 0.99^1500 is 3e-7
        actor.encode(obs)
    actor.set_training_mode(False)
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    # The constant counts as a hundredth of the mean standard deviation, and hardly
    limited = th.tensor([0.0, 1.0, (MAX_FEATURE_NORM**2 - 1) ** 0.5]) * standard
    th.testing.assert_close(actor.encode(obs), by_hand(limited if batch_norm else obs), atol=1e-3, rtol=1e-4)
    assert all(th.equal(value, before[name]) for name, value in actor.state_dict().items())


def test_one_observation_moves_nothing() -> None:
    """It has no variance, with which the statistics would become NaN."""
    norm = NormLimit(3).train()
    features = th.tensor([[1.0, 2.0, 3.0]])
    assert th.equal(norm(features), features)
    assert norm(th.zeros(0, 3)).shape == (0, 3)
    assert th.equal(norm.running_mean, th.zeros(3)) and th.isfinite(norm.running_scale).all()


def test_nothing_is_learned_and_nothing_has_a_gradient_but_the_features() -> None:
    norm = NormLimit(2).train()
    features = th.randn(5, 2, requires_grad=True)
    norm(features).sum().backward()
    assert not list(norm.parameters()) and features.grad is not None
    assert not any(value.requires_grad for value in norm.buffers())


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
