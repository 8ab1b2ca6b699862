"""``KEY=VALUE`` words of a command line as a dict of plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from diffusers_curriculum.training.errors import UsageError

Value = bool | int | float | str

_NAME = re.compile(r"[A-Za-z_]\w*")
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_INTEGER = re.compile(r"[+-]?\d+")


def parse_key_values(flag: str, pieces: Iterable[str]) -> dict[str, Value]:
    """Read ``KEY=VALUE`` pieces given to ``flag``: booleans, integers, floats or bare words.

    Raises:
        UsageError: a piece is malformed, a number is not finite, or a key appears twice.
    """
    values: dict[str, Value] = {}
    for piece in pieces:
        key, equals, text = piece.partition("=")
        if not equals or not _NAME.fullmatch(key):
            raise UsageError(f"{flag} got {piece!r}: write KEY=VALUE, for example mu=0.5.")
        if key in values:
            raise UsageError(f"{flag} got {piece!r}, but {key} was given before: give it once.")
        values[key] = _parse_value(flag, piece, text)
    return values


def _parse_value(flag: str, piece: str, text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    number = _parse_float(text)
    if number is not None and math.isfinite(number):
        return number
    if number is None and _WORD.fullmatch(text):
        return text
    raise UsageError(
        f"{flag} got {piece!r}: the value must be a finite number, true, false or a bare word."
    )


def _parse_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
