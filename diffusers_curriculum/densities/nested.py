"""Densities made of densities: a mixture, such as a floor of the reference, and a part of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, reduce
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_curriculum.checks import above_zero, checked, finite, whole
from diffusers_curriculum.densities.base import (
    DENSITIES,
    Density,
    ScheduleDensity,
    make_density,
    on_clock,
    portable_parameters,
    register,
)


class WeightedMean(Density):
    """A weighted mean of densities; its masses and its cdf are the weighted means of theirs."""

    @property
    def support(self) -> tuple[float, float]:
        ends = [part.support for _, part in self._parts]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def pdf(self, log_snr: Tensor) -> Tensor:
        return self._mean([part.pdf(log_snr) for _, part in self._parts])

    def cdf(self, log_snr: Tensor) -> Tensor:
        return self._mean([part.cdf(log_snr) for _, part in self._parts])

    def sf(self, log_snr: Tensor) -> Tensor:
        return self._mean([part.sf(log_snr) for _, part in self._parts])

    def masses(self, edges: Tensor) -> Tensor:
        return self._mean([part.masses(edges) for _, part in self._parts])

    def _mean(self, values: list[Tensor]) -> Tensor:
        largest = max(weight for weight, _ in self._parts)
        weights = [weight / largest for weight, _ in self._parts]
        # divided at the end: where all values are 1, so is their mean
        total = reduce(add, (w * v for w, v in zip(weights, values, strict=True)))
        return total / reduce(add, weights)

    @cached_property
    def _parts(self) -> list[tuple[float, Density]]:
        """(weight, density) of each component."""
        raise NotImplementedError


@register(
    "mixture",
    formula="sum_k w_k p_k(l) / sum_k w_k",
    source="for a floor of the reference: defensive mixtures (Hesterberg 1995, Technometrics 37)",
    note="Drawn through its own cdf, so that strata and importance stay exact.",
    example={
        "components": [
            {"density": "laplace", "weight": 0.6, "mu": -3.0},
            {"density": "normal", "weight": 0.3, "mean": 4.0, "std": 1.0},
            {"density": "uniform", "weight": 0.1},
        ]
    },
)
@dataclass(frozen=True, eq=False)
class Mixture(WeightedMean, ScheduleDensity):
    """A weighted mean of densities.

    Args:
        components: list of {"density": name, "weight": w, ...}, the rest being that density's
            parameters, flat or under "density_args"; weights are relative, by default 1.

    Raises:
        ValueError: no component, one without a density, a weight that is not greater than 0, or
            what the component's density refuses (the message says which component).
    """

    components: list[dict[str, Any]] = checked(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._parts:
            raise ValueError("components=[] is empty: give one density or more.")

    @classmethod
    def portable(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        each = [_component(i, c) for i, c in enumerate(parameters["components"])]
        components = [
            {"density": name, "weight": weight, "density_args": portable_parameters(name, rest)}
            for name, weight, rest in each
        ]
        return {"components": components}

    @classmethod
    def on_clock(cls, parameters: dict[str, Any], shift: float) -> dict[str, Any]:
        if not isinstance(given := parameters.get("components"), list | tuple):
            return parameters
        each = [_component(i, component) for i, component in enumerate(given)]
        components = [
            {"density": name, "weight": weight, "density_args": on_clock(name, rest, shift)}
            for name, weight, rest in each
        ]
        return parameters | {"components": components}

    @cached_property
    def _parts(self) -> list[tuple[float, Density]]:
        if not isinstance(self.components, list | tuple):
            raise ValueError(
                f"components={self.components!r} is not a list of densities: write "
                '[{"density": "laplace", "weight": 0.9}, {"density": "uniform", "weight": 0.1}].'
            )
        return [self._part(i, component) for i, component in enumerate(self.components)]

    def _part(self, position: int, component: Any) -> tuple[float, Density]:
        name, weight, parameters = _component(position, component)
        try:
            return weight, make_density(name, self.edges, **parameters)
        except ValueError as error:
            raise ValueError(f"components[{position}]: {error}") from error


def _component(position: int, component: Any) -> tuple[str, float, dict[str, Any]]:
    """(name, weight, parameters) of one component of a mixture."""
    where = f"components[{position}]"
    if not isinstance(component, Mapping) or "density" not in component:
        raise ValueError(
            f'{where}={component!r} names no density: write {{"density": "laplace", "weight": 1}}.'
        )
    weight = component.get("weight", 1.0)
    above_zero(f"{where}['weight']", weight)
    rest = {k: v for k, v in component.items() if k not in ("density", "weight", "density_args")}
    DENSITIES.look_up(component["density"])
    return component["density"], weight, _joined(component.get("density_args"), rest)


@dataclass(frozen=True, eq=False)
class Nested(ScheduleDensity):
    """A law made of one other.

    Args:
        density: its name; its parameters stand beside, or under ``density_args`` where a name is
            taken.
    """

    passes_on: ClassVar[bool] = True

    density: str = checked(None)
    density_args: dict[str, Any] | None = checked(None, default=None)

    @classmethod
    def on_schedule(cls, edges: Tensor, **parameters: Any) -> Density:
        return cls(edges, **cls._sorted(parameters))

    @classmethod
    def portable(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        nested = cls._sorted(parameters)
        name = nested["density"]
        return nested | {"density_args": portable_parameters(name, nested["density_args"])}

    @classmethod
    def _sorted(cls, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, those of the inner density under density_args."""
        own = {f.name for f in fields(cls)}
        rest = {name: value for name, value in parameters.items() if name not in own}
        kept = {name: value for name, value in parameters.items() if name in own}
        return kept | {"density_args": _joined(kept.get("density_args"), rest)}

    @cached_property
    def _inner(self) -> Density:
        return make_density(self.density, self.edges, **(self.density_args or {}))


@register(
    "truncated",
    formula="p(l) / (F(high) - F(low)) between low and high, 0 elsewhere",
    source="the conditional law; kohya-ss and OneTrainer offer timestep limits",
    note="min_timestep and max_timestep are both kept, 0 is the cleanest. A sampler's floor trains "
    "what is cut off: use floor=0 to leave it untrained.",
    example={"density": "laplace", "density_args": {"b": 2.0}, "low": -5.0, "high": 1.0},
)
@dataclass(frozen=True, eq=False)
class Truncated(Nested):
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

    low: float | None = checked(finite, default=None)
    high: float | None = checked(finite, default=None)
    min_timestep: int | None = checked(whole, default=None)
    max_timestep: int | None = checked(whole, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.support
        if not low < high:
            raise ValueError(f"{self} keeps nothing: the lower limit must be below the upper one.")
        if not self._share > 0:
            raise ValueError(f"{self} has no mass between log-SNR {low:g} and {high:g}.")

    @classmethod
    def on_clock(cls, parameters: dict[str, Any], shift: float) -> dict[str, Any]:
        nested = cls._sorted(parameters)
        if "density" not in nested:
            return parameters
        inner = on_clock(nested["density"], nested["density_args"], shift)
        return nested | {"density_args": inner}

    @property
    def support(self) -> tuple[float, float]:
        (low, high), (inner_low, inner_high) = self._limits, self._inner.support
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
            low, high = self.low, self.high
            return -math.inf if low is None else low, math.inf if high is None else high
        last = len(self.edges) - 2
        first = self.min_timestep or 0
        final = last if self.max_timestep is None else self.max_timestep
        if not first <= final <= last:
            raise ValueError(
                f"min_timestep={first!r} and max_timestep={final!r} must satisfy 0 <= min_timestep "
                f"<= max_timestep <= {last}, the noisiest timestep of this schedule."
            )
        return float(self.edges[final + 1]), float(self.edges[first])


def _joined(nested: Any, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a density inside another, given under ``density_args``, beside it or both;
    ValueError for a name that is in both."""
    if nested is not None and not isinstance(nested, Mapping):
        raise ValueError(f'density_args={nested!r} is not a dict: write {{"mu": 0.0}}.')
    twice = sorted(set(nested or {}) & set(flat))
    if twice:
        raise ValueError(f"{twice[0]!r} stands in density_args and beside it: give it once.")
    return dict(nested or {}) | dict(flat)
