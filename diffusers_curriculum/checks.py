"""What a number, a name or a flag may be: the one way to say "out of range".

Every check takes the name and the value of a setting, and what it may be, and raises a ValueError
that shows the value and the remedy. :func:`checked` makes dataclass fields that are checked so.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from typing import Any, NoReturn


def finite(name: str, value: Any) -> None:
    """Refuse what is not a finite number."""
    if not is_finite(value):
        raise ValueError(f"{name}={value!r} is not a finite number: give one.")


def above_zero(name: str, value: Any) -> None:
    """Refuse what is not a finite number greater than 0."""
    finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}={value!r} must be greater than 0.")


def not_negative(name: str, value: Any) -> None:
    """Refuse what is not a finite number of 0 or more."""
    finite(name, value)
    if value < 0:
        raise ValueError(f"{name}={value!r} must be 0 or more.")


def whole(name: str, value: Any, least: int = 0, most: int | None = None) -> None:
    """Refuse what is not an integer from ``least`` on, up to ``most`` where there is such."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} must be a whole number {bounds}.")


def inside(name: str, value: Any, low: float, high: float, ends: str = "[]") -> None:
    """Refuse what is not a number from ``low`` to ``high``; a round end does not belong to them."""
    within = is_finite(value) and low <= value <= high
    if not within or (ends[0] == "(" and value == low) or (ends[1] == ")" and value == high):
        raise ValueError(f"{name}={value!r} must lie in {ends[0]}{low:g}, {high:g}{ends[1]}.")


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is none of ``choices``, with the one that is most like it."""
    known = tuple(choices)
    if value not in known:
        refuse(f"{name}={value!r}", value, known)


def flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false.")


def refuse(what: str, name: Any, known: Iterable[str]) -> NoReturn:
    """Raise the ValueError of an unknown ``name``, ``what`` being its subject."""
    choices = tuple(known)
    alike = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" (is {alike[0]!r} meant?)" if alike else ""
    raise ValueError(f"{what} is unknown: choose from {', '.join(choices)}{hint}.")


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


# -- fields of dataclasses -------------------------------------------------------------------------


def checked(check: Callable[..., None] | None, *bounds: Any, **settings: Any) -> Any:
    """A dataclass field whose value goes through ``check(name, value, *bounds)``.

    Args:
        check: one of the above; None for a field that its class checks itself.
        settings: those of :func:`dataclasses.field`, without a default for a field that must be
            given; where the default is None, None is not checked.
    """
    return field(metadata={"check": check, "bounds": bounds}, **settings)


def take_over_fields(kind: type) -> None:
    """Make fields of the plain values that a class puts in place of its parents' defaults, with the
    parents' types and checks; to be called before ``dataclass`` is."""
    inherited: dict[str, Any] = getattr(kind, "__dataclass_fields__", {})
    own = inspect.get_annotations(kind)
    for name in (n for n in inherited if n in vars(kind)):
        value = vars(kind)[name]
        own.setdefault(name, inherited[name].type)
        if not isinstance(value, Field):
            setattr(kind, name, field(default=value, metadata=inherited[name].metadata))
    kind.__annotations__ = own


def check_fields(instance: Any, otherwise: Callable[..., None] | None = None) -> None:
    """Check every field of a dataclass; those not made by :func:`checked` with ``otherwise``."""
    for each in fields(instance):
        check, value = each.metadata.get("check", otherwise), getattr(instance, each.name)
        if check is not None and not (value is None and each.default is None):
            check(each.name, value, *each.metadata.get("bounds", ()))
