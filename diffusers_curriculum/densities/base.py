"""What a density over log-SNR is, and the register of their names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import GROUPS, Catalogue
from diffusers_curriculum.checks import above_zero, check_fields, checked, finite

DENSITIES: Catalogue[type[Density]] = Catalogue("density", group=GROUPS[0])
"""All densities by name, each with its formula, source and defaults."""
register = DENSITIES.register
"""Decorator that puts a density of one's own into the catalogue: ``@register("name", ...)``."""
_SIGN = torch.iinfo(torch.int64).min


def positive(default: float) -> Any:
    """A parameter that must be greater than 0."""
    return checked(above_zero, default=default)


def make_density(name: str, edges: Tensor, /, **parameters: Any) -> Density:
    """Build the density registered under ``name`` for a schedule with cell ``edges`` (T+1,).

    Raises:
        ValueError: unknown name or parameter (the message lists the known ones), a parameter that
            is missing or out of range.
    """
    kind = DENSITIES.look_up(name)
    own = [f for f in fields(kind) if f.name != "edges"]
    if not kind.passes_on:
        DENSITIES.check_parameters(name, parameters, (f.name for f in own))
    for f in own:
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name not in parameters:
            example = json.dumps(DENSITIES.entry(name).example)
            raise ValueError(f"density {name!r} needs {f.name!r}, for example {example}.")
    return kind.on_schedule(edges, **parameters)


def placement_of(name: str) -> Placement:
    """Which parameters move and widen the density ``name``; ValueError, with the names of those
    that can be moved, for one that none moves, and for an unknown name."""
    found = DENSITIES.look_up(name).placement
    if found is None:
        movable = ", ".join(each for each, kind in DENSITIES.items() if kind.placement)
        raise ValueError(f"density {name!r} has no location to move: choose from {movable}.")
    return found


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
    return DENSITIES.look_up(name).portable(plain)


def on_clock(name: str, parameters: Mapping[str, Any], shift: float | None) -> dict[str, Any]:
    """``parameters`` of the density ``name`` on a schedule of flow matching with this shift, if it
    has one: a law of the noise fraction is one of the model's own clock, which moves it unless it
    names a shift; ValueError for an unknown name."""
    kind = DENSITIES.look_up(name)
    return dict(parameters) if shift is None else kind.on_clock(dict(parameters), shift)


class Placement(NamedTuple):
    """Which parameters of a law say where it lies, and how wide it is.

    Attributes:
        location: the parameter that moves it.
        scale: the parameter that widens it, None where its width is none or more than one.
        unit: log-SNR for one unit of both; negative where the location grows towards noise.
        fixed: parameters that would move it too, at the value that leaves it where it is.
    """

    location: str
    scale: str | None = None
    unit: float = 1.0
    fixed: Mapping[str, Any] = MappingProxyType({})

    def parameters(self, location: float, scale: float | None) -> dict[str, Any]:
        """Those of the law with its centre at ``location`` and a width of ``scale``, in log-SNR."""
        placed = {**self.fixed, self.location: location / self.unit}
        if scale is None or self.scale is None:
            return placed
        return placed | {self.scale: scale / abs(self.unit)}


@dataclass(frozen=True)
class Density:
    """A probability density over log-SNR; every method maps float64 tensors of any shape. A
    subclass gives :meth:`pdf` and :meth:`cdf`."""

    passes_on: ClassVar[bool] = False  # whether unknown parameters go on to on_schedule()
    placement: ClassVar[Placement | None] = None  # of a law that can be moved by a parameter

    def __post_init__(self) -> None:
        check_fields(self, otherwise=finite)

    @classmethod
    def on_schedule(cls, edges: Tensor, **parameters: Any) -> Density:
        """The law for a schedule with these cell edges; most laws do not depend on it."""
        return cls(**parameters)

    @classmethod
    def portable(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """See :func:`portable_parameters`; for a law that reads files."""
        return parameters

    @classmethod
    def on_clock(cls, parameters: dict[str, Any], shift: float) -> dict[str, Any]:
        """See :func:`on_clock`; for a law of the noise fraction."""
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
        inner = inverse(self.cdf, self.sf, probability, low, high)
        return torch.where(probability <= 0, low, torch.where(probability >= 1, high, inner))

    def between(self, low: Tensor, high: Tensor) -> Tensor:
        """Probability of (low, high], a difference in the nearer tail, so that masses far below
        1e-16 keep their digits."""
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

    edges: Tensor = checked(None, repr=False)

    @classmethod
    def on_schedule(cls, edges: Tensor, **parameters: Any) -> Density:
        return cls(edges, **parameters)


# -- inverses without a closed form, to the last bit of float64 ------------------------------------


def inverse(
    cdf: Callable[[Tensor], Tensor],
    sf: Callable[[Tensor], Tensor],
    probability: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """The largest number of [low, high] below which ``probability`` lies, by the nearer tail."""
    near, rest = probability <= 0.5, 1 - probability
    return largest(lambda x: torch.where(near, cdf(x) <= probability, sf(x) >= rest), low, high)


def largest(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The largest float64 of [low, high] up to which the elementwise test ``holds`` is true, by
    bisection; it is taken to hold at ``low``, and to be false from some point on.

    The halves are halves of the floating-point numbers between ``low`` and ``high``, not of their
    distance: 64 steps reach neighbouring numbers from anywhere, infinite ends and tails included.
    """
    below, above = _rank(low), _rank(high)
    above = torch.where(holds(high), below, above)
    answer_high = above == below
    for _ in range(64):
        middle = (below & above) + ((below ^ above) >> 1)  # the mean, which cannot overflow
        true = holds(_number(middle))
        below, above = torch.where(true, middle, below), torch.where(true, above, middle)
        if bool(((below == above) | (below + 1 == above)).all()):
            break
    return torch.where(answer_high, high, _number(below))


def _rank(x: Tensor) -> Tensor:
    """int64 in the order of the numbers; both zeros are 0."""
    bits = x.contiguous().view(torch.int64)
    return torch.where(bits < 0, _SIGN - bits, bits)


def _number(rank: Tensor) -> Tensor:
    return torch.where(rank < 0, _SIGN - rank, rank).view(torch.float64)
