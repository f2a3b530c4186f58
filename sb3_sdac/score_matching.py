"""
Score matching on Q alone: candidates for x_0, their weights, and the noise that the noise predictor regresses on.

The policy of maximum-entropy RL is an energy-based model, pi(a|s) ~ exp(Q(s, a) / lambda). Its noise-perturbed version at
diffusion step t has the score -E[noise] / sqrt(1 - abar_t), where the expectation runs over the x_0 that may have led to x_t,
each weighted by exp(Q(s, x_0) / lambda) (Ma et al., "Soft Diffusion Actor-Critic", arXiv 2502.00361). So the target of the
noise predictor at (s, x_t, t) is a weighted mean of noises, and no sample of pi is needed.

Pure maths: the values and gradients of Q at the candidates are handed in, and so are random numbers.
Letters: B batch, K candidates (reverse samples) per x_t, A dimension of x.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_sdac.diffusion import GaussianDiffusion

#: Bound on each coordinate of the noise that Q's gradient implies; a true noise is standard normal, so this is five standard
#: deviations. By measurement: docs/what_we_tried.md, "The gradient's bound"
MAX_GRADIENT_NOISE = 5.0


def clipped_normal_candidates(
    diffusion: GaussianDiffusion, x_t: th.Tensor, t: th.Tensor, noise: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    Reverse sampling as in the paper: K noises, each with the x_0 it implies, clipped to the box.

    The noise is not changed by the clipping, as in the authors' code.

    :param diffusion: the forward process
    :param x_t: noisy samples, shape (B, A)
    :param t: diffusion steps, shape (B, 1)
    :param noise: standard normal, shape (B, K, A)
    :return: x_0 in [-1, 1] and the noise that goes with it, both of shape (B, K, A)
    """
    # (B, A), (B, 1) -> (B, 1, A), (B, 1, 1), to broadcast over K
    return diffusion.predict_x_0(x_t.unsqueeze(1), t.unsqueeze(1), noise).clamp(-1, 1), noise


def truncated_normal_candidates(
    diffusion: GaussianDiffusion, x_t: th.Tensor, t: th.Tensor, uniform: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    Reverse sampling that wastes no candidate: normal noise, truncated so that the x_0 it implies lies in the box.

    x_0 = x_t / sqrt(abar_t) - sigma_t * noise lies in [-1, 1] when the noise lies within 1 / sigma_t of
    x_t / (sqrt(abar_t) * sigma_t). Drawn by inverting the normal distribution function. Clipping instead
    puts 51 % (t = 5) to 98 % (t >= 15) of the coordinates on the faces of the box (T = 20, linear betas).

    :param diffusion: the forward process
    :param x_t: noisy samples, shape (B, A)
    :param t: diffusion steps, shape (B, 1)
    :param uniform: uniform random numbers in [0, 1), shape (B, K, A)
    :return: x_0 in [-1, 1] and the noise that goes with it, both of shape (B, K, A)
    """
    # (B, A), (B, 1) -> (B, 1, A), (B, 1, 1), to broadcast over K
    x_t, t = x_t.unsqueeze(1), t.unsqueeze(1)
    sigma_t = diffusion.noise_to_signal[t]
    centre = diffusion.sqrt_recip_alphas_cumprod[t] * x_t / sigma_t
    # Mirror the interval into the lower tail, where the distribution function keeps its relative precision in float32
    sign = th.where(centre > 0, -1.0, 1.0)
    low = th.special.ndtr(sign * centre - 1 / sigma_t)
    high = th.special.ndtr(sign * centre + 1 / sigma_t)
    quantile = (low + uniform * (high - low)).clamp(min=th.finfo(uniform.dtype).tiny, max=1 - th.finfo(uniform.dtype).eps)
    noise = sign * th.special.ndtri(quantile)
    return diffusion.predict_x_0(x_t, t, noise).clamp(-1, 1), noise


#: From uniform or normal random numbers to candidates, with the function that draws the random numbers they need
PROPOSALS = {
    "truncated_normal": (truncated_normal_candidates, th.rand),
    "clipped_normal": (clipped_normal_candidates, th.randn),
}


def softmax_weights(q_values: th.Tensor, temperature: th.Tensor | float) -> th.Tensor:
    """
    Self-normalised importance weights exp(Q / lambda) / sum_k exp(Q_k / lambda) (paper, reverse sampling).

    :param q_values: Q of the candidates, shape (..., K)
    :param temperature: lambda > 0, in the unit of Q
    :return: weights that sum to one over K, shape (..., K)
    """
    return th.softmax(q_values / temperature, dim=-1)


def effective_sample_size(weights: th.Tensor) -> th.Tensor:
    """
    How many candidates share the weight: 1 / sum_k w_k^2, between 1 (one has it all) and K (all alike).

    :param weights: weights that sum to one over K, shape (..., K)
    :return: shape (...)
    """
    return 1 / weights.square().sum(dim=-1)


def solve_temperature(q_values: th.Tensor, target_ess: float, n_iterations: int = 20) -> th.Tensor:
    """
    The temperature at which the weights have, in the mean over the batch, the effective sample size ``target_ess``.

    The effective sample size grows with the temperature from 1 to K, so bisection finds it; the search runs over
    the logarithm, eight decades around the standard deviation of Q, so scaling Q by c > 0 scales the answer by c.
    The role of the dual variable in REPS and MPO, whose constraint is a KL divergence instead.

    :param q_values: Q of the candidates, shape (B, K)
    :param target_ess: effective sample size to reach, between 1 and K
    :param n_iterations: halvings of the eight decades; 20 leave a relative error of 2e-5
    :return: the temperature, a scalar in the unit of Q; never 0
    """
    centred = q_values - q_values.amax(dim=-1, keepdim=True)
    scale = (q_values - q_values.mean(dim=-1, keepdim=True)).square().mean().sqrt().clamp(min=1e-20)
    centred = centred / scale
    low = th.full_like(scale, 1e-4).log()
    high = -low
    for _ in range(n_iterations):
        middle = (low + high) / 2
        too_cold = effective_sample_size(softmax_weights(centred, middle.exp())).mean() < target_ess
        low, high = th.where(too_cold, middle, low), th.where(too_cold, high, middle)
    return scale * ((low + high) / 2).exp()


def expected_noise(noise: th.Tensor, weights: th.Tensor) -> th.Tensor:
    """
    The weighted mean of the candidates' noises, an estimate of E[noise | x_t] (paper, reverse sampling score matching).

    :param noise: shape (B, K, A)
    :param weights: weights that sum to one over K, shape (B, K)
    :return: shape (B, A)
    """
    # (B, 1, K) @ (B, K, A) -> (B, 1, A) -> (B, A)
    return (weights.unsqueeze(1) @ noise).squeeze(1)


def gradient_noise(
    diffusion: GaussianDiffusion, t: th.Tensor, gradients: th.Tensor, temperature: th.Tensor | float
) -> th.Tensor:
    """
    What the gradient of Q at each candidate says about the noise: -sigma_t grad Q(x_0) / lambda (target score identity).

    Integration by parts turns the posterior's mean noise into the posterior mean of this, sigma_t = sqrt(1 / abar_t - 1), as
    if the box had no boundary (De Bortoli et al. 2024, "Target Score Matching", arXiv 2402.08667). Where the noise is
    low this varies far less among the candidates than their noises do; the gradient never passes through the denoising chain.

    Each coordinate of each candidate's is bounded to plausible values of a standard normal noise, before they are averaged, at
    the price of a bias where the bound is reached. Without it, where Q is curved more than lambda / sigma_t^2, the gradient at
    a candidate is a step far beyond Q's maximum, as in gradient ascent with too large a step, and ends at the box's faces.

    :param diffusion: the forward process
    :param t: diffusion steps, shape (B, 1)
    :param gradients: of Q at the candidates, shape (B, K, A)
    :param temperature: lambda > 0, in the unit of Q
    :return: within ``MAX_GRADIENT_NOISE`` of 0, shape (B, K, A), to be averaged like the noises
    """
    noise = gradients * (-diffusion.noise_to_signal[t].unsqueeze(2) / temperature)
    return noise.clamp(-MAX_GRADIENT_NOISE, MAX_GRADIENT_NOISE)


def gradient_share(diffusion: GaussianDiffusion, t: th.Tensor, crossover: float = 0.5) -> th.Tensor:
    """
    How much of the target comes from :func:`gradient_noise`: 1 / (1 + (sigma_t / crossover)^2).

    Near 1 where the noise is low and Q's gradient tells most, near 0 where the noise is high and the candidates cover
    the box. Shares by inverse variance have the smaller error for a single mode inside the box. On frozen critics of MuJoCo
    the actor gained half as much with them (docs/what_we_tried.md, "Gradient share").

    :param diffusion: the forward process
    :param t: diffusion steps, shape (B, 1)
    :param crossover: the sigma_t at which both targets have half the weight
    :return: shape (B, 1), in (0, 1)
    """
    return 1 / (1 + (diffusion.noise_to_signal[t] / crossover).square())


def denoising_loss(predicted_noise: th.Tensor, noise: th.Tensor, weights: th.Tensor | float = 1.0) -> th.Tensor:
    """
    Weighted regression of the predicted noise, mean over all axes of w (predicted - noise)^2.

    The one loss of all variants. Reverse sampling passes all K noises, shape (B, K, A), with weights (B, K, 1) and
    the *one* prediction for them, shape (B, 1, A): the gradient is that of the mean noise, up to the factor 1 / K of the
    mean over K, since the weights sum to one.

    :param predicted_noise: shape (B, A) or (B, 1, A)
    :param noise: shape (B, A) or (B, K, A)
    :param weights: broadcastable to the noise
    :return: scalar
    """
    return (weights * (predicted_noise - noise).square()).mean()


class Candidates(NamedTuple):
    """
    K candidates for the x_0 behind each x_t.

    :param noise: the noise that leads from each to x_t, shape (B, K, A)
    :param q_values: their Q, shape (B, K)
    :param gradients: gradient of Q at them, shape (B, K, A), or None if the score target does not need it
    """

    noise: th.Tensor
    q_values: th.Tensor
    gradients: th.Tensor | None


#: ``(diffusion, t, predicted_noise, candidates, weights, temperature) -> loss``
ScoreLoss = Callable[[GaussianDiffusion, th.Tensor, th.Tensor, Candidates, th.Tensor, "th.Tensor | float"], th.Tensor]


def reverse_sampling_loss(
    diffusion: GaussianDiffusion,
    t: th.Tensor,
    predicted_noise: th.Tensor,
    candidates: Candidates,
    weights: th.Tensor,
    temperature: th.Tensor | float,
) -> th.Tensor:
    """
    Regression on the weighted noises (paper, reverse sampling score matching; SDAC of its final version).

    :param diffusion: the forward process (not used: all score targets are called alike)
    :param t: diffusion steps, shape (B, 1) (not used)
    :param predicted_noise: shape (B, A)
    :param candidates: K for each x_t
    :param weights: of the candidates, shape (B, K)
    :param temperature: lambda > 0, in the unit of Q (not used)
    :return: scalar
    """
    # (B, A) -> (B, 1, A): one prediction for all K noises
    return denoising_loss(predicted_noise.unsqueeze(1), candidates.noise, weights.unsqueeze(2))


def gradient_assisted_loss(
    diffusion: GaussianDiffusion,
    t: th.Tensor,
    predicted_noise: th.Tensor,
    candidates: Candidates,
    weights: th.Tensor,
    temperature: th.Tensor | float,
) -> th.Tensor:
    """
    Regression on the weighted mean of noises and :func:`gradient_noise`, mixed by :func:`gradient_share`.

    Both are estimates of E[noise | x_t], unbiased until they are bounded.

    :param diffusion: the forward process
    :param t: diffusion steps, shape (B, 1)
    :param predicted_noise: shape (B, A)
    :param candidates: K for each x_t, with gradients
    :param weights: of the candidates, shape (B, K)
    :param temperature: lambda > 0, in the unit of Q
    :return: scalar
    """
    assert candidates.gradients is not None
    implied = gradient_noise(diffusion, t, candidates.gradients, temperature)
    noise = candidates.noise.lerp(implied, gradient_share(diffusion, t).unsqueeze(2))  # (B, K, A)
    return denoising_loss(predicted_noise, expected_noise(noise, weights))


class ScoreTarget(NamedTuple):
    """
    One way to learn the score from candidates.

    :param loss: of the noise predictor
    :param needs_gradients: whether Q's gradients at the candidates have to be computed for it
    """

    loss: ScoreLoss
    needs_gradients: bool


#: By the name that ``SDAC(score_matching=...)`` takes; a new one is a function and an entry here
SCORE_TARGETS = {
    "gradient_assisted": ScoreTarget(gradient_assisted_loss, needs_gradients=True),
    "reverse_sampling": ScoreTarget(reverse_sampling_loss, needs_gradients=False),
}
