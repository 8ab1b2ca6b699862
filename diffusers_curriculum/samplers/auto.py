"""The law that follows the learning: draws go to the levels whose images are half known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_curriculum.checks import above_zero, checked
from diffusers_curriculum.samplers.adaptive import AdaptiveTimestepSampler
from diffusers_curriculum.samplers.base import SAMPLERS
from diffusers_curriculum.samplers.statistics import (
    BinnedMeans,
    State,
    Statistics,
    binned,
    finite_widths,
    x0_scale,
)

_MEMORY = 4.0  # an observation at time n' (observations so far) weighs (n' / n)^4 at time n
_WARM_UP = {"mu": -0.5, "b": 1.0}  # between coarse structure and pure noise


@dataclass(frozen=True, eq=False)
class GrowingMeans(BinnedMeans):
    """Means whose memory grows with the run, as learning slows down: at time n, counted in
    observations, one of time n' weighs (n' / n)^4."""

    def initial_state(self) -> State:
        return super().initial_state() | {"time": torch.zeros((), dtype=torch.float64)}

    def fold(self, state: State) -> None:
        counts = state["counts"]
        time = state["time"] + counts.sum()
        keep = torch.where(time > 0, state["time"] / time, 0.0).pow(_MEMORY)
        state["total"] = keep * state["total"] + state["sums"]
        state["evidence"] = keep * state["evidence"] + counts
        state["seen"], state["time"] = state["seen"] + counts.long(), time
        state["sums"], state["counts"] = torch.zeros_like(counts), torch.zeros_like(counts)


@SAMPLERS.register(
    "auto",
    formula="p(l) ~ (h (1 - h))^k, h = m / m0, m = E|x0 error|^2, m0 = m where noise is all",
    source="this library",
    note="learns from observe(); needs no probe and no extra forward pass",
)
class AutoTimestepSampler(AdaptiveTimestepSampler):
    """Draws the levels at which the network half knows the image: centre and width are found from
    the losses of the run itself, and move as it learns.

    p(l) is proportional to (h (1 - h))^k per unit of log-SNR l. h = m / m0 is what is left of the
    mean squared error of x0: 1 where an image cannot be told from noise, 0 where it is known. An
    error of x0 at l, of size h, moves the sample by that error times what the levels after it leave
    of it, 1 - h for Gaussian data; k > 1 undoes that levels learn from their neighbours. For
    Gaussian data of unit scale it is the law of density cosh(l / 2)^(-2 k); other data, latents,
    resolutions and shifts move it by themselves.

    m0 is the largest m. An epsilon prediction magnifies its error of x0 by 1 / S, so that m0 cannot
    be measured with it: there 1 - h is S / (1 + S), as for Gaussian data of unit scale.

    Args:
        sharpness: k.
        bandwidth: log-SNR over which neighbouring bins are averaged, with weights that fall
            linearly.
        max_x0_error: bound on m of an epsilon prediction, for data of about unit scale.

    The other arguments, and errors, are those of :class:`AdaptiveTimestepSampler`, but that there
    is no use for ``ema`` and ``neighbours``; the warm-up density is by default laplace with
    mu = -0.5 and b = 1.
    """

    sharpness: float = checked(above_zero, default=3.0)
    bandwidth: float = checked(above_zero, default=1.0)
    max_x0_error: float = checked(above_zero, default=1.0)
    refresh_every = 50
    warm_up = 100
    warm_up_density = "laplace"
    importance_correction = "none"

    def _resolve_defaults(self, levels: int) -> None:
        super()._resolve_defaults(levels)
        if self.warm_up_density_args is None and self.warm_up_density == "laplace":
            self.warm_up_density_args = dict(_WARM_UP)

    def _build_statistics(self) -> Statistics:
        cell, starts, centres, spread = binned(self.levels, self.bins, self.binning)
        smoothed = spread @ _averages(centres, self.bandwidth)
        return GrowingMeans(starts, cell, smoothed, ema=0.0)

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
        most, sharpness = self.max_x0_error, self.sharpness
        return half_known(error, constants["log_snr"], kind, most, sharpness) * constants["widths"]

    def metrics(self) -> dict[str, Tensor]:
        """Those of every adaptive sampler, and the median log-SNR of the law."""
        law = self.law(0, self._state["profile"].device)
        log_snr = self._present()[1]["log_snr"]
        below = (law.cumsum(0) < 0.5 * law.sum()).sum()
        return super().metrics() | {"law_median_log_snr": log_snr[below.clamp_max(len(law) - 1)]}


def half_known(
    error: Tensor,
    log_snr: Tensor,
    prediction_type: str,
    max_x0_error: float = 1.0,
    sharpness: float = 3.0,
) -> Tensor:
    """(T,) the law of :class:`AutoTimestepSampler` per unit of log-SNR, at most 1; not finite where
    no level is half known.

    Args:
        error: (T,) mean squared errors of x0, cleanest level first.
        log_snr: (T,) of data of unit scale; it and ``max_x0_error`` matter for "epsilon" only.
        prediction_type: what the network predicts that they were measured with.
    """
    if prediction_type == "epsilon":
        product = error.clamp_max(max_x0_error) * torch.sigmoid(log_snr)
    else:
        error = error.cummax(0).values  # it can only grow towards noise
        product = error * (error[-1] - error)
    return (product / product.max()).pow(sharpness)


def _averages(centres: Tensor, bandwidth: float) -> Tensor:
    """(K, K) averages over bins within ``bandwidth``; rows sum to 1."""
    weights = (1 - (centres[:, None] - centres).abs() / bandwidth).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)
