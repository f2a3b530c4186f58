"""Values as distributions over fixed bins (HL-Gauss), against numerical integration."""

import numpy as np
import pytest
import torch as th

from sb3_sdac.value_bins import ValueBins


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
