"""Fields of a density and how their values are checked when it is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

Check = Callable[[str, Any], None]
# metadata of a field that the law checks itself
UNCHECKED: dict[str, Check] = {"check": lambda name, value: None}


def checked(check: Check, **settings: Any) -> Any:
    """A dataclass field whose value goes through ``check(name, value)``; ``settings`` are those of
    ``dataclasses.field``, without a default for a field that must be given."""
    return field(metadata={"check": check}, **settings)


def positive(default: float) -> float:
    """A field that must be greater than 0."""
    return checked(above_zero, default=default)


def optional(check: Check) -> Any:
    """A field that may be left out, and goes through ``check`` where it is given."""
    return checked(_if_given(check), default=None)


def finite(name: str, value: Any) -> None:
    """Refuse what is not a finite number."""
    if not _is_finite(value):
        raise ValueError(f"{name}={value!r} is not a finite number.")


def above_zero(name: str, value: Any) -> None:
    """Refuse what is not a finite number greater than 0."""
    finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}={value!r} must be greater than 0.")


def whole(name: str, value: Any) -> None:
    """Refuse what is not a whole number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r} must be a whole number of 0 or more.")


def one_of(*choices: str) -> Check:
    """A check that refuses everything but ``choices``."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(choices)}.")

    return check


def number_list(name: str, value: Any) -> list[float]:
    """The finite numbers of a JSON list.

    Raises:
        ValueError: it is no list, or holds something else (the message says where).
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(
            f"{name}={value!r} is not a list of numbers: write [-4, 0, 4] (of a tensor or an "
            "array, pass .tolist())."
        )
    for position, number in enumerate(value):
        finite(f"{name}[{position}]", number)
    return [float(number) for number in value]


def joined(nested: Any, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a density inside another, given under ``density_args``, beside it or both.

    Raises:
        ValueError: ``nested`` is no dict, or a name is in both.
    """
    if nested is not None and not isinstance(nested, Mapping):
        raise ValueError(f'density_args={nested!r} is not a dict: write {{"mu": 0.0}}.')
    twice = sorted(set(nested or {}) & set(flat))
    if twice:
        raise ValueError(f"{twice[0]!r} stands in density_args and beside it: give it once.")
    return dict(nested or {}) | dict(flat)


def _if_given(check: Check) -> Check:
    def check_given(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_given


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
