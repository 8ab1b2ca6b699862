"""Figures as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.evidence.curves import Interval


def plus_minus(mean: Interval) -> str:
    """A mean and half its interval."""
    return f"{mean.value:.3f} ± {mean.high - mean.value:.3f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
