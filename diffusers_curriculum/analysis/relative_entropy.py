"""Relative entropy between consecutive marginals, and its intrinsic rate: of Gaussian data, and at
most.

``K_t = KL(p_t-1 || p_t)`` compares the laws of ``x = alpha x0 + sigma noise`` at a level and at the
next noisier one (arXiv 2403.10348). For a small step it is ``dl^2 J / 2``, dl the step in log-SNR
l: much of K tells how far apart a schedule's levels are. J(l) = E[(d ln p_l / dl)^2] tells of the
data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels

_SMALL = 1e-4  # below it, differences are series


class Estimate(NamedTuple):
    """Values (n,) float64 and their standard errors (n,), 0 where they are exact."""

    value: Tensor
    error: Tensor


def slopes(levels: NoiseLevels) -> tuple[Tensor, Tensor]:
    """d alpha / dl and d sigma / dl (T,) along the process of the schedule's family."""
    alpha, sigma = levels.alpha, levels.sigma
    if levels.family == "vp":
        return alpha * sigma.square() / 2, -sigma * alpha.square() / 2
    if levels.family == "flow":
        return alpha * sigma / 2, -alpha * sigma / 2
    return torch.zeros_like(alpha), -sigma / 2


def gaussian_entropy(
    levels: NoiseLevels, variances: Tensor, squared_means: Tensor | None = None
) -> Tensor:
    """(T - 1,) K of Gaussian data in nats: the sum over j of (r - 1 - ln r) / 2 and
    (d alpha)^2 m_j^2 / (2 v_j), v_j = alpha^2 s_j + sigma^2 at the noisier level, r the ratio of
    v_j at the cleaner one to it.

    Args:
        variances: (D,) eigenvalues s_j of the covariance.
        squared_means: (D,) m_j^2 in that basis; default 0.
    """
    variance = _marginal(levels, variances)
    ratio = variance.diff(dim=0).neg() / variance[1:]
    spread = _excess(ratio) / 2
    moved = levels.alpha.diff().square()[:, None] * _or_zero(squared_means, variances)
    return (spread + moved / (2 * variance[1:])).sum(1)


def gaussian_rate(
    levels: NoiseLevels, variances: Tensor, squared_means: Tensor | None = None
) -> Tensor:
    """(T,) J of Gaussian data: the sum over j of (v'_j / v_j)^2 / 2 and (alpha')^2 m_j^2 / v_j;
    arguments as of :func:`gaussian_entropy`."""
    variance = _marginal(levels, variances)
    d_alpha, d_sigma = slopes(levels)
    turned = 2 * (levels.alpha * d_alpha)[:, None] * variances.double()
    slope = turned + 2 * (levels.sigma * d_sigma)[:, None]
    moved = d_alpha.square()[:, None] * _or_zero(squared_means, variances)
    return ((slope / variance).square() / 2 + moved / variance).sum(1)


def entropy_bound(levels: NoiseLevels, dimension: int, mean_square: float) -> Tensor:
    """(T - 1,) the most that K can be for any data of ``dimension`` with E||x0||^2 =
    ``mean_square``: the mean over x0 of KL(q(x_t-1 | x0) || q(x_t | x0)), by convexity. It is K
    itself where noised samples do not overlap, and then tells of the schedule alone."""
    return dimension * gaussian_entropy(levels, *_point(dimension, mean_square))


def rate_bound(levels: NoiseLevels, dimension: int, mean_square: float) -> Tensor:
    """(T,) the most that J can be, as :func:`entropy_bound` is for K."""
    return dimension * gaussian_rate(levels, *_point(dimension, mean_square))


def entropy_of_rate(levels: NoiseLevels, rate: Tensor) -> Tensor:
    """(T - 1,) K = dl^2 J / 2 of a rate (T,), J taken as the mean of both ends of each step; good
    for small steps, and infinite at zero SNR."""
    return levels.log_snr.diff().square() * (rate[1:] + rate[:-1]) / 4


def spectrum(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) of the covariance of samples (N, ...) and squared means (D,) in its basis;
    of N < 4 D samples the variances of the coordinates instead, as their covariance is not known.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} sample has no variance: give two or more.")
    flat = samples.flatten(1).double()
    mean = flat.mean(0)
    if len(flat) < 4 * flat.shape[1]:
        return flat.var(0), mean.square()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T).reshape(flat.shape[1], -1))
    return values.clamp_min(0), (vectors.T @ mean).square()


def principal_variances(samples: Tensor) -> Tensor:
    """(D,) variances of samples (N, ...) along their principal directions: as :func:`spectrum`; of
    N < 4 D samples along the directions of every other one, measured with those between, and what
    is left spread evenly. A predictor of each direction by itself has the error that these tell.

    Raises:
        ValueError: fewer than two samples.
    """
    known, count = spectrum(samples)[0].cpu(), len(samples)
    if count >= 4 * len(known):
        return known
    centred = samples.flatten(1).float()
    centred = (centred - centred.mean(0)) * (count / (count - 1)) ** 0.5
    learned, held_out = centred[::2], centred[1::2]
    sizes, mixed = torch.linalg.eigh(learned @ learned.T)
    kept = sizes > 1e-5 * sizes[-1]
    directions = learned.T @ (mixed[:, kept] / sizes[kept].sqrt())
    along = (held_out @ directions).square().mean(0).double().cpu()
    left = len(known) - len(along)
    rest = float(held_out.square().sum(1).mean()) - float(along.sum())
    return torch.cat([along, along.new_full((left,), max(0.0, rest) / max(1, left))])


def _marginal(levels: NoiseLevels, variances: Tensor) -> Tensor:
    """(T, D) variances alpha^2 s + sigma^2."""
    data = levels.alpha.square()[:, None] * variances.double()
    return data + levels.sigma.square()[:, None]


def _excess(x: Tensor) -> Tensor:
    """x - log(1 + x), with the digits that a difference would lose."""
    series = x.square() / 2 - x**3 / 3 + x**4 / 4
    return torch.where(x.abs() < _SMALL, series, x - torch.log1p(x))


def _or_zero(squared_means: Tensor | None, variances: Tensor) -> Tensor:
    zero = torch.zeros_like(variances, dtype=torch.float64)
    return zero if squared_means is None else squared_means.double()


def _point(dimension: int, mean_square: float) -> tuple[Tensor, Tensor]:
    """Data without variance, and the squared mean of one of its dimensions."""
    return torch.zeros(1), torch.tensor([mean_square / dimension], dtype=torch.float64)
