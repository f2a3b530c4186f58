"""
Reverse-sampling score matching on densities we know: a diffusion learns to sample from exp(Q) with Q alone.

Q is the logarithm of a density in the plane, the temperature is 1, and there is no environment: the heart of SDAC is left.
The first density is the paper's (Ma et al. 2025, arXiv 2502.00361): 0.8 of a normal at (3, 3) and 0.2 of one at (-3, -3), 50
diffusion steps with linear betas from 0.001 to 0.3. Learns by reverse sampling with either kind of candidates,
and with Q's gradient, draws samples and prints their distance to the truth. Takes about two minutes on one core.

    python examples/toy_2d.py --output toy_2d.png
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th
from torch import nn

from sb3_sdac import score_matching as sm
from sb3_sdac.diffusion import GaussianDiffusion, linear_betas
from sb3_sdac.networks import NoisePredictor

#: The plane is divided by this before it is noised, since the package's diffusion lives in the box [-1, 1]^2
HALF_BOX = 6.0
#: Ways to the target: the candidates, and whether Q's gradient assists
METHODS = {
    "clipped normal (paper)": ("clipped_normal", False),
    "truncated normal": ("truncated_normal", False),
    "truncated normal + gradient": ("truncated_normal", True),
}


@dataclass
class Mixture:
    """
    A mixture of normals of equal, isotropic standard deviation.

    :param means: shape (M, 2)
    :param weights: sum to one, shape (M,)
    :param std: standard deviation of each
    """

    means: th.Tensor
    weights: th.Tensor
    std: float

    def log_density(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape (..., 2)
        :return: up to a constant, shape (...)
        """
        squares = (x.unsqueeze(-2) - self.means).square().sum(dim=-1)  # (..., 2) -> (..., M)
        return th.logsumexp(self.weights.log() - squares / (2 * self.std**2), dim=-1)

    def sample(self, n: int) -> th.Tensor:
        """:return: shape (n, 2)"""
        return self.means[th.multinomial(self.weights, n, replacement=True)] + self.std * th.randn(n, 2)

    def shares(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: samples, shape (n, 2)
        :return: the fraction of them that is nearest to each mean, shape (M,)
        """
        return th.cdist(x, self.means).argmin(dim=1).bincount(minlength=len(self.means)) / len(x)


def ring(n_normals: int = 24, radius: float = 3.5, std: float = 0.4) -> Mixture:
    """:return: normals so close together on a circle that they make a ring"""
    angles = th.arange(n_normals) * (2 * math.pi / n_normals)
    means = radius * th.stack([angles.cos(), angles.sin()], dim=1)
    return Mixture(means, th.full((n_normals,), 1 / n_normals), std)


DENSITIES = {
    "two modes, 0.8 and 0.2": Mixture(th.tensor([[3.0, 3.0], [-3.0, -3.0]]), th.tensor([0.8, 0.2]), 1.0),
    "four modes": Mixture(3 * th.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]), th.full((4,), 0.25), 0.5),
    "ring": ring(),
}


class Sampler:
    """
    A diffusion whose noise predictor learns from Q.

    :param q: from x, shape (..., 2) in the box [-6, 6]^2, to Q, shape (...)
    :param proposal: ``"clipped_normal"`` or ``"truncated_normal"``
    :param gradient_assisted: let Q's gradient take over where the noise is low
    :param n_diffusion_steps: T
    """

    def __init__(
        self, q: Callable[[th.Tensor], th.Tensor], proposal: str, gradient_assisted: bool, n_diffusion_steps: int = 50
    ) -> None:
        self.q = q
        self.propose, self.draw = sm.PROPOSALS[proposal]
        self.gradient_assisted = gradient_assisted
        betas = linear_betas(n_diffusion_steps, 0.001, 0.3)
        self.diffusion = GaussianDiffusion(betas, eta=1.0)
        self.fast_diffusion = GaussianDiffusion(betas, n_sampling_steps=min(10, n_diffusion_steps))  # DDIM, while learning
        # Nothing to condition on: no features. ReLU bends sooner than SiLU on inputs this small: with it 1000 updates do
        self.net = NoisePredictor(0, 2, n_diffusion_steps, [64, 64, 64], nn.ReLU)

    def target(self, x_t: th.Tensor, t: th.Tensor, n_candidates: int) -> th.Tensor:
        """
        :param x_t: noisy samples, shape (B, 2)
        :param t: diffusion steps, shape (B, 1)
        :param n_candidates: K
        :return: the noise to regress on, shape (B, 2)
        """
        x_0, noises = self.propose(self.diffusion, x_t, t, self.draw((len(x_t), n_candidates, 2)))  # (B, K, 2) each
        x_0.requires_grad_()
        q_values = self.q(HALF_BOX * x_0)  # (B, K)
        if self.gradient_assisted:
            (gradients,) = th.autograd.grad(q_values.sum(), x_0)
            share = sm.gradient_share(self.diffusion, t).unsqueeze(2)
            noises = noises.lerp(sm.gradient_noise(self.diffusion, t, gradients, 1.0), share)
        return sm.expected_noise(noises, sm.softmax_weights(q_values.detach(), 1.0))

    def learn(self, n_updates: int, batch_size: int = 256, n_candidates: int = 64) -> None:
        """
        :param n_updates: steps of Adam
        :param batch_size: B
        :param n_candidates: K
        """
        optimizer = th.optim.Adam(self.net.parameters(), lr=7e-3)
        schedule = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(n_updates, 1))
        for update in range(n_updates):
            # Where to match the score: around the model's own samples, as SDAC does around the actions of its policy
            if update % 10 == 0:
                own = self.sample(10 * batch_size, self.fast_diffusion) / HALF_BOX
            x_0 = own[th.randint(len(own), (batch_size,))]
            t = th.randint(self.diffusion.n_diffusion_steps, (batch_size, 1))
            x_t = self.diffusion.q_sample(x_0, t, th.randn_like(x_0))
            predicted = self.net(self.net.encode(x_t[:, :0]), x_t, self.net.encode_time()[t.squeeze(1)])
            loss = sm.denoising_loss(predicted, self.target(x_t, t, n_candidates))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @th.no_grad()
    def sample(self, n: int, diffusion: GaussianDiffusion | None = None) -> th.Tensor:
        """
        :param n: number of samples
        :param diffusion: the one to reverse, by default in all its steps
        :return: shape (n, 2), in [-6, 6]^2
        """
        diffusion = diffusion or self.diffusion
        encoded, encoded_t = self.net.encode(th.zeros(n, 0)), self.net.encode_time()
        step_noise = th.randn(diffusion.n_sampling_steps, n, 2) if diffusion.eta > 0 else None
        x_0 = diffusion.sample(lambda x_t, t: self.net(encoded, x_t, encoded_t[t]), th.randn(n, 2), step_noise)
        return HALF_BOX * x_0


def sliced_wasserstein(x: th.Tensor, y: th.Tensor, n_directions: int = 100) -> float:
    """
    Mean over directions of the Wasserstein-1 distance of the projections (Bonneel et al. 2015).

    :param x: samples, shape (n, 2)
    :param y: as many, shape (n, 2)
    :param n_directions: equally spaced over the half circle
    :return: the distance, in the unit of the samples
    """
    angles = th.arange(n_directions) * (math.pi / n_directions)
    directions = th.stack([angles.cos(), angles.sin()])  # (2, D)
    return ((x @ directions).sort(dim=0).values - (y @ directions).sort(dim=0).values).abs().mean().item()


def run(density: Mixture, method: str, n_updates: int, n_samples: int, seed: int = 0) -> th.Tensor:
    """:return: samples of a sampler that learned on ``density``, shape (n_samples, 2); untrained with ``n_updates=0``"""
    th.manual_seed(seed)
    sampler = Sampler(density.log_density, *METHODS[method])
    sampler.learn(n_updates)
    return sampler.sample(n_samples)


def draw_picture(samples: dict[str, dict[str, th.Tensor]], path: Path) -> None:
    """
    :param samples: by density and method
    :param path: where to save it
    """
    from matplotlib.figure import Figure

    columns = len(next(iter(samples.values())))
    figure = Figure(figsize=(2.3 * columns + 0.8, 2.3 * len(samples) + 0.5), layout="constrained")
    axes = figure.subplots(len(samples), columns, sharex=True, sharey=True, squeeze=False)
    limits = [-HALF_BOX, HALF_BOX]  # the frame of each panel
    for axis, method in zip(axes[0], next(iter(samples.values())), strict=True):
        axis.set_title(method, fontsize=9)
    for row, (density, by_method) in zip(axes, samples.items(), strict=True):
        row[0].set_ylabel(f"{density}\ny", fontsize=9)
        counts = [np.histogram2d(x[:, 0].numpy(), x[:, 1].numpy(), bins=60, range=[limits] * 2)[0] for x in by_method.values()]
        share = [100 * count / len(x) for count, x in zip(counts, by_method.values(), strict=True)]
        top = float(np.quantile(np.stack(share), 0.999))  # the same colours in a row; single bins may be above
        for axis, image in zip(row, share, strict=True):
            shown = axis.imshow(
                image.T, origin="lower", extent=(*limits, *limits), cmap="magma", vmin=0, vmax=top, interpolation="nearest"
            )
            axis.set(xticks=[-6, 0, 6], yticks=[-6, 0, 6])
        figure.colorbar(shown, ax=list(row), extend="max", label="% of the samples per bin")
    for axis in axes[-1]:
        axis.set_xlabel("x", fontsize=9)
    n = len(next(iter(next(iter(samples.values())).values())))
    figure.suptitle(f"{n:,} samples of exp(Q), and of diffusions that learned from Q alone; the frame is the box", fontsize=10)
    figure.savefig(path, dpi=72)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score matching on Q alone, on densities in the plane.")
    parser.add_argument("--output", type=Path, default=Path("toy_2d.png"), help="the picture")
    parser.add_argument("--updates", type=int, default=1000, help="updates per density and method")
    parser.add_argument("--samples", type=int, default=10_000, help="samples per density and method")
    arguments = parser.parse_args()
    th.set_num_threads(1)

    samples: dict[str, dict[str, th.Tensor]] = {}
    print(f"{'density':24}{'samples':30}{'distance':>9}  {'share of each mode'}")
    for name, density in DENSITIES.items():
        th.manual_seed(0)
        truth, other = density.sample(arguments.samples), density.sample(arguments.samples)
        samples[name] = {"truth": truth}
        drawn = {"truth, drawn anew": other, "not trained": run(density, next(iter(METHODS)), 0, arguments.samples)}
        for method in METHODS:
            drawn[method] = samples[name][method] = run(density, method, arguments.updates, arguments.samples)
        for label, x in drawn.items():
            shares = " ".join(f"{share:.2f}" for share in density.shares(x)) if len(density.means) <= 4 else ""
            print(f"{name:24}{label:30}{sliced_wasserstein(x, truth):9.3f}  {shares}", flush=True)
    draw_picture(samples, arguments.output)


if __name__ == "__main__":
    main()
