"""Rows, and the two forms in which they are told; imports nothing heavy."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
ROWS = (
    "R2",
    "R3",
    "R4",
    "R5",
    "R9",
    "R10",
    "R11",
    "R12",
    "R13",
    "R14",
    "R15",
    "R16",
    "R18",
    "R19",
    "R20",
    "R22",
    "R23",
    "R28",
)
SCRIPT = "examples/text_to_image/train_text_to_image.py"
METHOD = (
    "Each run is a process of its own, forked from one that has imported the libraries; on the CPU "
    "with one thread, a tiny Stable Diffusion pipeline (UNet, VAE, CLIP) and 18 images of 12 x 12, "
    "without network. The script is run without its check_min_version line; where torchvision is "
    "not installed, a stand-in of a few transforms takes its place."
)
COMMON = "--resolution 8 --train_batch_size 2 --seed 7 --learning_rate 1e-3"


@dataclass(frozen=True)
class Row:
    """What one fault did to the official script.

    Attributes:
        row: number of the reliability test, such as R16.
        what: the question.
        official: the measured answer in a few words.
        command: flags beyond ``COMMON``, and what was done to the run.
        numbers: what the answer was made from.
        ran: False if the measurement itself failed; ``official`` then says why.
    """

    row: str
    what: str
    official: str
    command: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    ran: bool = True


def order(rows: Iterable[Row]) -> list[Row]:
    """By number, rows of one number in the order in which they were measured."""
    return sorted(rows, key=lambda row: int(row.row[1:]))


def table(rows: Iterable[Row], widths: tuple[int, int, int] = (34, 66, 48)) -> str:
    """The rows as text, their cells wrapped."""
    lines = [_line(("row", "what", "the official script", "flags and fault"), widths)]
    lines.append(_line(("---", *("-" * width for width in widths)), widths))
    for row in order(rows):
        cells = (row.what, row.official, row.command)
        wrapped = [textwrap.wrap(c, w) or [""] for c, w in zip(cells, widths, strict=True)]
        for number in range(max(map(len, wrapped))):
            parts = [cell[number] if number < len(cell) else "" for cell in wrapped]
            lines.append(_line((row.row if number == 0 else "", *parts), widths))
    return "\n".join(lines)


def document(rows: Iterable[Row], facts: Mapping[str, Any]) -> str:
    """The rows as JSON: {"schema", "script", "method", "common_flags", **facts, "rows"}."""
    head = {"schema": SCHEMA, "script": SCRIPT, "method": METHOD, "common_flags": COMMON}
    told = {**head, **facts, "rows": [asdict(row) for row in order(rows)]}
    return json.dumps(told, indent=1, sort_keys=False) + "\n"


def rows_of(text: str) -> list[Row]:
    """The rows of a document."""
    return [Row(**row) for row in json.loads(text)["rows"]]


def _line(cells: tuple[str, ...], widths: tuple[int, ...]) -> str:
    return "  ".join(f"{c:{w}}" for c, w in zip(cells, (4, *widths), strict=True)).rstrip()
