"""
The networks: a noise predictor that knows features, noisy samples and diffusion steps, and a batched ensemble of critics.

Both compute the features' share of their first layer once per observation (``encode``) and share it among all particles,
candidates and denoising steps; the result is that of one linear layer on the concatenated input.
"""

import math
from itertools import pairwise

import torch as th
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn
from torch.nn import functional as F

from sb3_sdac.layers import EnsembleLinear, Mish, NormLimit, last_in_float32, lecun_normal_
from sb3_sdac.value_bins import ValueBins

#: Width of the embedding of the diffusion step, as in official SDAC
TIME_DIM = 16


def sinusoidal_embedding(n_diffusion_steps: int, dim: int = TIME_DIM, theta: float = 1e4) -> th.Tensor:
    """
    Sines and cosines of the integer diffusion step at geometrically spaced frequencies, divided by sqrt(dim).

    The embedding of "Attention is all you need", section 3.5, with the scale of official SDAC.

    :param n_diffusion_steps: T
    :param dim: width, even
    :param theta: ratio between the highest and, asymptotically, the lowest frequency
    :return: shape (T, dim)
    """
    frequencies = theta ** (-th.arange(0, dim, 2, dtype=th.float64) / dim)
    angles = th.outer(th.arange(n_diffusion_steps, dtype=th.float64), frequencies)
    return (th.cat([angles.sin(), angles.cos()], dim=-1) / math.sqrt(dim)).float()


class NoisePredictor(nn.Module):
    """
    eps_theta(features, x_t, t): an MLP on the concatenation of features, noisy sample and embedded diffusion step.

    :param features_dim: width of the features
    :param x_dim: A, dimension of the samples
    :param n_diffusion_steps: T
    :param net_arch: widths of the hidden layers
    :param activation_fn: activation function
    :param limit_features: subtract the features' mean and limit their norm (:class:`NormLimit`)
    """

    time_table: th.Tensor

    def __init__(
        self,
        features_dim: int,
        x_dim: int,
        n_diffusion_steps: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        limit_features: bool = False,
    ):
        super().__init__()
        self.norm = NormLimit(features_dim) if limit_features else nn.Identity()
        self.register_buffer("time_table", sinusoidal_embedding(n_diffusion_steps), persistent=False)
        activation_fn = Mish if activation_fn is nn.Mish else activation_fn
        self.time_mlp = nn.Sequential(*create_mlp(TIME_DIM, TIME_DIM, [2 * TIME_DIM], activation_fn))
        first, *rest = create_mlp(features_dim + x_dim + TIME_DIM, x_dim, net_arch, activation_fn)
        self.first: nn.Linear = first  # type: ignore[assignment]
        self.rest = nn.Sequential(*rest)
        self._splits = [features_dim, x_dim, TIME_DIM]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                lecun_normal_(module.weight, module.in_features)
                nn.init.zeros_(module.bias)

    def encode(self, features: th.Tensor) -> th.Tensor:
        """
        What the features contribute to the first layer, bias included.

        :param features: shape (B, F)
        :return: shape (B, H)
        """
        return F.linear(self.norm(features), self.first.weight[:, : self._splits[0]], self.first.bias)

    def encode_time(self) -> th.Tensor:
        """
        What each diffusion step contributes to the first layer.

        :return: shape (T, H)
        """
        return F.linear(self.time_mlp(self.time_table), self.first.weight[:, -self._splits[2] :])

    def forward(self, encoded: th.Tensor, x_t: th.Tensor, encoded_t: th.Tensor) -> th.Tensor:
        """
        Predict the noise in ``x_t``.

        :param encoded: from :meth:`encode`, shape (B, H), or (B, 1, H) to share it among N particles
        :param x_t: noisy samples, shape (B, A) or (B, N, A)
        :param encoded_t: rows of :meth:`encode_time`, broadcastable to the first layer
        :return: shape of x_t
        """
        hidden = F.linear(x_t, self.first.weight[:, self._splits[0] : -self._splits[2]])
        # In the precision of the matrix product, should that be bfloat16
        return last_in_float32(self.rest, hidden + (encoded + encoded_t).to(hidden.dtype))


class CriticEnsemble(nn.Module):
    """
    Q_1 .. Q_C (features, action): MLPs on the concatenation of features and action, evaluated together.

    :param n_critics: C
    :param features_dim: width of the features
    :param action_dim: A
    :param net_arch: widths of the hidden layers
    :param activation_fn: activation function
    :param batch_norm: normalise the inputs of every layer, as in CrossQ
    :param n_bins: M, values in the distribution that each gives (:class:`ValueBins`), or 1 for the value itself
    :param max_value: largest of the M values
    """

    def __init__(
        self,
        n_critics: int,
        features_dim: int,
        action_dim: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        batch_norm: bool = False,
        n_bins: int = 1,
        max_value: float = 200.0,
    ):
        super().__init__()
        activation_fn = Mish if activation_fn is nn.Mish else activation_fn
        widths = [features_dim + action_dim, *net_arch, n_bins]
        layers: list[nn.Module] = []
        for in_features, out_features in pairwise(widths):
            layers += [EnsembleLinear(n_critics, in_features, out_features, batch_norm), activation_fn()]
        self.first: EnsembleLinear = layers[0]  # type: ignore[assignment]
        self.rest = nn.Sequential(*layers[1:-1])  # no activation after the last layer
        self.features_dim = features_dim
        self.bins = None if n_bins == 1 else ValueBins(n_bins, max_value)
        if self.bins is not None:  # values begin near 0, like others; all bins alike would be worth much more or less
            last: EnsembleLinear = layers[-2]  # type: ignore[assignment]
            with th.no_grad():
                last.weight.mul_(0.1)
                last.bias.copy_(self.bins.project(th.zeros(())).clamp(min=1e-6).log())

    def encode(self, features: th.Tensor) -> th.Tensor:
        """
        What the features contribute to the first layer, bias included.

        :param features: shape (B, F)
        :return: shape (C, B, H)
        """
        return self.first.encode(features)

    def forward(self, encoded: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Values of one or of N actions per observation.

        :param encoded: from :meth:`encode`, shape (C, B, H)
        :param actions: shape (B, A) or (B, N, A)
        :return: shape (C, B) or (C, B, N)
        """
        return self.values(self.outputs(encoded, actions))

    def outputs(self, encoded: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        What the networks give for one or for N actions per observation.

        :param encoded: from :meth:`encode`, shape (C, B, H)
        :param actions: shape (B, A) or (B, N, A)
        :return: shape (C, B, M) or (C, B, N, M): logits, or with M = 1 values
        """
        n_critics, batch_size, width = encoded.shape
        weight = self.first.folded_weight(self.features_dim)
        # (B, N, A) -> (C, B * N, A) @ (C, A, H) -> (C, B * N, H) -> (C, B, N, H), plus (C, B, 1, H). Torch would lay out
        # a plain product the other way round when there is a gradient, and turn it afterwards
        hidden = actions.flatten(end_dim=-2).expand(n_critics, -1, -1).bmm(weight)
        n_actions = actions.shape[1] if actions.ndim == 3 else 1  # not -1, which an empty batch leaves open
        hidden = hidden.view(n_critics, batch_size, n_actions, width) + encoded.to(hidden.dtype).unsqueeze(2)
        # (C, B, N, H) -> (C, B * N, H) -> (C, B * N, M) -> (C, B, M) or (C, B, N, M)
        outputs = last_in_float32(self.rest, hidden.flatten(1, 2))
        return outputs.view(n_critics, *actions.shape[:-1], outputs.shape[-1])

    def outputs_by_difference(self, encoded: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :meth:`outputs` for N actions per observation, exact in their differences where products are rounded to bfloat16.

        Weights of candidates go by differences of Q, which are small beside Q: rounding each candidate's hidden units would
        drown them (an error of 5 % in the differences, here 0.3 %). So all share the units of the first action, and only what
        the others add to them is rounded, relative to its own size. The gradient is that of each output with respect to its
        own action.

        :param encoded: from :meth:`encode`, shape (C, B, H)
        :param actions: shape (B, N, A)
        :return: shape (C, B, N, M), float32
        """
        n_critics, batch_size, n_actions = len(encoded), *actions.shape[:2]

        def per_action(rows: th.Tensor) -> th.Tensor:
            return rows.view(n_critics, batch_size, n_actions, rows.shape[-1])  # (C, B * N, H) -> (C, B, N, H)

        weight = self.first.folded_weight(self.features_dim)
        first = actions[:, :1].detach()
        base = encoded + first.flatten(end_dim=1).expand(n_critics, -1, -1).bmm(weight)  # (C, B, H)
        step = per_action((actions - first).flatten(end_dim=1).expand(n_critics, -1, -1).bmm(weight))  # (C, B, N, H)
        for layer in self.rest:
            if isinstance(layer, EnsembleLinear):
                weight, bias = layer.folded()
                base = th.baddbmm(bias, base, weight)
                step = per_action(step.flatten(1, 2).bmm(weight))
            else:
                shared, base = base.unsqueeze(2), layer(base)  # (C, B, 1, H), (C, B, H)
                step = layer(shared + step) - base.unsqueeze(2)
        return base.unsqueeze(2) + step

    def normalise_batch(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :meth:`outputs` with all layers normalised by the statistics of this batch, which move the running ones. For learning.

        :param features: shape (B, F)
        :param actions: shape (B, A)
        :return: shape (C, B, M)
        """
        x = th.cat([features, actions], dim=1).expand(len(self.first.weight), -1, -1)  # (B, F + A) -> (C, B, F + A)
        layers = [self.first, *self.rest]
        return last_in_float32([layer.normalise_batch if isinstance(layer, EnsembleLinear) else layer for layer in layers], x)

    def values(self, outputs: th.Tensor) -> th.Tensor:
        """
        :param outputs: shape (..., M)
        :return: shape (...)
        """
        return outputs.squeeze(-1) if self.bins is None else self.bins.mean(outputs)

    def loss(self, outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        Squared error of the values, or cross-entropy of their distributions.

        :param outputs: shape (..., M)
        :param targets: broadcastable to (...)
        :return: shape (...)
        """
        return (outputs.squeeze(-1) - targets).square() if self.bins is None else self.bins.loss(outputs, targets)
