"""Our Mish is PyTorch's: value and gradient, eager and compiled."""

import torch as th
from torch import nn

from sb3_sdac.mish import Mish


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
