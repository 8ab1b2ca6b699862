"""A part of a density, its shape kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_curriculum.densities.base import (
    Density,
    ScheduleDensity,
    make_density,
    portable_parameters,
    register,
)
from diffusers_curriculum.densities.fields import UNCHECKED, finite, joined, optional, whole


@register(
    "truncated",
    formula="p(l) / (F(high) - F(low)) between low and high, 0 elsewhere",
    source="the conditional law; kohya-ss and OneTrainer offer timestep limits",
    note="min_timestep and max_timestep are both kept, 0 is the cleanest. A sampler's floor trains "
    "what is cut off: use floor=0 to leave it untrained.",
    example={"density": "laplace", "density_args": {"b": 2.0}, "low": -5.0, "high": 1.0},
)
@dataclass(frozen=True, eq=False)
class Truncated(ScheduleDensity):
    """The part of a density between two noise levels, its shape kept: the conditional law.

    Args:
        density: name of a density; its parameters stand beside, or under ``density_args`` where a
            name is taken (low and high of another law, density of a table).
        low: noisiest log-SNR that is kept, default none.
        high: cleanest log-SNR that is kept, default none.
        min_timestep: cleanest timestep that is kept instead, 0 = cleanest of the schedule.
        max_timestep: noisiest timestep that is kept; both belong to what is kept.

    Raises:
        ValueError: limits of both kinds, none, empty or beyond the schedule, without mass between
            them, or what the density refuses.
    """

    passes_on: ClassVar[bool] = True

    density: str = field(metadata=UNCHECKED)
    density_args: dict[str, Any] | None = field(default=None, metadata=UNCHECKED)
    low: float | None = optional(finite)
    high: float | None = optional(finite)
    min_timestep: int | None = optional(whole)
    max_timestep: int | None = optional(whole)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.support
        if not low < high:
            raise ValueError(f"{self} keeps nothing: the lower limit must be below the upper one.")
        if not self._share > 0:
            raise ValueError(f"{self} has no mass between log-SNR {low:g} and {high:g}.")

    @classmethod
    def on_schedule(cls, edges: Tensor, **parameters: Any) -> Density:
        return cls(edges, **_nested(parameters))

    @classmethod
    def portable(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        nested = _nested(parameters)
        name = nested["density"]
        return nested | {"density_args": portable_parameters(name, nested["density_args"])}

    @property
    def support(self) -> tuple[float, float]:
        low, high = self._limits
        inner_low, inner_high = self._inner.support
        return max(low, inner_low), min(high, inner_high)

    def pdf(self, log_snr: Tensor) -> Tensor:
        low, high = self._limits
        inside = (log_snr >= low) & (log_snr <= high)
        return torch.where(inside, self._inner.pdf(log_snr) / self._share, 0.0)

    def cdf(self, log_snr: Tensor) -> Tensor:
        x = log_snr.clamp(*self._limits)
        share = self._inner.between(torch.full_like(x, self._limits[0]), x) / self._share
        return torch.where(log_snr >= self._limits[1], 1.0, share.clamp_max(1.0))

    def sf(self, log_snr: Tensor) -> Tensor:
        x = log_snr.clamp(*self._limits)
        share = self._inner.between(x, torch.full_like(x, self._limits[1])) / self._share
        return torch.where(log_snr <= self._limits[0], 1.0, share.clamp_max(1.0))

    def masses(self, edges: Tensor) -> Tensor:
        low, high = self._limits
        whole_cell = (edges[1:] >= low) & (edges[:-1] <= high)
        part = self._inner.masses(edges.clamp(low, high))
        return torch.where(whole_cell, self._inner.masses(edges), part) / self._share

    @cached_property
    def _inner(self) -> Density:
        return make_density(self.density, self.edges, **(self.density_args or {}))

    @cached_property
    def _share(self) -> float:
        ends = torch.tensor(self._limits, dtype=torch.float64)
        return float(self._inner.between(ends[0], ends[1]))

    @cached_property
    def _limits(self) -> tuple[float, float]:
        by_level = self.low is not None or self.high is not None
        by_timestep = self.min_timestep is not None or self.max_timestep is not None
        if by_level == by_timestep:
            raise ValueError(
                f"{self} needs low or high (log-SNR), or min_timestep or max_timestep (0 = "
                "cleanest): limits of one of the two kinds."
            )
        if by_level:
            return (
                -math.inf if self.low is None else self.low,
                math.inf if self.high is None else self.high,
            )
        return self._limits_of_timesteps()

    def _limits_of_timesteps(self) -> tuple[float, float]:
        last = len(self.edges) - 2
        first = self.min_timestep or 0
        final = last if self.max_timestep is None else self.max_timestep
        if not first <= final <= last:
            raise ValueError(
                f"min_timestep={first!r} and max_timestep={final!r} must satisfy 0 <= min_timestep "
                f"<= max_timestep <= {last}, the noisiest timestep of this schedule."
            )
        return float(self.edges[final + 1]), float(self.edges[first])


def _nested(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a truncated density, those of the density itself under density_args."""
    own = {f.name for f in fields(Truncated)}
    rest = {name: value for name, value in parameters.items() if name not in own}
    kept = {name: value for name, value in parameters.items() if name in own}
    return kept | {"density_args": joined(kept.get("density_args"), rest)}
