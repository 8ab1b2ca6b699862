"""What a catalogue says of each of its entries: densities, loss weightings and samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One entry of a catalogue, as it stands in the table of the docs.

    Attributes:
        name: under which it is asked for.
        make: the class or function behind the name.
        formula: in ASCII; l is the log-SNR, S = exp(l), t the time fraction (0 = clean).
        source: paper and equation, or the code base that made it known.
        families: schedules it is meant for: "all", or some of "vp", "flow", "edm".
        note: what a user should know besides, empty for most.
    """

    name: str
    make: Callable[..., Any]
    formula: str
    source: str
    families: str = "all"
    note: str = ""
