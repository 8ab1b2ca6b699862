"""A density in a CSV file: two columns of numbers, log_snr and density."""

from __future__ import annotations

import csv
import math
from pathlib import Path

COLUMNS = ("log_snr", "density")
_FORM = "write two columns, log_snr and density, with a comma between them"


def read_table(path: str) -> tuple[list[float], list[float]]:
    """(log-SNR, density) of a CSV file, with or without the header ``log_snr,density``.

    With a header the columns may stand in any order, among others; without one there are two.

    Raises:
        ValueError: the file cannot be read, or a line is not of this form (the message names file
            and line).
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path={path!r} cannot be read as a CSV file: {error}.") from error
    reader = csv.reader(text.splitlines(), skipinitialspace=True)
    lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not lines:
        raise ValueError(f"path={path!r} holds no numbers: {_FORM}.")
    columns, lines = _header(path, *lines[0], lines)
    width = None if columns else 2
    pairs = [_pair(path, line, row, columns or (0, 1), width) for line, row in lines]
    return [log_snr for log_snr, _ in pairs], [density for _, density in pairs]


def _header(
    path: str, line: int, row: list[str], lines: list[tuple[int, list[str]]]
) -> tuple[tuple[int, int] | None, list[tuple[int, list[str]]]]:
    """Positions of the two columns, None without a header, and the lines that follow it."""
    if _number(row[0]) is not None:
        return None, lines
    names = [cell.strip().lower() for cell in row]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"{path} line {line}: the header {','.join(row)!r} has no column {missing[0]!r}; "
            f"{_FORM}."
        )
    return (names.index(COLUMNS[0]), names.index(COLUMNS[1])), lines[1:]


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
