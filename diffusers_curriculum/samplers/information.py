"""The law that follows the information rate of the noise channel."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.checks import above_zero, checked, not_negative
from diffusers_curriculum.samplers.adaptive import AdaptiveTimestepSampler
from diffusers_curriculum.samplers.base import SAMPLERS
from diffusers_curriculum.samplers.statistics import finite_widths, x0_scale
from diffusers_curriculum.weighting.formulas import bounded, to_target

logger = logging.getLogger(__name__)


@SAMPLERS.register(
    "information_rate",
    formula="p(l) ~ sigma^3 / (sigma^3 + c^3) * S E|x0 error|^2 / W_x0, sigma = exp(-l/2)",
    source="arXiv 2602.18647",
    note="learns from observe()",
)
class InformationRateTimestepSampler(AdaptiveTimestepSampler):
    """p(l) proportional to g(l) rho(l) / W_x0(l), rho = S m the information rate per unit of
    log-SNR l and m the mean squared error of x0 (InfoNoise, arXiv 2602.18647).

    rho is the mean squared error of epsilon; both follow from the unweighted loss of any target.
    What is averaged is (1 + S) m = rho (1 + S) / S: it tends to a constant at both ends, where x0
    errors and epsilon errors change by orders of magnitude within a bin.
    W_x0 is the weight on the squared error of x0 that the loss amounts to, which stays as it is, so
    that the trained objective is g rho. The gate g = sigma^n / (sigma^n + c^n), sigma = exp(-l/2),
    keeps the mass away from the clean end, where an untrained network's rate is largest.

    Args:
        gate: c; None for the onset rule, the largest sigma at which m / sigma^3 is at least
            ``onset`` of its maximum; 0 for no gate.
        gate_power: n.
        onset: of the onset rule.
        max_x0_error: bound on m. A squared error above the data's mean square is the network's, not
            information's, and is magnified by 1 / S where an epsilon prediction sees almost pure
            noise. This library's addition, for data of about unit scale; None for no bound.

    The onset rule asks for the whole schedule: under a curriculum there is no gate until the law is
    learned everywhere.

    The other arguments are those of :class:`AdaptiveTimestepSampler`. The paper leaves bins,
    warm-up, refresh and smoothing open: those defaults are this library's.

    Raises:
        ValueError: unknown names, numbers out of range, or a weighting that is 0 at a level, where
            the law would be infinite.
    """

    gate: float | None = checked(not_negative, default=None)
    gate_power: float = checked(above_zero, default=3.0)
    onset: float = checked(above_zero, default=0.002)
    max_x0_error: float | None = 1.0
    warm_up = 2000
    importance_correction = "none"

    def __post_init__(self, scheduler: Any) -> None:
        if self.max_x0_error is not None:
            above_zero("max_x0_error", self.max_x0_error)
        super().__post_init__(scheduler)
        if self.gate is not None:
            self._warn_of_low_gate(self.gate)

    def _scale(self) -> Tensor:
        return x0_scale(self.levels)

    def _rule_tables(self) -> dict[str, Tensor]:
        log_snr, finite = bounded(self.levels.log_snr), self.levels.finite
        kind = self.levels.prediction_type
        if self.max_x0_error is None and kind == "epsilon" and not bool(finite[-1]):
            raise ValueError(
                "max_x0_error=None needs a schedule without zero SNR: there an epsilon error says "
                "nothing of x0; give a bound such as 1.0."
            )
        # S / W_x0 times the width of the cell
        on_target = to_target(kind, log_snr, self.levels.sigma_data)
        rate_per_x0 = (log_snr + on_target).exp() / self._weights()
        mass_per_x0 = rate_per_x0 * finite_widths(self.levels)
        for end, neighbour in ((0, 1), (-1, -2)):
            if not bool(finite[end]):  # 0 / 0 for many weightings: the limit is near
                mass_per_x0[end] = mass_per_x0[neighbour]
        if not bool(mass_per_x0.isfinite().all()):
            index = int((~mass_per_x0.isfinite()).nonzero()[0])
            raise ValueError(
                f"loss weighting {self.loss_weighting!r} is 0 at index {index} (log-SNR "
                f"{float(self.levels.log_snr[index]):.4g}), where the law would be infinite: use "
                "a weighting that is positive on the whole schedule."
            )
        return {
            "observed_per_x0": self.levels.positions.exp() + 1,
            "mass_per_x0": mass_per_x0,
            "rate_per_x0": torch.where(finite, (1.5 * log_snr).exp(), 0.0),
            "log_sigma": -log_snr / 2,
        }

    def _rule(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        x0_error = self._x0_error(profile, constants)
        distance = constants["log_sigma"] - self._log_gate(x0_error, constants)
        open_gate = torch.sigmoid(self.gate_power * distance)
        return open_gate * x0_error * constants["mass_per_x0"]

    def _x0_error(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        bound = self.max_x0_error
        error = profile / constants["observed_per_x0"]
        return error if bound is None else error.clamp_max(bound)

    def _log_gate(self, x0_error: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        """log c, 0-dim."""
        log_sigma = constants["log_sigma"]
        if self.gate is not None:
            return torch.full_like(log_sigma[0], _log(self.gate))
        rate = x0_error * constants["rate_per_x0"]
        whole = self._state["learned"].all()
        counted = (rate >= self.onset * rate.max()) & (rate > 0) & whole
        return torch.where(counted, log_sigma, -torch.inf).max()

    def _warn_of_low_gate(self, gate: float) -> None:
        log_sigma = -self.levels.log_snr[self.levels.finite] / 2
        if _log(gate) < float(0.75 * log_sigma[0] + 0.25 * log_sigma[-1]):
            logger.warning(
                "the gate c = %.3g of the information rate lies in the lowest quarter of the "
                "schedule's log sigma: the law may gather at the clean end; a fixed gate (0.15 to "
                "0.2 for data of unit scale) or a longer warm_up keeps it away.",
                gate,
            )

    def metrics(self) -> dict[str, Tensor]:
        """Those of every adaptive sampler, and the gate c."""
        _, constants = self._present()
        x0_error = self._x0_error(self._state["profile"], constants)
        return super().metrics() | {"gate": self._log_gate(x0_error, constants).exp()}

    def state_dict(self) -> dict[str, Any]:
        # the state is read back to the host here anyway: a step must not wait for a warning
        state = super().state_dict()
        if self.gate is None and bool(state["state.learned"].all()):
            self._warn_of_low_gate(float(self.metrics()["gate"]))
        return state


def _log(gate: float) -> float:
    return math.log(gate) if gate else -math.inf
