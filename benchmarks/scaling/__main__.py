"""What the parts of this package cost as a run grows, and how.

    python -m benchmarks.scaling [--axes NAME ...] [--largest N] [--repeats 50] [--blocks 5]
                                 [--json PATH] [--check]

Each row is a part at several sizes: the batch, the resolution, the number of timesteps T, of
clusters, of rows of data, of ranks. Times are medians over blocks of the medians of a block, on one
CPU core; ``growth`` is the exponent of a straight line through the logarithms, "constant" up to
0.1, and ``at the end`` that of the two largest sizes. Memory is that of the arrays it keeps.

Two ranks are processes over gloo; 1,024 are simulated, one after the other: each draws its slots,
and together they must have drawn what one process draws. With ``--check`` the exit status is 1
unless they have, or if a draw or an observation grows with T or with the rows of data. (How long
they may take at all is the check of :mod:`benchmarks.sampler_overhead`.)
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from benchmarks.evidence.measuring import processor
from benchmarks.scaling.parts import SIZES, parts
from benchmarks.scaling.ranks import measure_ranks
from benchmarks.scaling.rows import CONSTANT, Row, measure


def run(args: argparse.Namespace) -> tuple[list[Row], dict[str, bool]]:
    """The rows of the axes asked for, and which numbers of ranks draw as one process does."""
    rows, agree = [], {}
    sizes = {name: [n for n in SIZES[name] if n <= args.largest] for name in args.axes}
    for part in parts():
        if sizes.get(part.axis):
            rows.append(measure(part, sizes[part.axis], args.repeats, args.blocks))
    if sizes.get("ranks"):
        row, agree = measure_ranks(sizes["ranks"], args.repeats, args.blocks)
        rows.append(row)
    return rows, agree


def faults(rows: Sequence[Row], agree: dict[str, bool]) -> list[str]:
    """What the check fails for, in words."""
    grown = [r for r in rows if r.must_be_constant and r.growth > CONSTANT]
    found = [f"{r.name} grows with the {r.axis} to the power {r.growth}" for r in grown]
    return found + [f"{n} ranks do not draw what one does" for n, ok in agree.items() if not ok]


def table(rows: Sequence[Row], agree: dict[str, bool]) -> str:
    """The rows in Markdown."""
    lines = ["| with | part | median time at each size | growth | at the end | memory at most |"]
    lines.append("|---|---|---|---|---|---|")
    for r in rows:
        times = zip(r.sizes, r.microseconds, strict=True)
        told = ", ".join(f"{size:,}: {_time(each)}" for size, each in times)
        growths = f"{_growth(r.growth)} | {_growth(r.at_the_end)}"
        lines.append(f"| {r.axis} | {r.name} | {told} | {growths} | {_bytes(max(r.memory))} |")
    lines += [f"\n{n} ranks draw what one does: {'yes' if ok else 'NO'}" for n, ok in agree.items()]
    return "\n".join(lines)


def _time(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f} us"
    milliseconds = microseconds / 1000
    return f"{milliseconds:.1f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def _growth(exponent: float) -> str:
    return "constant" if exponent <= CONSTANT else f"{exponent:.2f}"


def _bytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--axes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--largest", type=int, default=10**9, help="leave out larger sizes")
    parser.add_argument("--repeats", type=int, default=50, help="calls of each in a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--check", action="store_true", help="fail where something must not grow")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("diffusers_curriculum").setLevel(logging.ERROR)
    rows, agree = run(args)
    print(table(rows, agree))
    if args.json:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        figures = {"command": parser.prog, "repeats": args.repeats, "blocks": args.blocks}
        figures |= {"processor": processor(), "versions": versions, "ranks_agree": agree}
        figures |= {"rows": [row._asdict() for row in rows]}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    found = faults(rows, agree) if args.check else []
    for fault in found:
        print(f"failed: {fault}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
