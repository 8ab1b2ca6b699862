"""How a law, a floor and an importance correction make the mass that is drawn, and where in the
cell of a level a continuous draw falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.average_velocity import Interval
from diffusers_curriculum.checks import flag, is_finite
from diffusers_curriculum.densities import Density
from diffusers_curriculum.noise_levels import NoiseLevels, cell_edges, to_device
from diffusers_curriculum.randomness import Slots

CPU = torch.device("cpu")
Tables = TypeVar("Tables")
_PIECES = 64
# Of less mass, float64's rounding of a cdf would be more than a thousandth of the cell.
_LEAST_MASS = 1e-13


class TimestepSample(NamedTuple):
    """One draw of noise levels.

    Attributes:
        timesteps: (B,) in the dtype that the scheduler and the model expect; (2, B) of intervals:
            where each ends, and its length.
        indices: (B,) int64, position in ``sampler.levels``, 0 = cleanest; of a continuous draw, the
            level in whose cell it fell.
        importance: (B,) float32, factor of each sample's loss; ones unless a correction is on.
        log_snr: (B,) float64 (float32 on MPS), the noise level of a continuous draw, finite; None
            where the levels are those of the table.
        interval: what goes with the second time; None where one is drawn.
    """

    timesteps: Tensor
    indices: Tensor
    importance: Tensor
    log_snr: Tensor | None = None
    interval: Interval | None = None

    @property
    def at(self) -> Tensor:
        """(B,) the noise level as :class:`~diffusers_curriculum.objective.Objective` takes it: the
        log-SNR of a continuous draw, else the index."""
        return self.indices if self.log_snr is None else self.log_snr


class SourceOrder(Protocol):
    """Which source each sample of a run is of, counted from 0; -1 for what is of none."""

    @property
    def shares_of_sources(self) -> Sequence[float]:
        """(S,) of all samples."""
        ...

    def sources_at(self, step: int, slots: Slots) -> np.ndarray:
        """(B,) at some slots of an optimizer step."""
        ...

    def sources_observed(self, step: int) -> np.ndarray:
        """(N,) of a whole step, in the order in which its losses are observed."""
        ...


def compose(law: Tensor, reference: Tensor, floor: float, exponent: float) -> tuple[Tensor, Tensor]:
    """(mass, importance) of a law with a floor: m = (1 - floor) p + floor q and
    (q / m)^k / sum(m (q / m)^k), 1 where q is 0; any leading dimensions."""
    mass = law if floor == 0 else (1 - floor) * law + floor * reference
    if exponent == 0:
        return mass, torch.ones_like(mass)
    drawn = mass >= torch.finfo(mass.dtype).tiny  # of less, reference / mass would be infinite
    ratio = torch.where(drawn, reference / mass, 1.0).pow(exponent)
    return mass, ratio / (mass * ratio).sum(-1, keepdim=True)


def tables(mass: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The cdf (..., T), its last entry exactly 1, and the importance as float32."""
    cdf = mass.cumsum(-1)
    return cdf / cdf.narrow(-1, -1, 1), importance.float()


def correction_exponent(correction: str | float) -> float:
    """0 for "none", 1 for "full", or the number itself in [0, 1]."""
    names = {"none": 0.0, "full": 1.0}
    value = names.get(correction, correction) if isinstance(correction, str) else correction
    if isinstance(value, str) or not (is_finite(value) and 0 <= value <= 1):
        raise ValueError(
            f"importance_correction={correction!r} must be 'none', 'full' or a number from 0 to 1."
        )
    return float(value)


def copy_on(device: torch.device, copies: dict[torch.device, Tables]) -> Tables:
    """The copy on ``device``, made once, as a step must not wait for one, of tables whose copies so
    far are given: one on the CPU at least."""
    if device not in copies:
        copies[device] = to_device(copies[CPU], device)
    return copies[device]


def pick(table: Tensor, indices: Tensor) -> Tensor:
    """``table[indices]`` for a table (T,), by the quicker call where there is one."""
    return table.index_select(0, indices) if indices.dim() == 1 else table[indices]


def are_finite(values: Tensor) -> Tensor:
    """``values.isfinite()`` in a quarter of its time: of others the difference is nan."""
    difference = values - values
    return difference == difference


@dataclass(frozen=True, eq=False)
class Cells:
    """Pieces of equal mass of each cell, with a straight line in the noise coordinate inside: alpha
    and sigma of flow matching, log-SNR of EDM. A table, as a step must not wait for a bisection.

    Attributes:
        knots: (T, K + 1) log-SNR, from the clean edge of each cell to its noisy one.
        family: "flow" or "edm".
    """

    knots: Tensor
    family: str

    @classmethod
    def straight(cls, levels: NoiseLevels) -> Cells:
        """The whole cell in one piece. In flow matching level i owns (sigma_{i-1}, sigma_i], so
        that uniform levels make sigma uniform; in EDM its cell of log-SNR."""
        if levels.family == "flow":
            infinity = levels.log_snr.new_full((1,), torch.inf)
            clean, noisy = torch.cat([infinity, levels.log_snr[:-1]]), levels.log_snr
        else:
            edges = _finite_edges(levels)
            clean, noisy = edges[:-1], edges[1:]
        return cls(torch.stack([clean, noisy], dim=1), levels.family)

    @classmethod
    def of_density(cls, levels: NoiseLevels, density: Density) -> Cells:
        """Pieces of equal mass under ``density``: of its cdf, nothing but the last 1 / K of a cell
        is a straight line. Cells that it gives no mass, where only a floor draws, and those whose
        mass lies at one point are straight."""
        edges = levels.edges if levels.family == "flow" else _finite_edges(levels)
        clean, noisy = edges[:-1, None], edges[1:, None]
        share = torch.linspace(0, 1, _PIECES + 1, dtype=edges.dtype)
        cdf = density.cdf(edges)
        inner = density.icdf(torch.lerp(cdf[:-1, None], cdf[1:, None], share)[:, 1:-1])
        inner = torch.maximum(torch.minimum(inner, clean), noisy).cummin(dim=1).values
        straight = _straight(clean, noisy, share[1:-1], levels.family)
        curved = (density.masses(edges) > _LEAST_MASS) & inner.isfinite().all(dim=1)
        inner = torch.where(curved[:, None], inner, straight)
        return cls(torch.cat([clean, inner, noisy], dim=1), levels.family)

    def log_snr(self, indices: Tensor, share: Tensor) -> Tensor:
        """(B,) log-SNR, finite, below which ``share`` (B,) of the mass of the cells ``indices``
        is not: 0 is a cell's clean edge, 1 its noisy one."""
        pieces = self.knots.shape[1] - 1
        piece = (share * pieces).long().clamp(0, pieces - 1)
        tiny = torch.finfo(share.dtype).eps / 2  # an infinite edge is not reached
        within = (share * pieces - piece).clamp(tiny, 1 - tiny)
        at = indices * (pieces + 1) + piece
        knots = self.knots.view(-1)
        return _straight(knots[at], knots[at + 1], within, self.family)


def check_continuous(continuous: object, levels: NoiseLevels) -> None:
    """Raise ValueError where ``continuous`` is no bool, or the schedule has its timesteps only."""
    flag("continuous", continuous)
    if continuous and not levels.continuous:
        raise ValueError(
            f"continuous=True needs flow matching or EDM, and this schedule is {levels.family!r}, "
            "whose network knows the timesteps of the table only: leave it out."
        )


def share_of_cell(cdf: Tensor, u: Tensor, indices: Tensor) -> Tensor:
    """(B,) which share of the mass of the cells ``indices`` lies on the clean side of ``u``."""
    below = torch.where(indices > 0, cdf[(indices - 1).clamp_min(0)], 0.0)
    return ((u - below) / (cdf[indices] - below)).clamp(0, 1)


def _straight(clean: Tensor, noisy: Tensor, share: Tensor, family: str) -> Tensor:
    """log-SNR at ``share`` of the way between two levels in the noise coordinate."""
    if family != "flow":
        return torch.lerp(clean, noisy, share)
    # both coefficients by themselves: near either end one of them has no digits left in the other
    rest = 1 - share
    alpha = rest * torch.sigmoid(clean / 2) + share * torch.sigmoid(noisy / 2)
    sigma = rest * torch.sigmoid(-clean / 2) + share * torch.sigmoid(-noisy / 2)
    return 2 * (alpha.log() - sigma.log())


def _finite_edges(levels: NoiseLevels) -> Tensor:
    """Edges of the cells, an infinite one half a step beyond the outer level."""
    return torch.where(levels.edges.isfinite(), levels.edges, cell_edges(levels.log_snr, "half"))
