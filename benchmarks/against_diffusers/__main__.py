"""Time the training scripts here and those of diffusers, in turn (A B A B ...), on a tiny model.

    python -m benchmarks.against_diffusers --official PATH [--scripts NAME ...] [--batch N ...]
        [--pairs 5] [--steps 12] [--threads 1] [--here FLAG ...] [--json FILE] [--check]

PATH is a checkout of diffusers. Both scripts of a pair have the same model, images and flags. A
figure is the ratio of medians over the runs: of a run, the median step after the first three, the
time from the command to the end of its first step, and the peak of its memory. A run apart from
those tells the phases of a step. With --check the exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.against_diffusers.bed import PAIRS, Bed, Failed

WARM_UP = 3  # steps
SIDES = {"here": False, "official": True}
# Ratios official / here that --check asks for: steps per second, memory, time to the first step.
BARS = {"steps per second": 1.05, "peak memory": 1.0, "time to first step": 1.0}
VERSIONS = ("torch", "diffusers", "accelerate", "transformers", "datasets", "diffusers_curriculum")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 where a bar is missed or a script fails."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        bed = Bed(Path(folder), args.official, args.threads, args.here)
        bed.make()
        try:
            rows = [*measured(bed, args)]
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print("\n".join(table(rows)))
    if args.json:
        about = {"threads": args.threads, "flags here": args.here, "pairs": args.pairs}
        versions = {name: metadata.version(name) for name in VERSIONS}
        document = {"settings": about, "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    missed = [f"{_name(row)}: {bar}" for row in rows for bar in _missed(row)]
    if args.check and missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return int(bool(args.check and missed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_diffusers")
    parser.add_argument("--official", type=Path, required=True, help="a checkout of diffusers")
    parser.add_argument("--scripts", nargs="+", choices=PAIRS, default=["text_to_image"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--pairs", type=int, default=5, help="runs of each, default %(default)s")
    parser.add_argument("--steps", type=int, default=12, help="of a run, default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch, default %(default)s")
    parser.add_argument(
        "--here", nargs=argparse.REMAINDER, default=[], help="more flags here, last"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--check", action="store_true", help="fail where a bar is missed")
    return parser


def measured(bed: Bed, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each script and batch."""
    total = len(args.scripts) * len(args.batch) * 2 * (args.pairs + 1)
    with tqdm(total=total, unit="run") as bar:
        for name in args.scripts:
            for batch in args.batch:
                yield {"script": name, "batch": batch, **_row(bed, name, batch, args, bar)}


def _row(bed: Bed, name: str, batch: int, args: argparse.Namespace, bar: Any) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.pairs):
        for side, official in SIDES.items():
            runs[side].append(figures(bed.run(PAIRS[name], official, batch, args.steps)))
            bar.update()
    phases = {}
    for side, official in SIDES.items():
        phases[side] = _phases(bed.run(PAIRS[name], official, batch, args.steps, PHASES="1"))
        bar.update()
    return {"runs": runs, "phases": phases, "ratios": ratios(runs)}


def figures(notes: dict[str, Any]) -> dict[str, float]:
    """What one run comes to: seconds of a step, seconds to the first one, bytes."""
    ends = notes["ends"]
    steps = [after - before for before, after in pairwise(ends)]
    pace = statistics.median(steps[WARM_UP - 1 :])
    return {"step": pace, "first_step": ends[0], "peak_bytes": notes["peak_bytes"]}


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Official / here, of the medians over the runs: above 1 is better here."""
    middle = {
        side: {k: statistics.median(run[k] for run in found) for k in found[0]}
        for side, found in runs.items()
    }
    names = dict(zip(BARS, ("step", "peak_bytes", "first_step"), strict=True))
    return {name: middle["official"][k] / middle["here"][k] for name, k in names.items()}


def _phases(notes: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of each phase of a step, and of what is left of it."""
    ends, parts = notes["ends"], notes["parts"][WARM_UP:]
    names = sorted({name for part in parts for name in part})
    found = {n: 1e3 * statistics.median(part.get(n, 0.0) for part in parts) for n in names}
    steps = [after - before for before, after in pairwise(ends)]
    whole = 1e3 * statistics.median(steps[WARM_UP - 1 :])
    return found | {"rest": whole - sum(found.values()), "whole": whole}


def _missed(row: dict[str, Any]) -> list[str]:
    return [
        f"{name} {row['ratios'][name]:.2f}" for name in BARS if row["ratios"][name] < BARS[name]
    ]


def _name(row: dict[str, Any]) -> str:
    return f"{row['script']}, batch {row['batch']}"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ratios, and the phases of a step in milliseconds."""
    lines = ["| script, batch | " + " | ".join(BARS) + " |", "| --- " * (len(BARS) + 1) + "|"]
    for row in rows:
        told = " | ".join(f"{row['ratios'][name]:.2f}x" for name in BARS)
        lines.append(f"| {_name(row)} | {told} |")
    for row in rows:
        for side, phases in row["phases"].items():
            told = ", ".join(f"{name} {value:.1f}" for name, value in phases.items())
            lines.append(f"{_name(row)}, {side}, ms: {told}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
