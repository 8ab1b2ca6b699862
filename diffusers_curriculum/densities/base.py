"""What a density over log-SNR is, and the register of their names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Entry
from diffusers_curriculum.densities.fields import finite
from diffusers_curriculum.densities.inverse import largest

DENSITIES: dict[str, type[Density]] = {}
ENTRIES: dict[str, Entry] = {}
EXAMPLES: dict[str, dict[str, Any]] = {}
Kind = TypeVar("Kind", bound="type[Density]")


def register(
    name: str,
    *,
    formula: str = "",
    source: str = "",
    families: str = "all",
    note: str = "",
    example: Mapping[str, Any] | None = None,
) -> Callable[[Kind], Kind]:
    """Class decorator: make a density available under ``name``; the rest is told in the catalogue.

    Args:
        example: parameters of a telling instance, for the gallery and for tests; needed where a
            parameter has no default.

    Raises:
        ValueError: the name is taken.
    """

    def add(density: Kind) -> Kind:
        if name in DENSITIES:
            raise ValueError(f"a density named {name!r} exists already: choose another name.")
        DENSITIES[name] = density
        ENTRIES[name] = Entry(name, density, formula, source, families, note)
        EXAMPLES[name] = dict(example or {})
        return density

    return add


def density_class(name: str) -> type[Density]:
    """The class registered under ``name``.

    Raises:
        ValueError: unknown name (the message lists the known ones).
    """
    if not isinstance(name, str) or name not in DENSITIES:
        raise ValueError(
            f"density {name!r} is unknown: choose from {', '.join(sorted(DENSITIES))}."
        )
    return DENSITIES[name]


def make_density(name: str, edges: Tensor, /, **parameters: Any) -> Density:
    """Build the density registered under ``name`` for a schedule with cell ``edges`` (T+1,).

    Raises:
        ValueError: unknown name or parameter (the message lists the known ones), a parameter that
            is missing or out of range.
    """
    kind = density_class(name)
    own = [f for f in fields(kind) if f.name != "edges"]
    known = [f.name for f in own]
    unknown = sorted(set(parameters) - set(known))
    if unknown and not kind.passes_on:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ValueError(f"density {name!r} has no parameter {unknown[0]!r}: {takes}.")
    for f in own:
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name not in parameters:
            raise ValueError(
                f"density {name!r} needs {f.name!r}, for example {json.dumps(EXAMPLES[name])}."
            )
    return kind.on_schedule(edges, **parameters)


def portable_parameters(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """``parameters`` of the density ``name`` as plain JSON values that need no file: a config that
    holds them builds the same density anywhere.

    Raises:
        ValueError: unknown name, a value that JSON has no form for, or an unreadable table.
    """
    try:
        plain = json.loads(json.dumps(dict(parameters)))
    except TypeError as error:
        raise ValueError(
            f"the parameters of {name!r} must be numbers, words, lists and dicts: {error}; of a "
            "tensor or an array, pass .tolist()."
        ) from error
    return density_class(name).portable(plain)


@dataclass(frozen=True)
class Density:
    """A probability density over log-SNR; every method maps float64 tensors of any shape.

    A subclass gives :meth:`pdf` and :meth:`cdf`; :meth:`sf` where the clean tail shall keep its
    digits, :meth:`icdf` where it has a closed form.
    """

    passes_on: ClassVar[bool] = False  # whether unknown parameters go on to on_schedule()

    def __post_init__(self) -> None:
        for f in (f for f in fields(self) if f.name != "edges"):
            f.metadata.get("check", finite)(f.name, getattr(self, f.name))

    @classmethod
    def on_schedule(cls, edges: Tensor, **parameters: Any) -> Density:
        """The law for a schedule with these cell edges; most laws do not depend on it."""
        return cls(**parameters)

    @classmethod
    def portable(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """See :func:`portable_parameters`; for a law that reads files."""
        return parameters

    @property
    def support(self) -> tuple[float, float]:
        """The log-SNR between which all mass lies."""
        return -torch.inf, torch.inf

    def pdf(self, log_snr: Tensor) -> Tensor:
        """Density per unit of log-SNR."""
        raise NotImplementedError

    def cdf(self, log_snr: Tensor) -> Tensor:
        """Probability of a noisier level: F(log_snr), increasing."""
        raise NotImplementedError

    def sf(self, log_snr: Tensor) -> Tensor:
        """Probability of a cleaner level, 1 - F(log_snr); without its cancellation, where a
        subclass says how."""
        return 1 - self.cdf(log_snr)

    def icdf(self, probability: Tensor) -> Tensor:
        """The log-SNR below which ``probability`` of the mass lies; by bisection, unless a subclass
        has a closed form."""
        low, high = (torch.full_like(probability, end) for end in self.support)
        noisy, rest = probability <= 0.5, 1 - probability
        inner = largest(
            lambda x: torch.where(noisy, self.cdf(x) <= probability, self.sf(x) >= rest), low, high
        )
        return torch.where(probability <= 0, low, torch.where(probability >= 1, high, inner))

    def between(self, low: Tensor, high: Tensor) -> Tensor:
        """Probability of (low, high].

        The difference is taken in the nearer tail, so that masses far below 1e-16 keep their
        digits.
        """
        clean = self.sf(low) - self.sf(high)
        noisy = self.cdf(high) - self.cdf(low)
        return torch.where(low >= self._median, clean, noisy).clamp_min(0.0)

    def masses(self, edges: Tensor) -> Tensor:
        """(T,) probability of each cell of ``edges`` (T+1,), decreasing; not normalised."""
        return self.between(edges[1:], edges[:-1])

    @cached_property
    def _median(self) -> float:
        return float(self.icdf(torch.full((), 0.5, dtype=torch.float64)))


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


@dataclass(frozen=True, eq=False)
class ScheduleDensity(Density):
    """A law that depends on the schedule, through the edges of its cells (T+1,), decreasing."""

    edges: Tensor = field(repr=False)

    @classmethod
    def on_schedule(cls, edges: Tensor, **parameters: Any) -> Density:
        return cls(edges, **parameters)
