"""Mixtures of normal laws, whose denoiser is a formula: errors against it are exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS, REFERENCE = 64, 20000


@dataclass(frozen=True)
class Mixture:
    """sum_k w_k N(m_k, s_k^2 I), scaled to mean 0 and unit variance over all coordinates.

    Attributes:
        weights, means, stds: (K,), (K, D) and (K,), float64.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    @classmethod
    def drawn(cls, dimensions: int, components: int, spread: float, seed: int) -> Mixture:
        """Random means; standard deviations between half of ``spread`` and all of it, relative to
        those of the means."""
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(components, dimensions, generator=generator, dtype=torch.float64)
        stds = spread * (1 + torch.rand(components, generator=generator, dtype=torch.float64)) / 2
        weights = 0.5 + torch.rand(components, generator=generator, dtype=torch.float64)
        weights = weights / weights.sum()
        means = means - weights @ means
        variance = (weights @ (means.square().mean(1) + stds.square())).sqrt()
        return cls(weights, means / variance, stds / variance)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) float32."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return (self.means[which] + self.stds[which, None] * noise).float()

    def denoised(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] of x = alpha x0 + sigma noise, (N, D), for alpha and sigma (N,), in float64."""
        x, alpha, sigma = x.double(), alpha.double()[:, None], sigma.double()[:, None]
        variance = (alpha * self.stds).square() + sigma.square()
        away = x[:, None] - alpha[..., None] * self.means
        log = self.weights.log() - x.shape[1] * variance.log() / 2
        shares = (log - away.square().sum(2) / (2 * variance)).softmax(1)
        pull = alpha * self.stds.square() / variance
        return (shares[..., None] * (self.means + pull[..., None] * away)).sum(1)


def sliced_distance(mixture: Mixture, samples: Tensor) -> float:
    """Root of the mean over fixed directions of W2^2 between samples (N, D) and the mixture, of
    which 20,000 samples stand for the quantiles; 0.02 or so for samples of the mixture itself."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(samples.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64)
    axes = axes / axes.norm(dim=0)
    truth = mixture.draw(REFERENCE, generator).double() @ axes
    quantiles = (torch.arange(len(samples), dtype=torch.float64) + 0.5) / len(samples)
    places = (quantiles * REFERENCE).long()
    gap = (samples.double() @ axes).sort(0).values - truth.sort(0).values[places]
    return float(gap.square().mean().sqrt())
