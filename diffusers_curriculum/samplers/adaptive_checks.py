"""Arguments of adaptive samplers that can only be wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusers_curriculum.weighting import TARGETS


def check_adaptive(settings: Mapping[str, Any], levels: int, prediction_type: str) -> None:
    """Check what all adaptive samplers share, for a schedule of so many ``levels``.

    Raises:
        ValueError: a number out of range or an unknown prediction type.
    """
    least = {"bins": 1, "refresh_every": 1, "warm_up": 0, "min_observations": 1, "neighbours": 0}
    for name, minimum in least.items():
        check_whole(name, settings[name], minimum)
    if settings["bins"] > levels:
        raise ValueError(
            f"bins={settings['bins']} is more than the {levels} levels of the schedule: choose "
            f"at most {levels}."
        )
    ema = settings["ema"]
    if not (_is_number(ema) and 0 <= ema < 1):
        raise ValueError(f"ema={ema!r} must lie in [0, 1).")
    if not settings["floor"] > 0:
        raise ValueError(
            f"floor={settings['floor']!r} must be greater than 0 for a law that learns: a level "
            "whose loss was once 0 would never be drawn again; 0.1 is the usual choice."
        )
    if prediction_type not in TARGETS:
        raise ValueError(
            f"prediction_type={prediction_type!r} is unknown: choose from {', '.join(TARGETS)}."
        )


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise ValueError unless ``value`` is a finite number above 0, or 0 if ``zero``."""
    if not (_is_number(value) and math.isfinite(value) and (value > 0 or (zero and value == 0))):
        least = "of 0 or more" if zero else "above 0"
        raise ValueError(f"{name}={value!r} must be a finite number {least}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(choices)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
