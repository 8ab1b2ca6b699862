"""The changes to diffusers' official scripts: changes.json, applied and told.

`python -m tests.drop_in.changes` writes the generated part of docs/drop-in.md anew.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "drop-in.md"
BEGIN, END = "<!-- changes: generated -->\n", "<!-- changes: end -->\n"
FIXTURE: dict[str, Any] = json.loads((HERE / "changes.json").read_text("utf-8"))


class ChangeError(Exception):
    """A change does not fit its script."""


@dataclass(frozen=True)
class Edit:
    """Lines taken out and put in between others that stay."""

    before: list[str]
    remove: list[str]
    add: list[str]
    after: list[str]

    @classmethod
    def of(cls, lines: Mapping[str, list[str]], values: Mapping[str, str]) -> Edit:
        """The edit with its `<placeholders>` filled in."""
        return cls(**{part: [_filled(text, values) for text in lines[part]] for part in lines})

    @property
    def old(self) -> list[str]:
        """What the official script has."""
        return self.before + self.remove + self.after

    @property
    def new(self) -> list[str]:
        """What it has afterwards."""
        return self.before + self.add + self.after

    def diff(self) -> list[str]:
        """The lines of a unified diff."""
        marked = ((" ", self.before), ("-", self.remove), ("+", self.add), (" ", self.after))
        return [(mark + line).rstrip() for mark, lines in marked for line in lines]


def scripts() -> list[str]:
    """Every official script that a change is known for, below diffusers' examples/."""
    return [path for group in FIXTURE["groups"] for path in group["scripts"]]


def left_out() -> dict[str, str]:
    """Training scripts without a change, and why."""
    return {path: why for why, paths in FIXTURE["left_out"].items() for path in paths}


def edits_of(path: str) -> list[Edit]:
    """The edits of one script."""
    for group in FIXTURE["groups"]:
        if path in group["scripts"]:
            return [Edit.of(edit, group["scripts"][path]) for edit in group["edits"]]
    raise ChangeError(f"no change is known for {path}")


def changed(text: str, edits: list[Edit]) -> str:
    """The text with every edit made.

    Raises:
        ChangeError: an edit whose old lines do not stand in the text exactly once.
    """
    lines = text.splitlines()
    for edit in edits:
        at = list(_places(lines, edit.old))
        if len(at) != 1:
            raise ChangeError(f"{len(at)} places instead of one have the lines {edit.old}")
        lines[at[0] : at[0] + len(edit.old)] = edit.new
    return "\n".join(lines) + "\n"


def generated() -> str:
    """The part of docs/drop-in.md that follows from the fixture."""
    parts = [_told(group) for group in FIXTURE["groups"]]
    rows = [f"| `{path}` | {why} |" for path, why in sorted(left_out().items())]
    table = ["## Left out", "", "| script | why |", "|---|---|", *rows]
    return "\n\n".join([*parts, "\n".join(table)]) + "\n"


def written(document: str) -> str:
    """The document with its generated part made anew."""
    head, rest = document.split(BEGIN)
    return head + BEGIN + generated() + rest[rest.index(END) :]


def _places(lines: list[str], wanted: list[str]) -> Iterator[int]:
    last = len(lines) - len(wanted)
    return (i for i in range(last + 1) if lines[i : i + len(wanted)] == wanted)


def _filled(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"<{name}>", value)
    return text


def _told(group: Mapping[str, Any]) -> str:
    first = next(iter(group["scripts"]))
    hunks = [edit.diff() for edit in edits_of(first)]
    diff = ["```diff", f"--- a/examples/{first}", f"+++ b/examples/{first}"]
    for hunk in hunks:
        diff += ["@@", *hunk]
    rows = [f"| `{path}` | {_outcome(path)} |" for path in group["scripts"]]
    head = [f"## {group['title']}", "", textwrap.fill(group["text"], 100), ""]
    return "\n".join([*head, *diff, "```", "", "| script | outcome |", "|---|---|", *rows])


def _outcome(path: str) -> str:
    if path in FIXTURE["ran"]:
        return "ran two steps"
    return (
        f"applies; not run: {next(w for w, paths in FIXTURE['not_run'].items() if path in paths)}"
    )


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text("utf-8")), "utf-8")
