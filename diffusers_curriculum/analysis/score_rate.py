"""The rate of relative entropy that a trained network sees in its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.analysis.probes import Denoiser, Grid
from diffusers_curriculum.analysis.relative_entropy import Estimate, slopes
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.randomness import Slots, gaussian, host_generator


class ScoreRate(NamedTuple):
    """J at the levels of a grid, and the mean of s = d ln p / dl, whose distance from 0 tells how
    far the network is from the law of the samples."""

    rate: Estimate
    mean: Estimate


def score_rate(
    denoiser: Denoiser,
    objective: Objective,
    samples: Tensor,
    grid: Grid,
    *,
    seed: int = 0,
    batch_size: int = 16,
    each_level: Callable[[], object] = lambda: None,
) -> ScoreRate:
    """J(l) = E[s^2] by a network's estimate x0' of x0, for samples (N, ...).

    With e = (x - alpha x0') / sigma the mean noise, ``s = (||x0||^2 terms)``:
    s = alpha'/alpha x.e / sigma - (||e||^2 + alpha div x0') / 2 - D sigma'/sigma, ' by log-SNR. The
    divergence is that of random signs (Hutchinson 1990); two independent ones are multiplied, as
    the square of one noisy estimate is too large on average.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} sample has no standard error: give two or more.")
    products, means = [], []
    for index in grid.indices.tolist():
        parts = samples.split(batch_size)
        starts = range(0, len(samples), batch_size)
        pairs = [
            _two_estimates(denoiser, objective, part, start, index, seed)
            for part, start in zip(parts, starts, strict=True)
        ]
        both = torch.cat(pairs, 1).double().cpu()
        products.append(both.prod(0))
        means.append(both.mean(0))
        each_level()
    return ScoreRate(_mean(products), _mean(means))


def _two_estimates(
    denoiser: Denoiser, objective: Objective, clean: Tensor, start: int, index: int, seed: int
) -> Tensor:
    """(2, B) estimates of s that differ in their random signs."""
    levels, count, device = objective.levels, len(clean), clean.device
    slots, shape = Slots(start, count, start + count), clean.shape[1:]
    noise = gaussian(shape, seed=seed, step=0, slots=slots, purpose="probe", device=device)
    at = torch.full((count,), index, device=device)
    x = objective.add_noise(clean, noise.to(clean.dtype), at).requires_grad_()
    where = torch.arange(start, start + count, device=device)
    x0 = objective.denoised(denoiser(objective.scale_input(x, at), at, where), x, at)
    alpha, sigma = float(levels.alpha[index]), float(levels.sigma[index])
    d_alpha, d_sigma = (float(slope[index]) for slope in slopes(levels))
    traces = []
    for number in range(2):
        draw = host_generator(seed, start, index, number, purpose="signs")
        signs = torch.from_numpy(draw.choice([-1.0, 1.0], tuple(x.shape))).to(x)
        (turned,) = torch.autograd.grad((x0 * signs).sum(), x, retain_graph=number == 0)
        traces.append((turned * signs).flatten(1).sum(1))
    with torch.no_grad():
        e = ((x - alpha * x0) / sigma).flatten(1)
        along = d_alpha / alpha / sigma * (x.flatten(1) * e).sum(1)
        rest = along - e.square().sum(1) / 2 - e.shape[1] * d_sigma / sigma
        return torch.stack([rest - alpha * trace / 2 for trace in traces])


def _mean(rows: list[Tensor]) -> Estimate:
    table = torch.stack(rows)
    return Estimate(table.mean(1), table.std(1) / table.shape[1] ** 0.5)
