"""What a density over log-SNR is, and the register of their names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Entry

DENSITIES: dict[str, type[Density]] = {}
ENTRIES: dict[str, Entry] = {}


def register(
    name: str, *, formula: str = "", source: str = "", families: str = "all", note: str = ""
) -> Callable[[type[Density]], type[Density]]:
    """Class decorator: make a density available under ``name``; the rest is told in the catalogue.

    Raises:
        ValueError: the name is taken.
    """

    def add(density: type[Density]) -> type[Density]:
        if name in DENSITIES:
            raise ValueError(f"a density named {name!r} exists already: choose another name.")
        DENSITIES[name] = density
        ENTRIES[name] = Entry(name, density, formula, source, families, note)
        return density

    return add


def make_density(name: str, edges: Tensor, /, **parameters: float) -> Density:
    """Build the density registered under ``name`` for a schedule with cell ``edges`` (T+1,).

    Raises:
        ValueError: unknown name or parameter (the message lists the known ones), or a parameter
            out of range.
    """
    if name not in DENSITIES:
        raise ValueError(
            f"density {name!r} is unknown: choose from {', '.join(sorted(DENSITIES))}."
        )
    known = [f.name for f in fields(DENSITIES[name]) if f.name != "edges"]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ValueError(f"density {name!r} has no parameter {unknown[0]!r}: {takes}.")
    return DENSITIES[name].on_schedule(edges, **parameters)


@dataclass(frozen=True)
class Density:
    """A probability density over log-SNR; every method maps float64 tensors of any shape."""

    def __post_init__(self) -> None:
        for f in (f for f in fields(self) if f.name != "edges"):
            value = getattr(self, f.name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                raise ValueError(f"{f.name}={value!r} is not a finite number.")
            if f.metadata.get("positive") and value <= 0:
                raise ValueError(f"{f.name}={value!r} must be greater than 0.")

    @classmethod
    def on_schedule(cls, edges: Tensor, **parameters: float) -> Density:
        """The law for a schedule with these cell edges; most laws do not depend on it."""
        return cls(**parameters)

    def pdf(self, log_snr: Tensor) -> Tensor:
        """Density per unit of log-SNR."""
        raise NotImplementedError

    def cdf(self, log_snr: Tensor) -> Tensor:
        """Probability of a noisier level: F(log_snr), increasing."""
        raise NotImplementedError

    def sf(self, log_snr: Tensor) -> Tensor:
        """Probability of a cleaner level, 1 - F(log_snr), without its cancellation."""
        raise NotImplementedError

    def icdf(self, probability: Tensor) -> Tensor:
        """The log-SNR below which ``probability`` of the mass lies."""
        raise NotImplementedError

    def masses(self, edges: Tensor) -> Tensor:
        """(T,) probability of each cell of ``edges`` (T+1,), decreasing; not normalised.

        Differences are taken in the nearer tail, so that masses far below 1e-16 keep their digits.
        """
        upper, lower = edges[:-1], edges[1:]
        clean = self.sf(lower) - self.sf(upper)
        noisy = self.cdf(upper) - self.cdf(lower)
        median = self.icdf(torch.full((), 0.5, dtype=edges.dtype, device=edges.device))
        return torch.where(lower >= median, clean, noisy).clamp_min(0.0)


class SymmetricDensity(Density):
    """A law symmetric about ``mu`` (0 unless it has such a field), given by its lower half."""

    mu: float

    def _pdf(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _lower_cdf(self, z: Tensor) -> Tensor:
        """F(mu + z) for z <= 0, exact in the tail."""
        raise NotImplementedError

    def _lower_icdf(self, p: Tensor) -> Tensor:
        """The inverse of :meth:`_lower_cdf`, for p in [0, 1/2]."""
        raise NotImplementedError

    def pdf(self, log_snr: Tensor) -> Tensor:
        return self._pdf(log_snr - self._centre)

    def cdf(self, log_snr: Tensor) -> Tensor:
        z = log_snr - self._centre
        lower = self._lower_cdf(-z.abs())
        return torch.where(z <= 0, lower, 1 - lower)

    def sf(self, log_snr: Tensor) -> Tensor:
        return self.cdf(2 * self._centre - log_snr)

    def icdf(self, probability: Tensor) -> Tensor:
        z = self._lower_icdf(torch.minimum(probability, 1 - probability))
        return self._centre + torch.where(probability <= 0.5, z, -z)

    @property
    def _centre(self) -> float:
        return getattr(self, "mu", 0.0)


def positive(default: float) -> float:
    """A dataclass field that must be greater than 0."""
    return field(default=default, metadata={"positive": True})
