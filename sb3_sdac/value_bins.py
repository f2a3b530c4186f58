"""Values as distributions over fixed bins, learned by classification."""

import math

import torch as th
from torch import nn

#: Up to where the bins are about evenly wide, and the standard deviation of a target in widths of a bin
LINEAR_RANGE, TARGET_STD = 10.0, 0.75


class ValueBins(nn.Module):
    """
    Values as distributions over M fixed ones, learned by classification (HL-Gauss: Imani and White 2018, arXiv 1806.04613;
    Farebrother et al. 2024, "Stop Regressing", arXiv 2403.03950).

    The M values are evenly spaced in asinh(value / ``LINEAR_RANGE``): evenly around 0, in proportion to themselves far from
    it, so that few serve all sizes of values.

    :param n_bins: M, at least 2
    :param max_value: largest of the M values; the least is its negative
    """

    support: th.Tensor

    def __init__(self, n_bins: int, max_value: float):
        super().__init__()
        positions = math.asinh(max_value / LINEAR_RANGE) * th.linspace(-1, 1, n_bins, dtype=th.float64)
        # Saved with the weights, whose meaning it is
        self.register_buffer("support", (LINEAR_RANGE * positions.sinh()).float())

    def mean(self, logits: th.Tensor) -> th.Tensor:
        """
        :param logits: shape (..., M)
        :return: what the distributions are worth, shape (...)
        """
        # Not a product, which may round its inputs to bfloat16: candidates' differences had an error of 5 % by it, not 0.5 %
        return (logits.softmax(dim=-1) * self.support).sum(dim=-1)

    def project(self, targets: th.Tensor) -> th.Tensor:
        """
        Normal distributions around the targets, as wide as the bins there, brought to the M values: what lies between two of
        them is divided such that the mean stays (as in C51, Bellemare et al. 2017, arXiv 1707.06887).

        With hat functions on the values, the weight of one is the difference between the means of the distribution function
        over the intervals on its right and on its left.

        :param targets: shape (...); beyond the M values they count as the outermost
        :return: probabilities, shape (..., M)
        """
        max_value, widths = self.support[-1], self.support.diff()
        targets = targets.clamp(-max_value, max_value).unsqueeze(-1)
        # d value / d asinh(value / r) = hypot(value, r), times the step in asinh(value / r) is the width of a bin there
        step = 2 * (max_value / LINEAR_RANGE).asinh() / len(widths)
        std = TARGET_STD * step * (targets.square() + LINEAR_RANGE**2).sqrt()
        # The integral of the distribution function up to x is max(x, 0) + std h(|x| / std), h(z) = phi(z) - z Phi(-z). The
        # first part apart, since differences of large numbers that are nearly equal would lose digits
        z = (self.support - targets).abs() / std
        smoothing = std * ((-z.square() / 2).exp() / math.sqrt(2 * math.pi) - z * th.special.ndtr(-z))
        means = ((self.support[1:] - targets) / widths).clamp(0, 1) + smoothing.diff(dim=-1) / widths
        return th.cat([means[..., :1], means.diff(dim=-1), 1 - means[..., -1:]], dim=-1)

    def loss(self, logits: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        Cross-entropy of the distributions against those of :meth:`project`.

        :param logits: shape (..., M)
        :param targets: broadcastable to (...)
        :return: shape (...)
        """
        return -(self.project(targets) * logits.log_softmax(dim=-1)).sum(dim=-1)
