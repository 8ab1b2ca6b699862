"""Mixtures of densities, a floor of the reference among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any

from torch import Tensor

from diffusers_curriculum.densities.base import (
    Density,
    ScheduleDensity,
    density_class,
    make_density,
    portable_parameters,
    register,
)
from diffusers_curriculum.densities.fields import UNCHECKED, above_zero, joined


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
class Mixture(ScheduleDensity):
    """A weighted mean of densities; its masses and its cdf are the weighted means of theirs.

    Args:
        components: list of {"density": name, "weight": w, ...}, the rest being that density's
            parameters, flat or under "density_args"; weights are relative, by default 1.

    Raises:
        ValueError: no component, one without a density, a weight that is not greater than 0, or
            what the component's density refuses (the message says which component).
    """

    components: list[dict[str, Any]] = field(metadata=UNCHECKED)

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
    density_class(component["density"])
    return component["density"], weight, joined(component.get("density_args"), rest)
