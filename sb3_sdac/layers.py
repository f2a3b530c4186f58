"""
Layers: linear ones side by side with batch normalisation, the limit on the norm of features, and the paper's activation
function, faster on a CPU.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

#: Largest norm of the actor's features around their mean, root mean square. A step of Adam changes a layer's output in
#: proportion to the norm of its inputs; by measurement: docs/what_we_tried.md, "The actor's features"
MAX_FEATURE_NORM = 20.0


def lecun_normal_(weight: th.Tensor, fan_in: int) -> None:
    """
    Truncated normal of standard deviation 1 / sqrt(fan_in), cut at two of them (Haiku's default for linear layers).

    :param weight: tensor to fill in place
    :param fan_in: number of inputs of the layer
    """
    std = 1 / math.sqrt(fan_in)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def last_in_float32(layers: Iterable[Callable[[th.Tensor], th.Tensor]], x: th.Tensor) -> th.Tensor:
    """
    Apply the layers, the last one in float32 also under autocast: it is small, and its output is what the
    precision of hidden units averages out in. The critics' values, for one, lie close together.

    :param layers: hidden layers and the output layer
    :param x: input
    :return: output, float32
    """
    layers = list(layers)
    if not layers:  # net_arch=[]: the first layer was the only one
        return x.float()
    *hidden, last = layers
    for layer in hidden:
        x = layer(x)
    if not th.is_autocast_enabled(x.device.type):
        return last(x)
    with th.autocast(x.device.type, enabled=False):
        return last(x.float())


class BatchStatistics(nn.Module):
    """
    What batch normalisation learns and remembers, under PyTorch's names, without the count of batches that loading a bare
    dictionary into ``nn.BatchNorm1d`` would ask for. Momentum and epsilon of CrossQ.

    :param n_features: channels
    """

    running_mean: th.Tensor
    running_var: th.Tensor
    momentum, eps = 0.01, 1e-3

    def __init__(self, n_features: int):
        super().__init__()
        self.weight = nn.Parameter(th.ones(n_features))
        self.bias = nn.Parameter(th.zeros(n_features))
        self.register_buffer("running_mean", th.zeros(n_features))
        self.register_buffer("running_var", th.ones(n_features))


class NormLimit(nn.Module):
    """
    Features minus their mean, divided by a power of their standard deviation, the least that brings the norm of all (root mean
    square) down to ``MAX_FEATURE_NORM``. Where it is not above that anyway the power is 0 and they keep their scale: were they
    normalised, rare contacts would be as loud as velocities.

    Mean and variance are moving averages over the batches seen in training mode, and used there, too: the noise predictor
    gets in learning what it gets in acting. Momentum as in :class:`BatchStatistics`. Nothing is learned, as a linear layer
    follows.

    :param n_features: F
    """

    running_mean: th.Tensor
    running_var: th.Tensor
    running_scale: th.Tensor

    def __init__(self, n_features: int):
        super().__init__()
        self.register_buffer("running_mean", th.zeros(n_features))
        self.register_buffer("running_var", th.zeros(n_features))
        self.register_buffer("running_scale", th.ones(n_features))  # follows from the variance; acting has it ready

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: shape (B, F)
        :return: same shape
        """
        if self.training and len(features) > 1:  # a single one has no variance
            with th.no_grad():
                variance, mean = th.var_mean(features, dim=0)
                self.running_mean.lerp_(mean, BatchStatistics.momentum)
                self.running_var.lerp_(variance, BatchStatistics.momentum)
                self.running_scale.copy_(limiting_scale(self.running_var.sqrt(), MAX_FEATURE_NORM))
        return (features - self.running_mean) * self.running_scale


def limiting_scale(stds: th.Tensor, max_norm: float) -> th.Tensor:
    """
    s^-p with the least p in [0, 1] at which the squared norm, the sum of s^(2 - 2p), is at most max_norm^2. With more than
    max_norm^2 features there may be none; then it is at most F, as normalised features have it, and the rest is one factor.

    The logarithm of that sum is convex in p, and falls wherever it is above log F: Newton's method comes from p = 0 and stays
    below the solution. A feature that hardly moves counts as one of a hundredth of the mean standard deviation.

    :param stds: s, shape (F,), standard deviations of the features
    :param max_norm: positive
    :return: shape (F,)
    """
    log_std = stds.clamp(min=1e-2 * stds.mean()).clamp(min=1e-6).log()
    target = max(2 * math.log(max_norm), math.log(len(stds)))
    power = th.zeros_like(log_std[0])
    for _ in range(6):  # by then exact to rounding
        exponents = (2 - 2 * power) * log_std
        excess = exponents.logsumexp(0) - target
        fall = 2 * (exponents.softmax(0) * log_std).sum()
        power = th.where(excess > 0, power + excess / fall, power).clamp(max=1)
    log_norm = ((2 - 2 * power) * log_std).logsumexp(0) / 2
    return (-power * log_std + (math.log(max_norm) - log_norm).clamp(max=0)).exp()


class EnsembleLinear(nn.Module):
    """
    Linear layers side by side, one per member, as one batched matrix product; optionally with normalised inputs.

    :param n_members: C
    :param in_features: inputs of each
    :param out_features: outputs of each
    :param batch_norm: normalise the inputs by statistics of the batch (Ioffe and Szegedy 2015, arXiv 1502.03167)
    """

    def __init__(self, n_members: int, in_features: int, out_features: int, batch_norm: bool = False):
        super().__init__()
        self.weight = nn.Parameter(th.empty(n_members, in_features, out_features))
        self.bias = nn.Parameter(th.zeros(n_members, 1, out_features))
        lecun_normal_(self.weight, in_features)
        self.norm = BatchStatistics(n_members * in_features) if batch_norm else None

    def folded(self) -> tuple[th.Tensor, th.Tensor]:
        """
        Normalisation by the running statistics is linear, so it costs next to nothing as part of this layer.

        :return: weight, shape (C, in, out), and bias, shape (C, 1, out), that act on inputs as they come
        """
        if self.norm is None:
            return self.weight, self.bias
        scale, shift = self._scale_and_shift(self.norm)
        return scale.mT * self.weight, th.baddbmm(self.bias, shift, self.weight)

    def encode(self, x: th.Tensor) -> th.Tensor:
        """
        What the first of the inputs contribute, with the bias and the shift of all. They are normalised before the product,
        and not by its weights: rounded to bfloat16, inputs far from 0 would lose what they vary by.

        :param x: the first inputs, the same for all members, shape (M, first)
        :return: shape (C, M, out)
        """
        n = x.shape[1]
        if self.norm is None:
            return th.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight[:, :n])
        scale, shift = self._scale_and_shift(self.norm)
        bias = th.baddbmm(self.bias, shift[..., n:], self.weight[:, n:])
        return th.baddbmm(bias, th.addcmul(shift[..., :n], x, scale[..., :n]), self.weight[:, :n])

    def folded_weight(self, first: int) -> th.Tensor:
        """
        :param first: input at which to begin
        :return: that part of the weight of :meth:`folded`, shape (C, in - first, out)
        """
        weight = self.weight[:, first:]
        return weight if self.norm is None else self._scale_and_shift(self.norm)[0][..., first:].mT * weight

    def _scale_and_shift(self, norm: BatchStatistics) -> tuple[th.Tensor, th.Tensor]:
        """:return: what the running statistics multiply the inputs with and add to them, each of shape (C, 1, in)"""
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        n_members, in_features, _ = self.weight.shape
        return scale.view(n_members, 1, in_features), shift.view(n_members, 1, in_features)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape (C, M, in)
        :return: shape (C, M, out)
        """
        if self.norm is not None and x.shape[1] < self.weight.shape[-1]:  # few inputs, as in acting: less work than folding
            scale, shift = self._scale_and_shift(self.norm)
            return _ensemble_linear(th.addcmul(shift, x, scale.to(x.dtype)), self.weight, self.bias)
        return _ensemble_linear(x, *self.folded())

    def normalise_batch(self, x: th.Tensor) -> th.Tensor:
        """
        The same with the inputs normalised by their own mean and variance over M, which move the running ones.

        :param x: shape (C, M, in)
        :return: shape (C, M, out)
        """
        norm = self.norm
        assert norm is not None
        # (C, M, in) -> (M, C * in): every input of every member is a channel of its own
        flat = x.transpose(0, 1).flatten(1)
        flat = F.batch_norm(flat, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
        # Contiguous, as products with a transposed operand take twice as long
        x = flat.view(x.shape[1], x.shape[0], -1).transpose(0, 1).contiguous()
        return _ensemble_linear(x, self.weight, self.bias)


def _ensemble_linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    if weight.shape[-1] == 1:  # a batched matrix product takes ten times as long for a single column
        return th.linalg.vecdot(x, weight.mT).unsqueeze(-1) + bias
    return th.baddbmm(bias, x, weight)


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
