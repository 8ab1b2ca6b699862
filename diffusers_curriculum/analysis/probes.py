"""How well a network denoises, level by level, on samples and noise that never change.

Errors of any prediction type are told in common units: ``S m`` (of epsilon), ``(1 + S) m`` (of v),
m the mean squared error of x0 for each dimension. Two probes with the same samples, grid and seed
differ in the network alone, and their difference has the small error of a paired one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_curriculum.analysis.relative_entropy import Estimate, spectrum
from diffusers_curriculum.checks import whole
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.randomness import Slots, gaussian
from diffusers_curriculum.weighting.formulas import softplus, to_target

# What a network says of noisy inputs (B, ...) at levels, given by indices (B,), for the samples at
# positions (B,), whose conditions are its own affair.
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
UNITS = ("x0", "epsilon", "v")


@dataclass(frozen=True, eq=False)
class Grid:
    """Where a network is probed: ``indices`` (L,) int64 of ``levels``, noisiest first.

    Attributes:
        edges: (L + 1,) increasing log-SNRs between which each stands for its bin.
    """

    levels: NoiseLevels
    indices: Tensor
    edges: Tensor

    @property
    def log_snr(self) -> Tensor:
        """(L,) increasing, float64."""
        return self.levels.log_snr[self.indices]


def make_grid(levels: NoiseLevels, bins: int = 24, reach: float = 10.0) -> Grid:
    """The levels nearest to ``bins`` equal steps of log-SNR, no further out than ``reach``; fewer
    where a schedule has fewer levels there.

    Raises:
        ValueError: ``bins`` below 2, or a schedule without two levels inside.
    """
    whole("bins", bins, 2)
    log_snr = levels.log_snr
    inside = (log_snr.abs() <= reach).nonzero().flatten()
    if len(inside) < 2:
        raise ValueError(
            f"this schedule has {len(inside)} levels of log-SNR within {-reach:g}..{reach:g}: "
            "there is nothing to compare."
        )
    low, high = float(log_snr[inside[-1]]), float(log_snr[inside[0]])
    width = (high - low) / bins
    wanted = low + width * (torch.arange(bins, dtype=torch.float64) + 0.5)
    nearest = (log_snr[inside][None] - wanted[:, None]).abs().argmin(1)
    indices = inside[nearest].unique().flip(0)
    centres = log_snr[indices]
    inner = (centres[1:] + centres[:-1]) / 2
    ends = torch.tensor([low, high], dtype=torch.float64)
    return Grid(levels, indices, torch.cat([ends[:1], inner, ends[1:]]))


@dataclass(frozen=True, eq=False)
class Probe:
    """Squared errors of one network.

    Attributes:
        grid: the levels that were looked at, noisiest first.
        x0_errors: (L, N) float64, of each sample the mean over its dimensions.
        linear: (L,) the x0 error of the best linear predictor of the data.
        dimension: of a sample.
    """

    grid: Grid
    x0_errors: Tensor
    linear: Tensor
    dimension: int

    def error(self, unit: str = "v") -> Estimate:
        """(L,) mean squared error for each dimension in a unit of ``UNITS``."""
        return _mean(self.x0_errors * self.scale(unit)[:, None])

    def scale(self, unit: str) -> Tensor:
        """(L,) what x0 errors are multiplied by for a unit of ``UNITS``."""
        log_snr = self.grid.log_snr
        logs = {"x0": torch.zeros_like(log_snr), "epsilon": log_snr, "v": softplus(log_snr)}
        return logs[unit].exp()

    @property
    def relative(self) -> Estimate:
        """(L,) the error over that of the best linear predictor: 1 where the network knows no more
        than mean and covariance."""
        return _mean(self.x0_errors / self.linear[:, None])

    @property
    def beyond_linear(self) -> Tensor:
        """(L,) nats for each dimension and unit of log-SNR that the network explains and the best
        linear predictor does not, 0 where there are none: half the difference of their epsilon
        errors. Its integral is what there is to know beyond mean and covariance."""
        ahead = self.linear - self.x0_errors.mean(1)
        return self.scale("epsilon") * ahead.clamp_min(0) / 2

    @property
    def information_rate(self) -> Estimate:
        """(L,) nats of information for each dimension and unit of log-SNR that the network needs to
        explain: half its epsilon error, by dI / dS = mmse / 2 (Guo, Shamai and Verdu 2005)."""
        value, error = self.error("epsilon")
        return Estimate(value / 2, error / 2)

    @property
    def information(self) -> Tensor:
        """(L,) nats for each dimension from the noisiest level of the grid up to each: the integral
        of :attr:`information_rate`, by the trapezoidal rule."""
        rate = self.information_rate.value
        areas = self.grid.log_snr.diff() * (rate[1:] + rate[:-1]) / 2
        return torch.cat([torch.zeros(1, dtype=torch.float64), areas.cumsum(0)])

    def progress_since(self, before: Probe, unit: str = "v") -> Estimate:
        """(L,) how much less the error is than in an earlier probe of the same samples, with the
        error of a paired difference.

        Raises:
            ValueError: the earlier probe has another grid or number of samples.
        """
        same = torch.equal(self.grid.indices, before.grid.indices)
        if not same or self.x0_errors.shape != before.x0_errors.shape:
            raise ValueError(
                f"probes of {tuple(before.x0_errors.shape)} and {tuple(self.x0_errors.shape)} "
                "levels and samples are not of the same ones: probe both with one grid, samples "
                "and seed."
            )
        return _mean((before.x0_errors - self.x0_errors) * self.scale(unit)[:, None])


def probe(
    denoiser: Denoiser,
    objective: Objective,
    samples: Tensor,
    grid: Grid,
    *,
    seed: int = 0,
    batch_size: int = 64,
    data: Tensor | None = None,
    each_level: Callable[[], object] = lambda: None,
) -> Probe:
    """The errors of a network at every level of a grid, of held-out samples.

    Args:
        denoiser: see :data:`Denoiser`; what it is given went through ``Objective.scale_input``.
        samples: (N, ...) that the network has not learned from, on its device.
        data: (M, ...) more samples, for the covariance of the best linear predictor; default: the
            same ones.
        each_level: is called after each level.

    Raises:
        ValueError: fewer than two samples, or an error that is not finite (the message names the
            level).
    """
    variances, _ = spectrum(samples if data is None else data)
    rows = []
    for index in grid.indices.tolist():
        batches = noised(objective, samples, index, seed, batch_size)
        with torch.no_grad():
            errors = [objective.loss(denoiser(x, at, where), y)[1] for x, at, where, y in batches]
        rows.append(torch.cat(errors).double().cpu())
        each_level()
    levels = objective.levels
    to_x0 = to_target(levels.prediction_type, grid.log_snr, levels.sigma_data).exp()
    found = torch.stack(rows) * to_x0[:, None]
    bad = (~found.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the network's error at log-SNR {float(grid.log_snr[bad[0]]):.2f} is not finite: it "
            "is broken, or does not belong to this scheduler."
        )
    snr = grid.log_snr.exp()[:, None]
    linear = (variances / (1 + snr * variances)).mean(1)
    return Probe(grid, found, linear.cpu(), samples[0].numel())


def noised(
    objective: Objective, samples: Tensor, index: int, seed: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches of (input, levels, positions, target) of samples (N, ...) at one level; the noise of
    a sample is a function of the seed and its position, the same at all levels."""
    for start in range(0, len(samples), batch_size):
        clean = samples[start : start + batch_size]
        count, device = len(clean), clean.device
        slots = Slots(start, count, start + count)
        noise = gaussian(
            clean.shape[1:], seed=seed, step=0, slots=slots, purpose="probe", device=device
        ).to(clean.dtype)
        at = torch.full((count,), index, device=device)
        noisy = objective.scale_input(objective.add_noise(clean, noise, at), at)
        positions = torch.arange(start, start + count, device=device)
        yield noisy, at, positions, objective.target(clean, noise, at)


def _mean(rows: Tensor) -> Estimate:
    """Means of rows (L, N), with their standard errors."""
    return Estimate(rows.mean(1), rows.std(1) / rows.shape[1] ** 0.5)
