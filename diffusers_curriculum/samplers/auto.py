"""The law that follows the learning: draws go where the network still makes progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from diffusers_curriculum.checks import above_zero, checked, inside, not_negative
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers.adaptive import AdaptiveTimestepSampler
from diffusers_curriculum.samplers.base import SAMPLERS
from diffusers_curriculum.samplers.composition import pick
from diffusers_curriculum.samplers.statistics import (
    State,
    Statistics,
    binned,
    finite_widths,
    x0_scale,
)

# An observation at time n' (observations so far) weighs (n' / n)^power at time n.
_MEMORIES = {"older": 1.0, "recent": 4.0}
_LEAST_VARIANCE = 1e-6  # of a relative progress: what a bin may be believed at most
_WARM_UP = {"mu": -0.5, "b": 1.0}  # between coarse structure and pure noise


@dataclass(frozen=True, eq=False)
class ProgressMeans(Statistics):
    """Means of what is observed, and by which share they fell lately.

    Two running means are kept for each bin, one over a longer past than the other, both in the
    logarithm of time: their memory grows with the run, as learning slows down. Where values fall as
    c n^-a, the older mean exceeds the recent one by c n^-a (2 / (2 - a) - 5 / (5 - a)), whatever
    they fall to.

    Attributes:
        cell: (T,) int64, bin of each level.
        spread: (T, K) float64, from bins to levels.
        kernel: (K, K) float64, weights of neighbouring bins.
    """

    cell: Tensor
    spread: Tensor
    kernel: Tensor

    def initial_state(self) -> State:
        bins = len(self.starts)  # sums, squares and counts of each
        names = (*_MEMORIES, "window")
        state = {name: torch.zeros(bins, 3, dtype=torch.float64) for name in names}
        state["time"] = torch.zeros((), dtype=torch.float64)
        return state | {"seen": torch.zeros(bins, dtype=torch.int64)}

    def add(self, state: State, indices: Tensor, values: Tensor, valid: Tensor) -> None:
        entries = torch.stack([values, values * values, valid.to(values.dtype)], dim=1)
        # not index_add_: on CUDA that adds in no fixed order, and processes would drift apart
        state["window"].index_put_((pick(self.cell, indices),), entries, accumulate=True)

    def fold(self, state: State) -> None:
        counts = state["window"][:, 2]
        time = state["time"] + counts.sum()
        past = torch.where(time > 0, state["time"] / time, 0.0)
        for name, power in _MEMORIES.items():
            state[name] = past.pow(power) * state[name] + state["window"]
        state["time"], state["seen"] = time, state["seen"] + counts.long()
        state["window"] = torch.zeros_like(state["window"])

    def seen(self, state: State) -> Tensor:
        return state["seen"]

    def at_levels(self, bins: Tensor) -> Tensor:
        return bins[self.cell]

    def touched(self, levels: Tensor) -> Tensor:
        zeros = levels.new_zeros(len(self.starts))
        return zeros.index_put_((self.cell,), levels, accumulate=True) > 0

    def profile(self, state: State) -> Tensor:
        mean, _, known = _moments(state["recent"])
        weights = self.kernel @ known
        means = torch.where(weights > 0, self.kernel @ (mean * known) / weights, 0.0)
        return self.spread @ means

    def progress(self, state: State) -> tuple[Tensor, Tensor]:
        """(K,) share by which the mean fell from the older to the recent one, and (K,) its standard
        deviation; both over neighbours, weighted by their precision."""
        mean, variance, known = _moments(state["recent"])
        scale = torch.where(mean > 0, mean, 1.0)
        fall = (_moments(state["older"])[0] - mean) / scale
        relative = variance / (scale.square() * state["recent"][:, 2].clamp_min(1e-9))
        precision = known / (relative + _LEAST_VARIANCE)
        weights = (self.kernel @ precision).clamp_min(1e-30)
        return self.kernel @ (precision * fall) / weights, weights.rsqrt()


def _moments(memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K,) mean, variance, and 1 or 0 for bins that are known or not, of a memory (K, 3)."""
    sums, squares, counts = memory.unbind(1)
    known = counts > 0
    mean = torch.where(known, sums / counts, 0.0)
    variance = torch.where(known, squares / counts - mean.square(), 0.0).clamp_min(0)
    return mean, variance, known.to(mean.dtype)


@SAMPLERS.register(
    "auto",
    formula="p(l) ~ (m (1 - m / m0))^a r, m = E|x0 error|^2, r = its relative fall lately",
    source="this library",
    note="learns from observe(); needs no probe and no extra forward pass",
)
class AutoTimestepSampler(AdaptiveTimestepSampler):
    """Draws where the network still makes progress that the samples will show: centre, width and
    speed are found from the losses of the run itself.

    p(l) is proportional to (m (1 - m / m0))^a r per unit of log-SNR l. m is the mean squared
    error of x0, and m0 the largest one, where an image cannot be told from noise. r is the share by
    which m fell over the latest part of the run, a part that grows with it, less a standard error,
    so that noise is no progress. An error of x0 at one level moves the sample by that error times
    what the levels after it leave of it: 1 - m / m0 for Gaussian data. a > 1 undoes that levels
    learn from their neighbours.

    An epsilon prediction magnifies its error of x0 by 1 / S, so that m0 cannot be measured with it;
    in almost pure noise its errors are small, many, and come back where it is not trained. Its law
    is (m S / (1 + S))^a r.

    Args:
        sharpness: a; default 2, of an epsilon prediction 0.5: the size of errors, which add up.
        significance: standard errors that are taken off the progress.
        least_progress: what every level is credited with besides: where nothing can be told from
            noise yet (small batches, a fine-tuning run that hardly moves), the law is that of equal
            relative progress.
        bandwidth: log-SNR over which neighbouring bins are averaged, with weights that fall
            linearly.
        floor: as of every sampler; default 0.1, of an epsilon prediction 0.5.

    The other arguments, and errors, are those of :class:`AdaptiveTimestepSampler`, but that there
    is no use for ``ema`` and ``neighbours``; the warm-up density is by default laplace with
    mu = -0.5 and b = 1.
    """

    sharpness: float = checked(above_zero, default=None)
    significance: float = checked(not_negative, default=1.0)
    least_progress: float = checked(above_zero, default=1e-3)
    bandwidth: float = checked(above_zero, default=1.0)
    floor: float = checked(inside, 0, 1, default=None)
    refresh_every = 50
    warm_up = 100
    warm_up_density = "laplace"
    importance_correction = "none"

    def _resolve_defaults(self, levels: int) -> None:
        super()._resolve_defaults(levels)
        if self.warm_up_density_args is None and self.warm_up_density == "laplace":
            self.warm_up_density_args = dict(_WARM_UP)

    def _check(self, levels: NoiseLevels) -> None:
        of_noise = levels.prediction_type == "epsilon"
        if self.sharpness is None:
            self.sharpness = 0.5 if of_noise else 2.0
        if self.floor is None:
            self.floor = 0.5 if of_noise else 0.1
        super()._check(levels)

    def _build_statistics(self) -> Statistics:
        cell, starts, centres, spread = binned(self.levels, self.bins, self.binning)
        distance = (centres[:, None] - centres).abs()
        kernel = (1 - distance / self.bandwidth).clamp_min(0)
        return ProgressMeans(starts, cell, spread, kernel)

    def _scale(self) -> Tensor:
        return x0_scale(self.levels)

    def _rule_tables(self) -> dict[str, Tensor]:
        log_snr = self.levels.positions
        return {
            "widths": finite_widths(self.levels),
            "log_snr": log_snr,
            "observed_per_x0": 1 + log_snr.exp(),
        }

    def _rule(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        error, kind = profile / constants["observed_per_x0"], self.levels.prediction_type
        shown = shown_in_samples(error, constants["log_snr"], kind)
        law = (shown / shown.max()).pow(self.sharpness) * self._progress()
        return law / law.max() * constants["widths"]

    def _progress(self) -> Tensor:
        """(T,) r."""
        statistics = cast(ProgressMeans, self._present()[0])
        progress, deviation = statistics.progress(self._state)
        sure = (progress - self.significance * deviation).clamp_min(0) + self.least_progress
        return statistics.spread @ sure

    def metrics(self) -> dict[str, Tensor]:
        """Those of every adaptive sampler, and the median log-SNR of the law."""
        law = self.law(0, self._state["profile"].device)
        log_snr = self._present()[1]["log_snr"]
        below = (law.cumsum(0) < 0.5 * law.sum()).sum()
        return super().metrics() | {"law_median_log_snr": log_snr[below.clamp_max(len(law) - 1)]}


def shown_in_samples(error: Tensor, log_snr: Tensor, prediction_type: str) -> Tensor:
    """(T,) m (1 - m / m0), of mean squared errors of x0 (T,), cleanest level first; of an epsilon
    prediction m S / (1 + S)."""
    if prediction_type == "epsilon":
        return error * torch.sigmoid(log_snr)
    error = error.cummax(0).values  # it can only grow towards noise
    return error * (1 - error / error[-1])
