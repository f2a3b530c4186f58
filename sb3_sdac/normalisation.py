"""Running statistics: of the features that the actor gets (NormLimit), and of the critics' layers (BatchStatistics)."""

import math

import torch as th
from torch import nn

#: Largest norm of the actor's features around their mean, root mean square. A step of Adam changes a layer's output in
#: proportion to the norm of its inputs; by measurement: docs/what_we_tried.md, "The actor's features"
MAX_FEATURE_NORM = 20.0


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
