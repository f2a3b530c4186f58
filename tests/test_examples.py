"""The examples' functions do what their pictures and tables claim, on fewer steps."""

import sys
from pathlib import Path

import pytest
import torch as th

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import toy_2d

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning:matplotlib")


@pytest.mark.parametrize("method", toy_2d.METHODS)
def test_toy_learns_the_density(method: str) -> None:
    density = toy_2d.DENSITIES["two modes, 0.8 and 0.2"]
    th.manual_seed(1)
    truth = density.sample(2000)
    untrained = toy_2d.run(density, method, n_updates=0, n_samples=2000)
    trained = toy_2d.run(density, method, n_updates=300, n_samples=2000)
    assert toy_2d.sliced_wasserstein(trained, truth) < 0.4 * toy_2d.sliced_wasserstein(untrained, truth)
    assert abs(density.shares(trained)[0].item() - 0.8) < 0.15
    print(method, toy_2d.sliced_wasserstein(trained, truth) , toy_2d.sliced_wasserstein(untrained, truth), density.shares(trained))
