"""The register of loss weightings, and the checks that their parameters share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffusers_curriculum.catalogue import Entry

WEIGHTINGS: dict[str, Callable[..., Tensor]] = {}
ENTRIES: dict[str, Entry] = {}
WHOLE_SCHEDULE: set[str] = set()  # names that mean nothing on single log-SNRs

_LogWeight = Callable[..., Tensor]


def register(
    name: str,
    *,
    formula: str,
    source: str,
    families: str = "all",
    note: str = "",
    whole_schedule: bool = False,
) -> Callable[[_LogWeight], _LogWeight]:
    """Decorator: make a function of log-SNR available as the loss weighting ``name``.

    The function maps log-SNRs, (T,) float64, finite and cleanest first, to the logarithm of the
    weight on the squared error of x0. Its further arguments are the weighting's parameters; a
    keyword-only ``prediction_type`` is filled in for it.

    Args:
        formula, source, families, note: what the catalogue says of it, see
            :class:`~diffusers_curriculum.catalogue.Entry`.
        whole_schedule: the weight at a level depends on the levels beside it.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: _LogWeight) -> _LogWeight:
        if name in WEIGHTINGS or name == "none":
            raise ValueError(
                f"a loss weighting named {name!r} exists already: choose another name."
            )
        WEIGHTINGS[name] = function
        ENTRIES[name] = Entry(name, function, formula, source, families, note)
        if whole_schedule:
            WHOLE_SCHEDULE.add(name)
        return function

    return add


def lookup(name: str, parameters: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The function registered as ``name``.

    Raises:
        ValueError: unknown name, or a parameter that it does not have.
    """
    if name not in WEIGHTINGS:
        names = ", ".join(["none", *WEIGHTINGS])
        raise ValueError(
            f"loss weighting {name!r} is unknown or takes no parameters: choose from {names}."
        )
    signature = inspect.signature(WEIGHTINGS[name]).parameters.values()
    known = [p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(
            f"loss weighting {name!r} has no parameter {unknown[0]!r}: it takes {known or 'none'}."
        )
    return WEIGHTINGS[name]


def depends_on_target(weighting: Callable[..., Tensor]) -> bool:
    """Whether ``weighting`` is another one for each prediction type."""
    return "prediction_type" in inspect.signature(weighting).parameters


def check_number(name: str, value: object) -> None:
    """Refuse what is no finite number."""
    if not _is_finite_number(value):
        raise ValueError(f"{name}={value!r} must be a finite number.")


def check_positive(name: str, value: object) -> None:
    """Refuse what is no finite number greater than 0."""
    if not (_is_finite_number(value) and value > 0):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be a number greater than 0.")


def check_between(name: str, value: object, low: float, high: float) -> None:
    """Refuse what is no number in [low, high]."""
    if not (_is_finite_number(value) and low <= value <= high):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be a number from {low} to {high}.")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false.")


def _is_finite_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]
