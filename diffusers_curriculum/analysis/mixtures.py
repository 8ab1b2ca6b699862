"""Data whose noised law is known: mixtures of round Gaussians, and finite sets of samples.

Their relative entropies are exact up to quadrature in one and two dimensions, and estimates with
standard errors in more. Their best denoiser is known too, a measure for what learns it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.analysis.relative_entropy import Estimate, slopes
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.randomness import host_generator

_REACH, _NODES = 10.0, 161  # of a quadrature, per dimension: standard deviations, points
_LARGEST = 2**24  # table of points times components that is integrated; samples are drawn above it
_CHUNK = 2**22  # numbers in one table of points times components


@dataclass(frozen=True, eq=False)
class Mixture:
    """Weights (K,), means (K, D) and variances (K,) of round Gaussians; float64.

    Raises:
        ValueError: shapes that do not fit, weights that are no probabilities, negative variances.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        count = len(self.means)
        fits = self.means.ndim == 2 and self.weights.shape == self.variances.shape == (count,)
        if not fits or not count:
            shapes = [tuple(x.shape) for x in (self.weights, self.means, self.variances)]
            raise ValueError(f"a mixture needs (K,), (K, D) and (K,), not {shapes}.")
        sums = abs(float(self.weights.sum()) - 1) < 1e-6
        if not sums or bool((self.weights <= 0).any()) or bool((self.variances < 0).any()):
            raise ValueError(
                "a mixture needs weights above 0 that sum to 1 and variances of 0 or more: the "
                f"weights sum to {float(self.weights.sum()):.6g}, the least variance is "
                f"{float(self.variances.min()):.4g}."
            )

    @classmethod
    def of_samples(cls, samples: Tensor) -> Mixture:
        """The finite set of samples (K, ...), each as likely as the others."""
        means = samples.flatten(1).double().cpu()
        equal = torch.ones(len(means), dtype=torch.float64)
        return cls(equal / equal.sum(), means, torch.zeros_like(equal))

    @property
    def dimension(self) -> int:
        return self.means.shape[1]

    def log_terms(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(N, K) logarithm of weight times density of each noised component at x (N, D); ``alpha``
        and ``sigma`` 0-dim, or one for each x."""
        alpha, sigma = alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        variance = alpha.square() * self.variances + sigma.square()
        scale = self.dimension / 2 * torch.log(2 * math.pi * variance)
        return self.weights.log() - scale - self._squares(x, alpha) / (2 * variance)

    def denoised(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(N, D) the best estimate E[x0 | x]; arguments as of :meth:`log_terms`."""
        share = self.log_terms(x, alpha, sigma).softmax(1)
        alpha, sigma = alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        gain = alpha * self.variances / (alpha.square() * self.variances + sigma.square())
        kept = (share * gain).sum(1, keepdim=True)
        return kept * x + (share * (1 - gain * alpha)) @ self.means

    def _squares(self, x: Tensor, alpha: Tensor) -> Tensor:
        """(N, K) squared distances from the noised means."""
        own = x.square().sum(1, keepdim=True) + alpha.square() * self.means.square().sum(1)
        return (own - 2 * alpha * (x @ self.means.T)).clamp_min(0)

    def slopes(self, x: Tensor, levels: NoiseLevels, index: int) -> Tensor:
        """(N, K) d/dl of the logarithm of each component's density at x."""
        alpha, sigma = levels.alpha[index], levels.sigma[index]
        d_alpha, d_sigma = (slope[index] for slope in slopes(levels))
        variance = alpha.square() * self.variances + sigma.square()
        growth = 2 * (alpha * d_alpha * self.variances + sigma * d_sigma) / variance
        squares = self._squares(x, alpha.reshape(1, 1)) / variance
        along = x @ self.means.T - alpha * self.means.square().sum(1)
        return growth * (squares - self.dimension) / 2 + d_alpha * along / variance


def mixture_entropy(
    levels: NoiseLevels, mixture: Mixture, steps: Tensor, samples: int = 4096, seed: int = 0
) -> Estimate:
    """(n,) K of the steps (n,), each from level t - 1 to level t, in nats.

    One and two dimensions are integrated. In more, K is the mean over x ~ p_t-1 of either
    ``expm1(r) - r``, r = ln p_t(x) - ln p_t-1(x), or of the mean KL of the components less that of
    the posteriors over them: the first is exact at the noisy end, the second at the clean one, and
    the one with the lesser error is told.

    Raises:
        ValueError: a step outside 1 .. T - 1, or fewer than two samples.
    """
    _check(levels, steps, 1, samples)
    return _over(
        steps, lambda t: _step_entropy(levels, mixture, t, _points(mixture, samples, seed))
    )


def mixture_rate(
    levels: NoiseLevels, mixture: Mixture, indices: Tensor, samples: int = 4096, seed: int = 0
) -> Estimate:
    """(n,) J at the levels ``indices`` (n,), found as :func:`mixture_entropy` finds K: as the mean
    of s^2, s = d ln p / dl, or of the components' own J less the variance of theirs given x.

    Raises:
        ValueError: an index outside 0 .. T - 1, or fewer than two samples.
    """
    _check(levels, indices, 0, samples)
    return _over(
        indices, lambda i: _level_rate(levels, mixture, i, _points(mixture, samples, seed))
    )


def _check(levels: NoiseLevels, steps: Tensor, first: int, samples: int) -> None:
    if len(steps) and not first <= int(steps.min()) <= int(steps.max()) < len(levels):
        raise ValueError(
            f"steps {steps.tolist()[:5]} do not lie in {first}..{len(levels) - 1}, the levels of "
            "this schedule."
        )
    if samples < 2:
        raise ValueError(f"samples={samples} have no standard error: draw two or more.")


def _over(steps: Tensor, estimate: Callable[[int], tuple[float, float]]) -> Estimate:
    pairs = torch.tensor([estimate(t) for t in steps.tolist()], dtype=torch.float64)
    return Estimate(*pairs.reshape(-1, 2).unbind(1))


# -- points of the law, with their weights ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Points:
    """Standard normal ``noise`` (N, D) that ``component`` (N,) is noised with, and the probability
    of each; the probabilities of drawn points are equal, those of a quadrature are not."""

    component: Tensor
    noise: Tensor
    probability: Tensor
    drawn: bool

    def mean(self, values: Tensor) -> tuple[float, float]:
        """Of values (N,): the mean, and its standard error."""
        mean = float(self.probability @ values)
        return mean, float(values.std()) / math.sqrt(len(values)) if self.drawn else 0.0


def _points(mixture: Mixture, samples: int, seed: int) -> _Points:
    count, dimension = mixture.means.shape
    if dimension <= 2 and _NODES**dimension * count**2 <= _LARGEST:
        return _quadrature(mixture)
    generator = host_generator(seed, samples, purpose="mixture")
    # each component in its turn, as far as weights allow: a stratified draw
    places = (np.arange(samples) + generator.random(samples)) / samples
    shares = mixture.weights.cumsum(0).numpy()
    component = np.searchsorted(shares / shares[-1], places).clip(max=count - 1)
    noise = torch.from_numpy(generator.standard_normal((samples, dimension)))
    equal = torch.full((samples,), 1 / samples, dtype=torch.float64)
    return _Points(torch.from_numpy(component), noise, equal, drawn=True)


def _quadrature(mixture: Mixture) -> _Points:
    """The trapezoidal rule around each component, which for smooth laws has all digits."""
    line = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64)
    weight = torch.exp(-line.square() / 2)
    count, dimension = mixture.means.shape
    noise = torch.cartesian_prod(*[line] * dimension).reshape(-1, dimension)
    weights = torch.cartesian_prod(*[weight / weight.sum()] * dimension).reshape(-1, dimension)
    probability = mixture.weights[:, None] * weights.prod(1)
    component = torch.arange(count).repeat_interleave(len(noise))
    return _Points(component, noise.repeat(count, 1), probability.flatten(), drawn=False)


def _noised(mixture: Mixture, points: _Points, levels: NoiseLevels, index: int) -> Tensor:
    alpha, sigma = levels.alpha[index], levels.sigma[index]
    deviation = (alpha.square() * mixture.variances + sigma.square()).sqrt()
    chosen = points.component
    return alpha * mixture.means[chosen] + deviation[chosen][:, None] * points.noise


def _chunks(mixture: Mixture, x: Tensor) -> Iterator[Tensor]:
    yield from x.split(max(1, _CHUNK // len(mixture.means)))


# -- one step, one level ---------------------------------------------------------------------------


def _step_entropy(
    levels: NoiseLevels, mixture: Mixture, step: int, points: _Points
) -> tuple[float, float]:
    clean, noisy = (_variance(mixture, levels, i) for i in (step - 1, step))
    moved = (levels.alpha[step - 1] - levels.alpha[step]).square()
    growth = (clean - noisy) / noisy
    apart = mixture.dimension / 2 * (growth - torch.log1p(growth))
    apart = apart + moved * mixture.means.square().sum(1) / (2 * noisy)
    ratios, gaps = [], []
    for x in _chunks(mixture, _noised(mixture, points, levels, step - 1)):
        one, two = (
            mixture.log_terms(x, levels.alpha[i], levels.sigma[i]) for i in (step - 1, step)
        )
        ratio = two.logsumexp(1) - one.logsumexp(1)
        ratios.append(ratio)
        gaps.append((one.softmax(1) * (one - two)).sum(1) + ratio)
    by_gap = points.mean(torch.cat(gaps))
    by_gap = float(mixture.weights @ apart) - by_gap[0], by_gap[1]
    # where the two laws differ much, e^r is large in the first one's tails
    coarse = mixture.dimension * (noisy / clean - 1).square()
    coarse = coarse + moved * mixture.means.square().sum(1) / noisy
    if float(coarse.max()) > 0.1:
        return by_gap
    by_ratio = points.mean(_expm1_less(torch.cat(ratios)))
    return by_ratio if not points.drawn or by_ratio[1] < by_gap[1] else by_gap


def _level_rate(
    levels: NoiseLevels, mixture: Mixture, index: int, points: _Points
) -> tuple[float, float]:
    alpha, sigma = levels.alpha[index], levels.sigma[index]
    rates, spreads = [], []
    for x in _chunks(mixture, _noised(mixture, points, levels, index)):
        share = mixture.log_terms(x, alpha, sigma).softmax(1)
        own = mixture.slopes(x, levels, index)
        mean = (share * own).sum(1)
        rates.append(mean.square())
        spreads.append((share * (own - mean[:, None]).square()).sum(1))
    direct, spread = points.mean(torch.cat(rates)), points.mean(torch.cat(spreads))
    if not points.drawn or direct[1] < spread[1]:
        return direct
    return _component_rate(levels, mixture, index) - spread[0], spread[1]


def _component_rate(levels: NoiseLevels, mixture: Mixture, index: int) -> float:
    """The mean J of the components alone."""
    variance = _variance(mixture, levels, index)
    d_alpha, d_sigma = (slope[index] for slope in slopes(levels))
    alpha, sigma = levels.alpha[index], levels.sigma[index]
    growth = 2 * (alpha * d_alpha * mixture.variances + sigma * d_sigma) / variance
    along = d_alpha.square() * mixture.means.square().sum(1) / variance
    return float(mixture.weights @ (mixture.dimension * growth.square() / 2 + along))


def _variance(mixture: Mixture, levels: NoiseLevels, index: int) -> Tensor:
    """(K,) of the noised components."""
    alpha, sigma = levels.alpha[index], levels.sigma[index]
    return alpha.square() * mixture.variances + sigma.square()


def _expm1_less(r: Tensor) -> Tensor:
    """e^r - 1 - r, nowhere negative, with the digits that a difference would lose."""
    series = r.square() / 2 + r**3 / 6 + r**4 / 24
    return torch.where(r.abs() < 1e-3, series, torch.expm1(r) - r)
