"""Candidates, weights, targets and temperature against closed forms."""

import math
from collections.abc import Callable

import pytest
import torch as th

from sb3_sdac import score_matching as sm
from sb3_sdac.diffusion import BETA_SCHEDULES, GaussianDiffusion, cosine_betas, linear_betas
from sb3_sdac.networks import NoisePredictor

T = 20
MU, SIGMA = 0.2, 0.15  # of Q = -(x - MU)^2 / (2 SIGMA^2): at temperature 1 the policy is N(MU, SIGMA^2)


@pytest.fixture
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(linear_betas(T))


def quadratic_q(x: th.Tensor) -> th.Tensor:
    return -((x - MU) ** 2).sum(dim=-1) / (2 * SIGMA**2)


def gradients_of(q_function: Callable[[th.Tensor], th.Tensor], x: th.Tensor) -> th.Tensor:
    x = x.clone().requires_grad_()
    return th.autograd.grad(q_function(x).sum(), x)[0]


def posterior_mean_noise(diffusion: GaussianDiffusion, x_t: float, t: int) -> float:
    """E[noise | x_t] when x_0 ~ N(MU, SIGMA^2), without a box: linear regression of two jointly normal variables."""
    signal, noise = diffusion.sqrt_alphas_cumprod[t].item(), diffusion.sqrt_one_minus_alphas_cumprod[t].item()
    return noise * (x_t - signal * MU) / (signal**2 * SIGMA**2 + noise**2)


def weighted_noise(x_0: th.Tensor, noise: th.Tensor) -> tuple[float, float]:
    """The target and its standard error (delta method for a self-normalised estimate)."""
    weights = sm.softmax_weights(quadratic_q(x_0), 1.0)
    target = sm.expected_noise(noise, weights)
    error = (weights.unsqueeze(-1) * (noise - target.unsqueeze(1))).square().sum().sqrt()
    return target.item(), error.item()


@pytest.mark.parametrize("t", [2, 5, 8, 12])
@pytest.mark.parametrize("proposal", list(sm.PROPOSALS))
def test_weighted_noise_is_the_posterior_mean(diffusion: GaussianDiffusion, proposal: str, t: int) -> None:
    # At the mean of x_t, MU and SIGMA keep x_0 away from the box's faces, so the box changes nothing
    x_t = diffusion.sqrt_alphas_cumprod[t].item() * MU + 0.1
    propose, draw = sm.PROPOSALS[proposal]
    random_numbers = draw((1, 200_000, 1), generator=th.Generator().manual_seed(t))
    x_0, noise = propose(diffusion, th.tensor([[x_t]]), th.tensor([[t]]), random_numbers)
    target, error = weighted_noise(x_0, noise)
    assert error < 0.01
    assert target == pytest.approx(posterior_mean_noise(diffusion, x_t, t), abs=4 * error + 1e-3)


@pytest.mark.parametrize("t", [0, 1, 2, 5, 8])
def test_gradient_noise_is_the_posterior_mean(diffusion: GaussianDiffusion, t: int) -> None:
    """The target score identity gives the same expectation, with the smaller variance where the noise is low."""
    n = 100_000
    x_t = diffusion.sqrt_alphas_cumprod[t].item() * MU + 0.1
    generator = th.Generator().manual_seed(t)
    steps = th.tensor([[t]])
    x_0, _ = sm.truncated_normal_candidates(diffusion, th.tensor([[x_t]]), steps, th.rand((1, n, 1), generator=generator))
    weights = sm.softmax_weights(quadratic_q(x_0), 1.0)
    noises = sm.gradient_noise(diffusion, steps, gradients_of(quadratic_q, x_0), 1.0)
    target = sm.expected_noise(noises, weights)
    error = (weights.unsqueeze(-1) * (noises - target.unsqueeze(1))).square().sum().sqrt().item()
    assert error < (0.01 if t < 5 else 0.1)  # the gradient's variance grows with the noise
    assert target.item() == pytest.approx(posterior_mean_noise(diffusion, x_t, t), abs=4 * error + 1e-4)


def test_gradient_noise_is_bounded(diffusion: GaussianDiffusion) -> None:
    gradients = th.tensor([[[0.0, 1.0], [-1e6, 1e6]]])  # (1, 2, 2)
    noises = sm.gradient_noise(diffusion, th.tensor([[3]]), gradients, 2.0)
    sigma_t = (1 / diffusion.sqrt_alphas_cumprod[3] ** 2 - 1).sqrt().item()
    th.testing.assert_close(noises, th.tensor([[[0.0, -sigma_t / 2], [5.0, -5.0]]]))


@pytest.mark.parametrize("width", [0.05, 0.02])
def test_bounded_gradients_find_a_steep_maximum(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Actions denoised with the mean target of four candidates end at the maximum of Q = -(x - MU)^2 / (2 width^2).

    Were the gradient's noise not bounded, each step would shoot beyond it, and most would end at the faces of the box.
    """
    diffusion, n_particles, n_draws = GaussianDiffusion(BETA_SCHEDULES["vp"](T), 5, 0.0), 64, 500

    def predict_noise(x_t: th.Tensor, t: int) -> th.Tensor:
        repeated = x_t.reshape(-1, 1).repeat_interleave(n_draws, dim=0)  # (particles * draws, 1)
        steps = th.full_like(repeated, t, dtype=th.int64)
        x_0, noise = sm.truncated_normal_candidates(diffusion, repeated, steps, th.rand(len(repeated), 4, 1))
        weights = sm.softmax_weights(-(x_0 - MU).squeeze(-1) ** 2 / (2 * width**2), 1.0)
        assisted = sm.gradient_noise(diffusion, steps, (MU - x_0) / width**2, 1.0)
        noise = noise.lerp(assisted, sm.gradient_share(diffusion, steps).unsqueeze(2))
        return sm.expected_noise(noise, weights).view(n_particles, n_draws).mean(dim=1).view(x_t.shape)

    def mean_error() -> float:
        th.manual_seed(0)
        x_T = 0.5 * th.randn(n_particles, 1, 1)
        return (diffusion.sample(predict_noise, x_T, None) - MU).abs().mean().item()

    assert mean_error() < 0.1
    monkeypatch.setattr(sm, "MAX_GRADIENT_NOISE", math.inf)
    assert mean_error() > 0.5


def test_temperature_divides_q(diffusion: GaussianDiffusion) -> None:
    """Q and temperature scaled together leave both targets as they are."""
    t = th.tensor([[6], [3]])
    x_0, noise = sm.truncated_normal_candidates(diffusion, th.zeros(2, 3), t, th.rand(2, 8, 3))
    gradients = gradients_of(quadratic_q, x_0)
    targets = []
    for scale in (1.0, 100.0):
        weights = sm.softmax_weights(scale * quadratic_q(x_0), scale)
        assisted = sm.gradient_noise(diffusion, t, scale * gradients, scale)
        targets.append([sm.expected_noise(noise, weights), sm.expected_noise(assisted, weights)])
    th.testing.assert_close(targets[0], targets[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", range(T))
def test_truncated_candidates(diffusion: GaussianDiffusion, t: int) -> None:
    """Inside the box, consistent with their noise, and distributed as a truncated normal."""
    n = 20_000
    generator = th.Generator().manual_seed(0)
    x_t = diffusion.q_sample(th.tensor([[0.9, -0.5]]), t, th.tensor([[1.5, -3.0]]))
    steps = th.tensor([[t]])
    x_0, noise = sm.truncated_normal_candidates(diffusion, x_t, steps, th.rand((1, n, 2), generator=generator))
    assert x_0.abs().max() <= 1
    implied = diffusion.predict_x_0(x_t.unsqueeze(1), steps.unsqueeze(1), noise)
    scale = diffusion.sqrt_recip_alphas_cumprod[t].item() * (1 + x_t.abs().max().item())
    assert (implied - x_0).abs().max() < 20 * th.finfo(th.float32).eps * scale
    # Against numerical integration of N(x_0; x_t / sqrt(abar), sigma_t^2) over the box, in float64
    grid = th.linspace(-1, 1, 20_001, dtype=th.float64).unsqueeze(1)
    centre = (diffusion.sqrt_recip_alphas_cumprod[t] * x_t).double()
    density = th.softmax(-((grid - centre) ** 2) / (2 * diffusion.noise_to_signal[t].double() ** 2), dim=0)
    mean = (density * grid).sum(0)
    std = (density * (grid - mean) ** 2).sum(0).sqrt()
    error = 4 * std / math.sqrt(n) + 1e-5 * scale
    assert ((x_0[0].mean(0) - mean).abs() < error).all()


def test_clipped_candidates_keep_their_noise(diffusion: GaussianDiffusion) -> None:
    noise = th.randn(4, 8, 2)
    t = th.tensor([[0], [5], [10], [19]])
    x_0, kept = sm.clipped_normal_candidates(diffusion, th.zeros(4, 2), t, noise)
    assert kept is noise
    assert x_0.abs().max() == 1 and (x_0[0].abs() < 1).all()


def test_weights() -> None:
    q_values = th.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    weights = sm.softmax_weights(q_values, 2.0)
    by_hand = [math.exp(q / 2) for q in (1.0, 2.0, 4.0)]
    assert weights[0].tolist() == pytest.approx([w / sum(by_hand) for w in by_hand])
    assert weights[1].tolist() == pytest.approx([1 / 3] * 3)
    th.testing.assert_close(sm.softmax_weights(q_values + 7, 2.0), weights)
    assert sm.softmax_weights(q_values, 1e-3)[0].tolist() == pytest.approx([0, 0, 1])
    assert sm.softmax_weights(q_values, 1e6)[0].tolist() == pytest.approx([1 / 3] * 3, abs=1e-5)


def test_effective_sample_size() -> None:
    weights = th.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])
    assert sm.effective_sample_size(weights).tolist() == pytest.approx([1, 2, 4])


def test_solve_temperature_closed_form() -> None:
    """With Q in {0, 1}, half each, and w = e^(1/lambda): ESS = K/2 (1 + w)^2 / (1 + w^2), solved for w."""
    n_candidates, target = 16, 12.0
    q_values = th.tensor([[0.0, 1.0]]).repeat(5, n_candidates // 2)
    ratio = 2 * target / n_candidates  # (1 + w)^2 = ratio (1 + w^2)
    w = (1 + math.sqrt(1 - (ratio - 1) ** 2)) / (ratio - 1)
    for scale in (1e-3, 1.0, 1e5):
        found = sm.solve_temperature(scale * q_values + 3, target).item()
        assert found == pytest.approx(scale / math.log(w), rel=1e-3 if scale == 1e-3 else 1e-4)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.9])
def test_solve_temperature_hits_the_target(fraction: float) -> None:
    q_values = th.randn(64, 32, generator=th.Generator().manual_seed(0)).cumsum(0)
    temperature = sm.solve_temperature(q_values, fraction * 32)
    ess = sm.effective_sample_size(sm.softmax_weights(q_values, temperature)).mean()
    assert ess.item() == pytest.approx(fraction * 32, rel=1e-3)


def test_solve_temperature_survives_a_flat_q() -> None:
    temperature = sm.solve_temperature(th.ones(4, 8), 3.0)
    assert temperature > 0
    assert sm.softmax_weights(th.ones(4, 8), temperature).isfinite().all()


def test_one_prediction_has_the_gradient_of_k_predictions() -> None:
    generator = th.Generator().manual_seed(0)
    noise = th.randn(6, 9, 2, generator=generator, dtype=th.float64)
    weights = th.softmax(th.randn(6, 9, generator=generator, dtype=th.float64), -1)
    predicted = th.randn(6, 2, generator=generator, dtype=th.float64, requires_grad=True)
    per_candidate = sum(sm.denoising_loss(predicted, noise[:, k], weights[:, k, None]) for k in range(9)) / 9
    assert isinstance(per_candidate, th.Tensor)
    together = sm.denoising_loss(predicted.unsqueeze(1), noise, weights.unsqueeze(-1))
    mean_noise = sm.denoising_loss(predicted, sm.expected_noise(noise, weights)) / 9
    assert together.item() == pytest.approx(per_candidate.item())
    gradients = [th.autograd.grad(loss, predicted)[0] for loss in (per_candidate, together, mean_noise)]
    th.testing.assert_close(gradients[1], gradients[0])
    th.testing.assert_close(gradients[2], gradients[0])


def test_gradient_share(diffusion: GaussianDiffusion) -> None:
    share = sm.gradient_share(diffusion, th.arange(T).unsqueeze(1)).squeeze(1)
    assert (share.diff() < 0).all() and share[0] > 0.99 and share[-1] < 1e-3
    t = 4
    assert share[t].item() == pytest.approx(1 / (1 + (diffusion.noise_to_signal[t].item() / 0.5) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("gradient_assisted", [False, True])
def test_both_modes_of_q_are_learned(gradient_assisted: bool) -> None:
    """
    exp(Q) with 70 % of its mass around -0.6 and 30 % around 0.5: a small noise predictor samples both, at their shares.

    Even with the exact denoiser, 20 ancestral steps pull the modes' means in to -0.59 and 0.48.
    """
    th.manual_seed(0)
    diffusion = GaussianDiffusion(cosine_betas(T), eta=1.0)

    def q_function(x: th.Tensor) -> th.Tensor:
        left, right = math.log(0.7) - (x + 0.6) ** 2 / 0.02, math.log(0.3) - (x - 0.5) ** 2 / 0.02
        return th.logaddexp(left, right).squeeze(-1)

    net = NoisePredictor(1, 1, T, [64, 64], th.nn.SiLU)
    optimizer = th.optim.Adam(net.parameters(), lr=3e-3)
    features, batch_size = th.zeros(1, 1), 256
    for _ in range(1500):
        t = th.randint(T, (batch_size, 1))
        x_t = diffusion.q_sample(2 * th.rand(batch_size, 1) - 1, t, th.randn(batch_size, 1))
        # A quarter of the candidates will do with the gradients
        n_candidates = 16 if gradient_assisted else 64
        x_0, noise = sm.truncated_normal_candidates(diffusion, x_t, t, th.rand(batch_size, n_candidates, 1))
        weights = sm.softmax_weights(q_function(x_0), 1.0)
        if gradient_assisted:
            # Modes of width 0.1 make Q steep: the gradient pays off at lower noise than by default
            assisted = sm.gradient_noise(diffusion, t, gradients_of(q_function, x_0), 1.0)
            noise = noise.lerp(assisted, sm.gradient_share(diffusion, t, crossover=0.1).unsqueeze(2))
        target = sm.expected_noise(noise, weights)
        loss = sm.denoising_loss(net(net.encode(features), x_t, net.encode_time()[t.squeeze(1)]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with th.no_grad():
        encoded, encoded_t = net.encode(features), net.encode_time()
        samples = diffusion.sample(
            lambda x_t, t: net(encoded, x_t, encoded_t[t]), th.randn(4000, 1), th.randn(T, 4000, 1)
        ).squeeze(1)
    left = samples < 0
    assert left.float().mean().item() == pytest.approx(0.7, abs=0.08)
    assert samples[left].mean().item() == pytest.approx(-0.6, abs=0.05)
    assert samples[~left].mean().item() == pytest.approx(0.5, abs=0.05)
    assert (samples[left] + 0.6).abs().mean() < 0.12  # 0.08 for the exact density
