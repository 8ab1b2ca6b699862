"""What the mutants say about the tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.mutation.edits import Mutant
from benchmarks.mutation.trial import Outcome

# Mutant.name -> why no behaviour that is promised changes; kept by hand.
EQUIVALENTS = Path(__file__).with_name("equivalents.json")


class Result(NamedTuple):
    """A mutant and what its tests did."""

    mutant: Mutant
    outcome: Outcome

    @property
    def killed(self) -> bool:
        return self.outcome.verdict == "killed"

    def without_kill(self) -> Result:
        """The same with a kill that does not count."""
        return self._replace(outcome=self.outcome._replace(verdict="survived", by=""))


class Figures(NamedTuple):
    """Counts of a run; ``survivors`` are those that are not known to be equivalent."""

    total: int
    killed: int
    equivalent: dict[str, str]
    survivors: list[Result]

    @property
    def share(self) -> float:
        """Killed among all mutants, equivalent ones included."""
        return self.killed / self.total if self.total else 0.0

    @property
    def share_of_faults(self) -> float:
        """Killed among those that are not equivalent."""
        faults = self.total - len(self.equivalent)
        return self.killed / faults if faults else 0.0

    def text(self) -> str:
        """Survivors, one a line, and the figures."""
        lines = [
            f"{r.mutant.path}:{r.mutant.line} {r.outcome.verdict} ({r.mutant.kind})\n"
            f"    {r.mutant.before}\n    {r.mutant.after}"
            for r in self.survivors
        ]
        figures = f"{self.killed} of {self.total} killed: {100 * self.share:.1f} %"
        without = f"{100 * self.share_of_faults:.1f} % without {len(self.equivalent)} equivalent"
        return "\n".join([*lines, f"{figures}; {without}"])


def equivalents(path: Path = EQUIVALENTS) -> dict[str, str]:
    """Reasons by the name of the mutant."""
    return json.loads(path.read_text("utf-8"))


def recorded(path: Path) -> dict[str, Outcome]:
    """What an earlier run says, by the name of the mutant; the worst of several of one name."""
    rows = json.loads(path.read_text("utf-8"))["mutants"]
    outcomes: dict[str, Outcome] = {}
    for row in sorted(rows, key=lambda row: row["verdict"] != "killed"):
        name = f"{row['file']}: {row['before']} -> {row['after']}"
        outcomes[name] = Outcome(row["verdict"], row["by"], row["seconds"])
    return outcomes


def summary(results: Sequence[Result], known: Mapping[str, str]) -> Figures:
    """The figures of a run, given the equivalent mutants that are known."""
    alive = [result for result in results if not result.killed]
    return Figures(
        total=len(results),
        killed=len(results) - len(alive),
        equivalent={r.mutant.name: known[r.mutant.name] for r in alive if r.mutant.name in known},
        survivors=[result for result in alive if result.mutant.name not in known],
    )


def document(results: Sequence[Result], figures: Figures, candidates: int, command: str) -> str:
    """The run as JSON: figures first, then every mutant on a line of its own."""
    head = {
        "command": command,
        "candidates": candidates,
        "total": figures.total,
        "killed": figures.killed,
        "share": round(figures.share, 4),
        "share_without_equivalent": round(figures.share_of_faults, 4),
        "equivalent": figures.equivalent,
    }
    rows = ",\n  ".join(json.dumps(_row(result)) for result in results)
    return json.dumps(head, indent=1)[:-2] + f',\n "mutants": [\n  {rows}\n ]\n}}\n'


def _row(result: Result) -> dict[str, object]:
    mutant, outcome = result
    place = {"file": mutant.path, "line": mutant.line, "kind": mutant.kind}
    return place | {"before": mutant.before, "after": mutant.after} | outcome._asdict()
