"""The paper's activation function, faster on a CPU: with it the paper's configuration samples three times as fast."""

from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F


def _mish(x: th.Tensor) -> th.Tensor:
    """x tanh(softplus(x)) = x - 2x / d with d = e^2 + 2e + 2, e = exp(x): one exponential where ATen's kernel takes three."""
    exp = x.exp()
    # Where exp overflows, d is infinite and the value x, as it should be
    return th.addcdiv(x, x, (exp + 2).mul_(exp).add_(2), value=-2)


class _MishFunction(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(x)
        return _mish(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: th.Tensor) -> th.Tensor:
        (x,) = ctx.saved_tensors
        # d' = 2 e (e + 1), so the derivative is 1 - 2 / d + 4 x e (e + 1) / d^2. At x = 20 it is 1 to float32 rounding,
        # and clamping there keeps e^2 / d^2 from becoming infinity over infinity
        x = x.clamp(max=20)
        exp = x.exp()
        reciprocal = (exp + 2).mul_(exp).add_(2).reciprocal_()
        slope = (exp + 1).mul_(exp).mul_(x).mul_(reciprocal).mul_(2).sub_(1).mul_(reciprocal).mul_(2).add_(1)
        return slope.mul_(grad_outputs[0])


class Mish(nn.Module):
    """
    The activation function of ``torch.nn.Mish`` (Misra 2019, arXiv 1908.08681), to rounding, in about a third of its
    time on a CPU. The networks use it where ``nn.Mish`` is asked for.
    """

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: any shape
        :return: x tanh(softplus(x)), same shape
        """
        if th.compiler.is_compiling():
            return _mish(x)
        # On a GPU launches count, and ATen's kernel is one
        return F.mish(x) if x.is_cuda else _MishFunction.apply(x)
