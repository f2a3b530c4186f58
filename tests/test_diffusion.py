"""Beta schedules, forward noising and reverse diffusion against closed forms and independent float64 loops."""

import math
from itertools import pairwise

import pytest
import torch as th

from sb3_sdac.diffusion import BETA_SCHEDULES, GaussianDiffusion, cosine_betas, linear_betas, vp_betas

T = 20


@pytest.fixture(params=list(BETA_SCHEDULES))
def betas(request: pytest.FixtureRequest) -> th.Tensor:
    return BETA_SCHEDULES[request.param](T)


def test_schedules(betas: th.Tensor) -> None:
    assert betas.shape == (T,) and betas.dtype == th.float64
    assert ((betas > 0) & (betas < 1)).all()
    assert (betas.diff() > 0).all()


def test_schedules_pinned() -> None:
    assert linear_betas(T)[[0, -1]].tolist() == pytest.approx([0.8e-4, 0.8 * 0.999])
    # cos^2 by hand: abar(0) = cos^2(0.008 / 1.008 * pi / 2), abar(1) likewise at 1/20 + 0.008; the last beta is capped
    abar = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (0, 1 / T)]
    assert cosine_betas(T)[[0, -1]].tolist() == pytest.approx([1 - abar[1] / abar[0], 0.999])
    # The variance-preserving SDE has log abar(time 1) = -(beta_min + (beta_max - beta_min) / 2), whatever T
    for n_diffusion_steps in (5, 50):
        assert th.log(1 - vp_betas(n_diffusion_steps)).sum().item() == pytest.approx(-(0.1 + 9.9 / 2))


def test_q_sample_is_many_single_steps(betas: th.Tensor) -> None:
    """Mean and variance of x_t from x_0 in one go are those of t + 1 single noising steps."""
    diffusion = GaussianDiffusion(betas)
    mean, variance = 1.0, 0.0
    for t in range(T):
        mean, variance = math.sqrt(1 - betas[t]) * mean, (1 - betas[t].item()) * variance + betas[t].item()
        assert diffusion.q_sample(th.ones(1), t, th.zeros(1)).item() == pytest.approx(mean, rel=1e-5)
        assert diffusion.q_sample(th.zeros(1), t, th.ones(1)).item() == pytest.approx(math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize("leading", [(), (7,), (7, 3), (2, 7, 3)])
def test_predict_x_0_inverts_q_sample(betas: th.Tensor, leading: tuple[int, ...]) -> None:
    diffusion = GaussianDiffusion(betas).double()
    generator = th.Generator().manual_seed(0)
    x_0, noise = th.randn((2, *leading, 4), generator=generator, dtype=th.float64)
    t = th.randint(T, (*leading, 1), generator=generator)
    recovered = diffusion.predict_x_0(diffusion.q_sample(x_0, t, noise), t, noise)
    # The buffers were rounded to float32 before; the noisiest steps of the cosine schedule multiply that by 1 / sqrt(abar)
    tolerance = 4 * th.finfo(th.float32).eps * diffusion.sqrt_recip_alphas_cumprod.max().item()
    th.testing.assert_close(recovered, x_0, atol=tolerance, rtol=0)


def posterior(betas: th.Tensor, x_0: th.Tensor, x_t: th.Tensor, t: int) -> tuple[th.Tensor, float]:
    """q(x_{t-1} | x_t, x_0): mean and variance of the product of N(x_{t-1}; ., x_0) and N(x_t; ., x_{t-1})."""
    if t == 0:
        return x_0, 0.0
    beta, abar_prev = betas[t].item(), th.prod(1 - betas[:t]).item()
    prior_mean, prior_variance = math.sqrt(abar_prev) * x_0, 1 - abar_prev
    # x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise, as a likelihood of x_{t-1}
    likelihood_mean, likelihood_variance = x_t / math.sqrt(1 - beta), beta / (1 - beta)
    variance = 1 / (1 / prior_variance + 1 / likelihood_variance)
    return variance * (prior_mean / prior_variance + likelihood_mean / likelihood_variance), variance


def test_ancestral_sampling_is_the_posterior(betas: th.Tensor) -> None:
    """eta = 1 in all T steps draws from the posterior of the clipped x_0, step by step, and adds no noise at the end."""
    diffusion = GaussianDiffusion(betas, eta=1.0)
    generator = th.Generator().manual_seed(1)
    x_T = th.randn(5, 2, generator=generator)
    step_noise = th.randn(T, 5, 2, generator=generator)

    def denoiser(x_t: th.Tensor, t: int) -> th.Tensor:
        return th.sin(x_t + t)

    x = x_T
    for step, t in enumerate(reversed(range(T))):
        x_0 = diffusion.predict_x_0(x, t, denoiser(x, t)).clamp(-1, 1)
        mean, variance = posterior(betas, x_0, x, t)
        x = mean + math.sqrt(variance) * step_noise[step]
    th.testing.assert_close(diffusion.sample(denoiser, x_T, step_noise), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("n_sampling_steps", "steps"), [(1, [19]), (5, [19, 9, 6, 3, 1]), (20, list(range(19, -1, -1)))])
def test_sampler_with_the_exact_denoiser(eta: float, n_sampling_steps: int, steps: list[int]) -> None:
    """
    For x_0 ~ N(m, s^2) the noise's posterior mean is linear in x_t, so every x_t stays normal: its mean and standard deviation
    follow from DDIM, equation 12, by a scalar loop. (The cosine schedule ends at abar = 2e-6: x_T is standard normal.)
    """
    mean, std, n_samples = 0.2, 0.05, 20_000
    abar = [*th.cumprod(1 - cosine_betas(T), 0).tolist(), 1.0]  # abar[-1] is that of x_0

    def slope_of_noise(t: int) -> float:
        return math.sqrt(1 - abar[t]) / (abar[t] * std**2 + 1 - abar[t])

    def denoiser(x_t: th.Tensor, t: int) -> th.Tensor:
        return slope_of_noise(t) * (x_t - math.sqrt(abar[t]) * mean)

    expected_mean, expected_variance = 0.0, 1.0
    for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
        sigma = eta * math.sqrt((1 - abar[t_prev]) / (1 - abar[t])) * math.sqrt(1 - abar[t] / abar[t_prev])
        noise_mean, noise_slope = slope_of_noise(t) * (expected_mean - math.sqrt(abar[t]) * mean), slope_of_noise(t)
        direction = math.sqrt(1 - abar[t_prev] - sigma**2)
        signal = math.sqrt(abar[t_prev] / abar[t])
        expected_mean = signal * (expected_mean - math.sqrt(1 - abar[t]) * noise_mean) + direction * noise_mean
        slope = signal * (1 - math.sqrt(1 - abar[t]) * noise_slope) + direction * noise_slope
        expected_variance = slope**2 * expected_variance + sigma**2

    generator = th.Generator().manual_seed(2)
    x_T = th.randn(n_samples, 1, generator=generator)
    step_noise = th.randn(n_sampling_steps, n_samples, 1, generator=generator)
    samples = GaussianDiffusion(cosine_betas(T), n_sampling_steps, eta).sample(denoiser, x_T, step_noise)
    expected_std = math.sqrt(expected_variance)
    assert samples.mean().item() == pytest.approx(expected_mean, abs=4 * expected_std / math.sqrt(n_samples) + 5e-4)
    assert samples.std().item() == pytest.approx(expected_std, rel=4 / math.sqrt(2 * n_samples), abs=5e-4)


def test_samples_converge_with_the_number_of_steps() -> None:
    """The exact denoiser's normal distribution comes out right as T grows, which a wrong coefficient would prevent."""
    std, x_T = 0.3, th.linspace(-2, 2, 201).unsqueeze(1)
    errors = []
    for n_diffusion_steps in (10, 100, 1000):
        betas = vp_betas(n_diffusion_steps, beta_max=20.0)
        abar = th.cumprod(1 - betas, 0)

        def denoiser(x_t: th.Tensor, t: int, abar: th.Tensor = abar) -> th.Tensor:
            a = abar[t].item()
            return math.sqrt(1 - a) * x_t / (a * std**2 + 1 - a)

        # DDIM is the flow that maps N(0, 1) to N(0, s^2) linearly, so a grid of starts is as good as samples
        x_0 = GaussianDiffusion(betas, eta=0.0).sample(denoiser, x_T)
        errors.append((x_0 - std * x_T).abs().max().item())
    # First order in the step size
    assert errors[1] < 0.2 * errors[0] and errors[2] < 0.2 * errors[1] and errors[2] < 5e-3


def wasserstein_to_two_modes(betas: th.Tensor, n_sampling_steps: int) -> float:
    """Distance of the sampler's output, with the exact denoiser, to 0.7 N(-0.6, 0.1^2) + 0.3 N(0.5, 0.1^2) in the box."""
    diffusion = GaussianDiffusion(betas, n_sampling_steps)
    grid = th.linspace(-1, 1, 2001)
    log_density = th.logaddexp(math.log(0.7) - (grid + 0.6) ** 2 / 0.02, math.log(0.3) - (grid - 0.5) ** 2 / 0.02)

    def denoiser(x_t: th.Tensor, t: int) -> th.Tensor:
        centre, sigma_t = diffusion.sqrt_recip_alphas_cumprod[t] * x_t, diffusion.noise_to_signal[t]
        weights = th.softmax(log_density - (centre - grid) ** 2 / (2 * sigma_t**2), dim=-1)  # (n, 1) -> (n, 2001)
        return (centre - (weights * grid).sum(-1, keepdim=True)) / sigma_t

    n_samples = 2000
    levels = (th.arange(n_samples) + 0.5) / n_samples
    samples = diffusion.sample(denoiser, th.special.ndtri(levels).unsqueeze(1)).squeeze(1).sort().values
    quantiles = grid[th.searchsorted(th.softmax(log_density, 0).cumsum(0), levels).clamp(max=2000)]
    return (samples - quantiles).abs().mean().item()


def test_few_steps_lose_little() -> None:
    few, all_steps = wasserstein_to_two_modes(linear_betas(T), 5), wasserstein_to_two_modes(linear_betas(T), T)
    assert all_steps < 0.06
    assert few < 0.085  # 0.18 with steps equally spaced in t


def steps_taken(diffusion: GaussianDiffusion) -> list[int]:
    seen: list[int] = []

    def denoiser(x_t: th.Tensor, t: int) -> th.Tensor:
        seen.append(t)
        return x_t

    diffusion.sample(denoiser, th.zeros(1, 1))
    return seen


def test_few_steps_are_taken_where_x_0_is_decided() -> None:
    assert steps_taken(GaussianDiffusion(linear_betas(T), 5)) == [19, 9, 6, 3, 1]


@pytest.mark.parametrize("n_diffusion_steps", [1, 2, 5, 20, 50])
def test_thinned_steps_are_distinct(n_diffusion_steps: int) -> None:
    for betas in (schedule(n_diffusion_steps) for schedule in BETA_SCHEDULES.values()):
        for n_sampling_steps in range(1, n_diffusion_steps + 1):
            seen = steps_taken(GaussianDiffusion(betas, n_sampling_steps))
            assert len(seen) == n_sampling_steps and seen[0] == n_diffusion_steps - 1 and seen[-1] >= 0
            assert all(t > t_next for t, t_next in pairwise(seen))


def test_samples_stay_in_the_box() -> None:
    samples = GaussianDiffusion(linear_betas(T), 5).sample(lambda x_t, t: -100 * x_t, th.randn(50, 3))
    assert samples.abs().max() <= 1


def test_coefficients_follow_the_device_but_are_not_state() -> None:
    diffusion = GaussianDiffusion(linear_betas(T))
    assert not diffusion.state_dict()
    assert diffusion.to("meta").sqrt_alphas_cumprod.device.type == "meta"


@pytest.mark.parametrize("n_sampling_steps", [0, 21])
def test_number_of_sampling_steps_is_checked(n_sampling_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and .* 20, got {n_sampling_steps}"):
        GaussianDiffusion(linear_betas(T), n_sampling_steps)


def test_ancestral_sampling_needs_noise() -> None:
    with pytest.raises(ValueError, match="pass step_noise"):
        GaussianDiffusion(linear_betas(T), eta=1.0).sample(lambda x_t, t: x_t, th.zeros(1, 1))
