"""Measure the cells of a tier that are missing, or make the tables of what is there."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.evidence.cells import ConfigError, cells_of, chosen, names
from benchmarks.evidence.report import missing_figures, write_report
from benchmarks.evidence.results import Results
from benchmarks.evidence.running import (
    SPEEDS,
    Failed,
    cores,
    missing,
    one_thread,
    quiet,
    run,
    seconds_of,
)

ROOT = Path(__file__).parents[2]
OUTPUT_DIR = ROOT / "benchmarks" / "results" / "evidence"
RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if all is done, 1 if a cell failed or a figure has no source, 2 for a usage
    error."""
    args = _parser().parse_args(argv)
    try:
        return _report(args) if args.what == "report" else _measure(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("what", choices=[*names("tiers"), "report"], help="a tier, or report")
    parser.add_argument(
        "--tier",
        nargs="+",
        choices=names("tiers"),
        default=["small", "more", "rates", "aside"],
        help="tiers of the report, default small more rates aside",
    )
    parser.add_argument(
        "--device",
        choices=SPEEDS,
        default="cpu",
        help="default %(default)s; with cuda one process trains all seeds of a cell at once",
    )
    parser.add_argument("--processes", type=_count, help="default: one for each core, one for cuda")
    parser.add_argument("--only", metavar="GLOB", help="cells by name: digits/linear_v/*")
    parser.add_argument(
        "--held_out", action="store_true", help="measure the tasks that are kept aside too"
    )
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the report's text")
    parser.add_argument(
        "--check",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="write nothing; fail where a figure in RESULTS.md, or in these files, is not measured",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes: give 1 or more")
    return int(text)


def _measure(args: argparse.Namespace) -> int:
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA GPU here; leave it out for the CPU.")
    quiet() if gpu else one_thread()
    processes = args.processes or (1 if gpu else cores())
    cells = chosen(cells_of(args.what), args.only, args.held_out)
    left = missing(cells, args.output_dir, args.device)
    seconds = sum(seconds_of(cell, args.device) for cell in left)
    print(
        f"{len(cells)} cells, {len(cells) - len(left)} of them done; the others take some "
        f"{seconds:.0f} {'GPU' if gpu else 'core'} seconds, {seconds / 60 / processes:.0f} minutes "
        f"with {processes} processes."
    )
    run(left, args.output_dir, processes, args.device)
    return 0


def _report(args: argparse.Namespace) -> int:
    if args.check is not None:
        figures = json.loads((args.output_dir / "report.json").read_text("utf-8"))
        lost = [(f, n) for f in args.check or [args.results] for n in missing_figures(f, figures)]
        for file, number in lost:
            print(f"{file}: {number} is no figure of {args.output_dir / 'report.json'}")
        return int(bool(lost))
    planned = {cell.file(): cell for tier in args.tier for cell in cells_of(tier)}
    cells = chosen([*planned.values()], args.only, held_out=True)
    results = Results.of(cells, args.output_dir)
    if not results.all:
        raise ConfigError(
            f"{args.output_dir} has no result of {' or '.join(args.tier)}: python -m "
            f"benchmarks.evidence {args.tier[0]} makes them."
        )
    write_report(results, len(cells), args.tier, args.output_dir, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
