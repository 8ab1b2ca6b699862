"""``KEY=VALUE`` words of a command line as a dict of plain values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from diffusers_curriculum.training.errors import UsageError, usage_errors

_NAME = re.compile(r"[A-Za-z_]\w*")
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_PATH = re.compile(r"[\w.~: -]*[/\\][\w.~/\\: -]*")
_INTEGER = re.compile(r"[+-]?\d+")
LARGEST = 2**53  # whole numbers up to it are exact as floats


def parse_key_values(flag: str, pieces: Iterable[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pieces given to ``flag``: booleans, integers, floats, bare words, paths
    with a slash, or JSON lists and objects such as ``points=[[-4,0],[0,1],[4,0]]``.

    Raises:
        UsageError: a piece is malformed, a number is not finite, or a key appears twice.
    """
    values: dict[str, Any] = {}
    for piece in pieces:
        key, equals, text = piece.partition("=")
        if not equals or not _NAME.fullmatch(key):
            raise UsageError(f"{flag} got {piece!r}: write KEY=VALUE, for example mu=0.5.")
        if key in values:
            raise UsageError(f"{flag} got {piece!r}, but {key} was given before: give it once.")
        values[key] = _parse_value(flag, piece, text)
    return values


def _parse_value(flag: str, piece: str, text: str) -> Any:
    if text[:1] in ("[", "{"):
        return _parse_json(flag, piece, text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        with usage_errors(f"{flag} got {piece!r}"):
            return _whole(text)
    try:
        number = float(text)
    except ValueError:
        number = None
    if number is not None and math.isfinite(number):
        return number
    if number is None and (_WORD.fullmatch(text) or _PATH.fullmatch(text)):
        return text
    raise UsageError(
        f"{flag} got {piece!r}: the value must be a finite number, true, false, a bare word, a "
        "path with a slash, or a JSON list or object in quotes."
    )


def _whole(text: str) -> int:
    number = int(text)
    if abs(number) > LARGEST:
        raise ValueError(f"{text} is too large: whole numbers reach to {LARGEST:,}.")
    return number


def _parse_json(flag: str, piece: str, text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a finite number")

    try:
        value = json.loads(text, parse_constant=refuse, parse_int=_whole)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{flag} got {piece!r}, which is not JSON ({error}): write for example "
            "'points=[[-4,0],[0,1],[4,0]]', in single quotes."
        ) from error
    return value


def without_password(text: str) -> str:
    """A text whose addresses have no password: https://user:password@host."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)
