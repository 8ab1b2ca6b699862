"""Adds the draws of new catalogue entries to the golden file, and changes no existing ones.

    python -m tests.golden.record

An entry that is there already is compared: if its draws are others, nothing is written and the exit
status is 1. Numbers that are to change on purpose need a heading of their own in CHANGELOG.md
("Numbers that differ"), and their old entries deleted from ``draws.json`` by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.golden.configurations import Draws, configurations, draw

FILE = Path(__file__).with_name("draws.json")
WHAT_TO_DO = (
    "a change of numbers needs a changelog heading: users' saved runs would draw other timesteps. "
    "If it is meant, say so in CHANGELOG.md under 'Numbers that differ', delete the old entry from "
    "tests/golden/draws.json and run: python -m tests.golden.record"
)


def read(path: Path = FILE) -> dict[str, Draws]:
    """The recorded draws by configuration; none if there is no file."""
    if not path.exists():
        return {}
    return {name: Draws(**entry) for name, entry in json.loads(path.read_text("utf-8")).items()}


def write(recorded: dict[str, Draws], path: Path) -> None:
    """Write one line per configuration, sorted by name."""
    lines = [f"{json.dumps(n)}: {json.dumps(recorded[n]._asdict())}" for n in sorted(recorded)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def record(drawn: dict[str, Draws], path: Path) -> tuple[list[str], list[str]]:
    """(new, changed) names; the new ones are written unless any is changed."""
    recorded = read(path)
    new = sorted(drawn.keys() - recorded.keys())
    changed = sorted(n for n in drawn.keys() & recorded.keys() if drawn[n] != recorded[n])
    if new and not changed:
        write(recorded | {name: drawn[name] for name in new}, path)
    return new, changed


def main() -> int:
    new, changed = record({name: draw(case) for name, case in configurations().items()}, FILE)
    for name in changed:
        print(f"changed, nothing written: {name}")
    if changed:
        print(WHAT_TO_DO)
        return 1
    print(f"{len(new)} new: {', '.join(new) or 'nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
