"""Measure rows: python -m benchmarks.official_faults.worker FOLDER [ROW ...]"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.official_faults import checkpoints, endings, numbers, reading, safety
from benchmarks.official_faults.report import Row, document
from benchmarks.official_faults.workplace import Workplace, hide_the_stand_in

Measure = Callable[[Workplace], Iterator[Row]]
MEASURES: dict[str, Measure] = {
    **numbers.MEASURES,
    **checkpoints.MEASURES,
    **reading.MEASURES,
    **endings.MEASURES,
    **safety.MEASURES,
}


def measured(name: str, place: Workplace) -> list[Row]:
    """The rows of one number; a measurement that fails is a row that says so."""
    rows: list[Row] = []
    try:
        rows.extend(MEASURES[name](place))
    except Exception as error:
        why = f"could not be measured: {type(error).__name__}: {error}"
        rows.append(Row(name, MEASURES[name].__doc__ or "", why, "", ran=False))
    return rows


def main(folder: str, *only: str) -> None:
    """Write the rows to FOLDER/rows.json."""
    hide_the_stand_in()
    place, rows = Workplace(Path(folder)), []
    for name in only or MEASURES:
        start = time.monotonic()
        rows += measured(name, place)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    (Path(folder) / "rows.json").write_text(document(rows, {}), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
