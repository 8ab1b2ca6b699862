"""Laws through points of (log-SNR, density): a spline, and a table or CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.checks import checked, finite
from diffusers_curriculum.densities.base import Density, register
from diffusers_curriculum.densities.curve import Curve, monotone_cubic, straight_lines

_COLUMNS = ("log_snr", "density")
_FORM = "write two columns, log_snr and density, with a comma between them"


class CurveDensity(Density):
    """A law whose density is a curve through points, 0 outside them; the scale does not matter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self._curve.total < math.inf:
            raise ValueError(
                f"the densities of all points (log_snr, density) add up to {self._curve.total!r}: "
                "give one or more that are greater than 0, and none that is huge."
            )

    @cached_property
    def _curve(self) -> Curve:
        raise NotImplementedError

    @property
    def support(self) -> tuple[float, float]:
        return float(self._curve.knots[0]), float(self._curve.knots[-1])

    def pdf(self, log_snr: Tensor) -> Tensor:
        return self._curve(log_snr) / self._curve.total

    def cdf(self, log_snr: Tensor) -> Tensor:
        share = (self._curve.below(log_snr) / self._curve.total).clamp_max(1.0)
        return torch.where(log_snr >= self.support[1], 1.0, share)

    def sf(self, log_snr: Tensor) -> Tensor:
        share = (self._curve.above(log_snr) / self._curve.total).clamp_max(1.0)
        return torch.where(log_snr <= self.support[0], 1.0, share)


@register(
    "spline",
    formula="monotone cubic (PCHIP) through the points, 0 outside them, divided by its integral",
    source="Fritsch and Butland 1984 for the curve; a density of your own",
    note="Points of (log-SNR, density) in any order, two or more. The curve stays between "
    "neighbouring points, hence positive.",
    example={"points": [[-6.0, 0.0], [-2.0, 1.0], [0.0, 0.4], [3.0, 0.8], [7.0, 0.0]]},
)
@dataclass(frozen=True, eq=False)
class Spline(CurveDensity):
    """A smooth density through ``points``, a list of [log_snr, density]: monotone between
    neighbours, hence nowhere negative, and 0 outside them.

    Raises:
        ValueError: fewer than two points, one that is no pair of finite numbers, a negative
            density, or two at one log-SNR.
    """

    points: list[list[float]] = checked(None)

    @cached_property
    def _curve(self) -> Curve:
        if isinstance(self.points, str) or not hasattr(self.points, "__len__"):
            raise ValueError(
                f"points={self.points!r} is not a list: write [[-4, 0], [0, 1], [4, 0]]."
            )
        pairs = [_number_list(f"points[{i}]", point) for i, point in enumerate(self.points)]
        for i, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ValueError(f"points[{i}]={pair!r} is not a pair [log_snr, density].")
        knots, values = _sorted([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        return monotone_cubic(knots, values)


@register(
    "tabulated",
    formula="straight lines from point to point, 0 outside them, divided by their integral",
    source="a density of your own, as two lists or as a CSV file",
    note="path names a file of two columns, log_snr and density. Saved configs hold its numbers.",
    example={"log_snr": [-6.0, -3.0, 0.0, 4.0, 7.0], "density": [0.0, 0.5, 1.0, 0.3, 0.0]},
)
@dataclass(frozen=True, eq=False)
class Tabulated(CurveDensity):
    """A density on a table of log-SNR, in any order: linear between neighbours, 0 outside.

    Args:
        log_snr: two or more numbers, all different.
        density: as many, 0 or more; the scale does not matter.
        path: a CSV file with both as columns, instead.

    Raises:
        ValueError: neither or both of the lists and the file, lists of different lengths, fewer
            than two points, a negative density, a log-SNR twice, or a file that cannot be read
            (the message names file and line).
    """

    log_snr: list[float] | None = checked(None, default=None)
    density: list[float] | None = checked(None, default=None)
    path: str | None = checked(None, default=None)

    @cached_property
    def _curve(self) -> Curve:
        log_snr, density = _columns(self.log_snr, self.density, self.path)
        return straight_lines(*_sorted(log_snr, density))

    @classmethod
    def portable(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        if parameters.get("path") is None:
            return parameters
        names = ("log_snr", "density", "path")
        log_snr, density = _columns(*(parameters.get(name) for name in names))
        return {"log_snr": log_snr, "density": density}


def _columns(log_snr: Any, density: Any, path: Any) -> tuple[list[float], list[float]]:
    lists = log_snr is not None and density is not None
    if path is not None and log_snr is None and density is None:
        if not isinstance(path, str):
            raise ValueError(f"path={path!r} is not the name of a file.")
        return _read_table(path)
    if path is not None or not lists:
        raise ValueError(
            "a table needs log_snr and density, two lists of numbers, or path, a CSV file with "
            "both as columns: give the one or the other."
        )
    return _number_list("log_snr", log_snr), _number_list("density", density)


def _sorted(log_snr: list[float], density: list[float]) -> tuple[Tensor, Tensor]:
    """Points in the order of their log-SNR."""
    if len(log_snr) != len(density):
        raise ValueError(
            f"log_snr has {len(log_snr)} numbers and density {len(density)}: give as many."
        )
    if len(log_snr) < 2:
        raise ValueError(f"{len(log_snr)} points make no density: give two or more.")
    for position, value in enumerate(density):
        if value < 0:
            raise ValueError(
                f"the density {value!r} at log-SNR {log_snr[position]!r} is negative: give 0 or "
                "more."
            )
    knots, order = torch.tensor(log_snr, dtype=torch.float64).sort()
    twice = knots[1:][knots.diff() <= 0]
    if len(twice):
        raise ValueError(f"log-SNR {float(twice[0])!r} is given twice: give each point once.")
    return knots, torch.tensor(density, dtype=torch.float64)[order]


def _number_list(name: str, value: Any) -> list[float]:
    """The finite numbers of a JSON list; ValueError for anything else."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(
            f"{name}={value!r} is not a list of numbers: write [-4, 0, 4] (of a tensor or an "
            "array, pass .tolist())."
        )
    for position, number in enumerate(value):
        finite(f"{name}[{position}]", number)
    return [float(number) for number in value]


# -- a density in a CSV file -----------------------------------------------------------------------


def _read_table(path: str) -> tuple[list[float], list[float]]:
    """(log-SNR, density) of a CSV file, with or without the header ``log_snr,density``.

    With a header the columns may stand in any order, among others; without one there are two.
    A ValueError names file and line.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path={path!r} cannot be read as a CSV file: {error}.") from error
    reader = csv.reader(text.splitlines(), skipinitialspace=True)
    lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not lines:
        raise ValueError(f"path={path!r} holds no numbers: {_FORM}.")
    line, header = lines[0]
    columns, width = (0, 1), 2
    if _number(header[0]) is None:
        names = [cell.strip().lower() for cell in header]
        for name in _COLUMNS:
            if name not in names:
                raise ValueError(
                    f"{path} line {line}: the header {','.join(header)!r} has no column {name!r}; "
                    f"{_FORM}."
                )
        columns, width = (names.index(_COLUMNS[0]), names.index(_COLUMNS[1])), None
        del lines[0]
    pairs = [_pair(path, line, row, columns, width) for line, row in lines]
    return [log_snr for log_snr, _ in pairs], [density for _, density in pairs]


def _pair(
    path: str, line: int, row: list[str], columns: tuple[int, int], width: int | None
) -> tuple[float, float]:
    if len(row) <= max(columns) or (width is not None and len(row) != width):
        raise ValueError(f"{path} line {line}: {','.join(row)!r} has {len(row)} columns; {_FORM}.")
    log_snr, density = (_number(row[column]) for column in columns)
    for column, number in zip(columns, (log_snr, density), strict=True):
        if number is None or not math.isfinite(number):
            raise ValueError(f"{path} line {line}: {row[column]!r} is not a finite number.")
    if log_snr is None or density is None or density < 0:
        raise ValueError(f"{path} line {line}: the density {density!r} is negative.")
    return log_snr, density


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
