"""From statistics of noise levels to laws, clusters and curricula to try."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.analysis.gradients import Gradients
from diffusers_curriculum.analysis.probes import Grid, Probe
from diffusers_curriculum.checks import whole
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    MovingTimestepSampler,
    TimestepSampler,
)
from diffusers_curriculum.samplers.auto import shown_in_samples

_LEAST_SCALE = 0.3  # of a fitted law: a narrower one hardly trains its neighbours
_FLOOR = 0.1  # share of uniform draws in a suggested law
_SIGNIFICANT = 2.0  # standard errors
_HALF_KNOWN = 3.0  # power of h (1 - h)
_MOST = (0.2, 0.8)  # of a profile, where a law that moves begins and ends


@dataclass(frozen=True, eq=False)
class Profile:
    """How much a statistic speaks for each noise level.

    Attributes:
        name: of the statistic, in a few words.
        reason: what it is, as the end of a sentence that begins with "fitted to".
        log_snr: (n,) increasing.
        weight: (n,) 0 or more, for each unit of log-SNR.
    """

    name: str
    reason: str
    log_snr: np.ndarray
    weight: np.ndarray

    @property
    def empty(self) -> bool:
        """Whether it speaks for no level."""
        return not float(self.weight.max()) > 0

    @property
    def below(self) -> np.ndarray:
        """(n,) share of the weight up to each log-SNR, by the trapezoidal rule."""
        areas = np.diff(self.log_snr) * (self.weight[1:] + self.weight[:-1]) / 2
        total = np.concatenate([[0.0], areas.cumsum()])
        return total / total[-1]

    def quantile(self, share: float) -> float:
        """The log-SNR below which a share of the weight lies."""
        below = self.below
        rising = np.concatenate([[True], np.diff(below) > 0])
        return float(np.interp(share, below[rising], self.log_snr[rising]))

    def laplace(self) -> dict[str, float]:
        """Centre (median) and width (mean distance from it) of the Laplace law of greatest
        likelihood, the width at least 0.3."""
        centre, fine = self.quantile(0.5), np.linspace(self.log_snr[0], self.log_snr[-1], 4001)
        mass = np.diff(np.interp(fine, self.log_snr, self.below))
        middle = (fine[1:] + fine[:-1]) / 2
        width = float(mass @ np.abs(middle - centre))
        return {"mu": round(centre, 3), "b": round(max(width, _LEAST_SCALE), 3)}


@dataclass(frozen=True, eq=False)
class Suggestion:
    """A sampler to try.

    Attributes:
        name: of its folder.
        reason: what it follows from, one sentence.
        sampler: as it would train.
    """

    name: str
    reason: str
    sampler: TimestepSampler

    def save(self, folder: Path) -> Path:
        """Write its config below ``folder`` and return the file, which
        ``TimestepSampler.from_config`` builds it from."""
        where = folder / self.name
        where.mkdir(parents=True, exist_ok=True)
        self.sampler.save_pretrained(str(where))
        return where / self.sampler.config_name


# -- profiles --------------------------------------------------------------------------------------


def emergence(levels: NoiseLevels, variances: Tensor) -> Profile:
    """Where the data come out of the noise: sqrt(1 + S) times the slope of the sum over j of
    s_j S s_j / (1 + S s_j), the part of the variances s_j that a linear predictor knows at S; in
    the unit of :func:`progress`. For data of variance 1 half of it lies below S = 3."""
    seen, at = variances.double().cpu(), _axis(levels)
    known = torch.sigmoid(at[:, None] + seen.clamp_min(1e-30).log())
    weight = (seen * known * (1 - known)).mean(1) * (1 + at.exp()).sqrt()
    reason = "how fast the variance of the data comes out of the noise, times sqrt(1 + S)"
    return Profile("emergence", reason, at.numpy(), weight.numpy())


def half_known(probe: Probe, variance: float) -> Profile:
    """Where the network half knows the image: (h (1 - h))^3, h = m / m0, m its squared error of
    x0 and m0 the largest one; of an epsilon network m0 is the variance of the data, and 1 - h that
    of normal data. Logarithms of (1 + S) m are interpolated between levels.

    Args:
        variance: of the data, mean over its numbers.
    """
    levels = probe.grid.levels
    at = _axis(levels)
    seen = probe.error("v").value.log().numpy()
    between = torch.from_numpy(np.interp(at.numpy(), probe.grid.log_snr.numpy(), seen))
    error = between.exp() / (1 + at.exp())
    return _half_known(at, error, "the network half knows", levels.prediction_type, variance)


def half_known_of_data(levels: NoiseLevels, variances: Tensor) -> Profile:
    """The same before there is a network, of the best estimate of Gaussian data with the variances
    s_j (D,): m = mean of s_j / (1 + S s_j). Equal ones make it cosh(l / 2 + ln(s) / 2)^-6."""
    seen, at = variances.double().cpu(), _axis(levels)
    error = torch.stack([(seen / (1 + snr * seen)).mean() for snr in at.exp()])
    return _half_known(at, error, "mean and covariance half tell", "sample", 1.0)


def _half_known(at: Tensor, error: Tensor, who: str, kind: str, variance: float) -> Profile:
    normalised = at + math.log(max(variance, 1e-30))
    if kind == "epsilon":
        product = error.clamp_max(variance) * torch.sigmoid(normalised)
    else:
        product = shown_in_samples(error.flip(0), normalised.flip(0), kind).flip(0)
    weight = (product / product.max()).pow(_HALF_KNOWN)
    reason = f"how nearly {who} the image, (h (1 - h))^3 of h = m / m0"
    return Profile("half_known", reason, at.numpy(), weight.numpy())


def _axis(levels: NoiseLevels) -> Tensor:
    """(401,) increasing, over all levels of finite log-SNR."""
    finite = levels.log_snr[levels.finite]
    return torch.linspace(float(finite[-1]), float(finite[0]), 401, dtype=torch.float64)


def beyond_linear(probe: Probe) -> Profile:
    """Where the network explains more than mean and covariance do, in nats."""
    reason = "the information that the network explains and the best linear predictor does not"
    return _profile("beyond_linear", reason, probe.grid, probe.beyond_linear)


def progress(later: Probe, earlier: Probe) -> Profile:
    """Where the network still learns: the decrease of the x0 error times sqrt(1 + S) between two
    probes, where it is more than two standard errors."""
    value, error = later.progress_since(earlier, "x0")
    real = torch.where(value > _SIGNIFICANT * error, value, 0.0)
    reason = "how much the error fell between the last two checkpoints, x0 error times sqrt(1 + S)"
    return _profile("progress", reason, later.grid, real * later.scale("v").sqrt())


def least_variance(gradients: Gradients) -> Profile:
    """The law of least gradient variance under full importance correction: uniform timesteps times
    the square root of E||g||^2 (Cauchy-Schwarz), for each unit of log-SNR."""
    levels = gradients.grid.levels
    width = -levels.edges.diff()[gradients.grid.indices]
    weight = gradients.second_moment.value.sqrt() / width
    reason = "the square root of the mean squared gradient times the share of uniform timesteps"
    finite = torch.where(weight.isfinite(), weight, 0.0)
    return _profile("least_variance", reason, gradients.grid, finite)


def _profile(name: str, reason: str, grid: Grid, weight: Tensor) -> Profile:
    """With the outer bins to their ends."""
    inner = weight.double().cpu().numpy()
    edges = grid.edges[[0, -1]].numpy()
    at = np.concatenate([edges[:1], grid.log_snr.numpy(), edges[1:]])
    at, kept = np.unique(at, return_index=True)
    return Profile(name, reason, at, np.pad(inner, 1, mode="edge")[kept])


# -- samplers --------------------------------------------------------------------------------------


def suggest(scheduler: Any, profiles: list[Profile], clusters: int = 5) -> list[Suggestion]:
    """Laws and a curriculum for each profile that speaks for any level, best founded first.

    A Laplace law with the profile's median and mean distance from it, the profile itself as a
    table, a law that moves over the middle three fifths of it, and a curriculum over uniform
    timesteps whose clusters have equal parts of it.

    Args:
        scheduler: the one that adds noise in training.
        clusters: of the curriculum.

    Raises:
        ValueError: ``clusters`` below 2.
    """
    whole("clusters", clusters, 2)
    return [each for p in profiles if not p.empty for each in _of(scheduler, p, clusters)]


def cluster_starts(levels: NoiseLevels, profile: Profile, clusters: int) -> list[int]:
    """First indices of clusters with equal parts of a profile, cleanest first; fewer clusters where
    two of them would begin at one level."""
    shares = [i / clusters for i in range(clusters - 1, 0, -1)]
    cuts = torch.tensor([profile.quantile(share) for share in shares], dtype=torch.float64)
    starts = torch.searchsorted(-levels.log_snr, -cuts).clamp(1, len(levels) - 1)
    return [0, *sorted(set(starts.tolist()))]


def _table(levels: NoiseLevels, profile: Profile) -> dict[str, list[float]]:
    """The profile over all finite levels; none is left without any weight."""
    least = 1e-4 * float(profile.weight.max())
    at, weight = profile.log_snr, np.maximum(profile.weight, least)
    ends = levels.edges[levels.edges.isfinite()][[-1, 0]].numpy()
    beyond = np.array([ends[0] < at[0], ends[1] > at[-1]])
    at = np.concatenate([ends[:1][beyond[:1]], at, ends[1:][beyond[1:]]])
    weight = np.pad(weight, tuple(beyond.astype(int)), constant_values=least)
    return {
        "log_snr": [round(x, 6) for x in at.tolist()],
        "density": [float(f"{x:.6g}") for x in weight.tolist()],
    }


def _moving(scheduler: Any, profile: Profile, settings: dict[str, Any]) -> Iterator[Suggestion]:
    """A law half as wide as the fitted one that moves over most of the profile by patience."""
    start, end = (round(profile.quantile(share), 3) for share in _MOST)
    if not start < end:
        return
    width = max(profile.laplace()["b"] / 2, _LEAST_SCALE)
    sampler = MovingTimestepSampler(
        scheduler,
        location_start=start,
        location_end=end,
        scale_start=round(width, 3),
        pacing="patience",
        **settings,
    )
    way = f"from {start:.2f} to {end:.2f}, a fifth and four fifths of {profile.reason}"
    yield Suggestion(f"{profile.name}_moving", f"a Laplace law that moves {way}", sampler)


def tabulated(scheduler: Any, profile: Profile) -> Suggestion:
    """The profile itself as a law, with a floor of a tenth of uniform draws."""
    levels = NoiseLevels.from_scheduler(scheduler)
    sampler = DensityTimestepSampler(
        scheduler,
        "tabulated",
        _table(levels, profile),
        importance_correction="full" if profile.name == "least_variance" else "none",
        floor=_FLOOR,
        continuous=levels.continuous,
    )
    reason = f"a law in proportion to {profile.reason}"
    return Suggestion(f"{profile.name}_table", reason, sampler)


def _of(scheduler: Any, profile: Profile, clusters: int) -> Iterator[Suggestion]:
    levels = NoiseLevels.from_scheduler(scheduler)
    settings: dict[str, Any] = {"floor": _FLOOR, "continuous": levels.continuous}
    fitted = profile.laplace()
    law = DensityTimestepSampler(scheduler, "laplace", fitted, **settings)
    told = f"centre {fitted['mu']:.2f} and width {fitted['b']:.2f}, fitted to {profile.reason}"
    yield Suggestion(f"{profile.name}_laplace", f"a Laplace law of {told}", law)
    yield tabulated(scheduler, profile)
    uniform = DensityTimestepSampler(scheduler, "uniform", floor=0, continuous=levels.continuous)
    starts = cluster_starts(levels, profile, clusters)
    yield from _moving(scheduler, profile, settings)
    if len(starts) > 1:
        curriculum = CurriculumTimestepSampler(
            uniform,
            clusters=len(starts),
            clustering="explicit",
            clustering_args={"boundaries": starts},
        )
        why = f"noisiest first, in clusters with equal parts of {profile.reason}"
        yield Suggestion(f"{profile.name}_curriculum", f"a curriculum, {why}", curriculum)
