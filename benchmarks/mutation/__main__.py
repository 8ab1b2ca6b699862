"""Draw mutants, run their tests, print who survived."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.mutation import trial
from benchmarks.mutation.edits import Mutant
from benchmarks.mutation.modules import PACKAGE, modules, tests_of
from benchmarks.mutation.report import Result, document, equivalents, recorded, summary
from benchmarks.mutation.sample import drawn
from benchmarks.mutation.text import Text

ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if at least 90 % of the mutants are killed, 1 if not, 2 if nothing ran."""
    args = _parser().parse_args(argv)
    try:
        names = modules(ROOT, args.modules)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sources = {
        f"{PACKAGE}/{name}.py": (ROOT / PACKAGE / f"{name}.py").read_text() for name in names
    }
    sample, candidates = drawn(sources, args.sample, args.seed)
    before = recorded(args.again) if args.again else {}
    again = [m for m in sample if m.name not in before or before[m.name].verdict != "killed"]
    trial.warm_up()
    with tempfile.TemporaryDirectory() as folder:
        tried = dict(_tried(again, sources, Path(folder), args))
    results = [
        Result(m, tried.get(m) or before[m.name]) for m in sample if m in tried or m.name in before
    ]
    figures = summary(results, equivalents())
    print(figures.text())
    if args.json:
        args.json.write_text(
            document(results, figures, candidates, _command(args, len(results))), "utf-8"
        )
    return int(figures.share < 0.9)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutation")
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="densities, densities/laws ..."
    )
    parser.add_argument("--sample", type=int, default=200, help="mutants, default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write every mutant to this file")
    parser.add_argument(
        "--seconds",
        type=float,
        default=120,
        help="tests per mutant, default %(default)s; what is not killed by then counts as survivor",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no mutant after so many"
    )
    parser.add_argument(
        "--again", type=Path, metavar="JSON", help="take over what was killed there"
    )
    return parser


def _command(args: argparse.Namespace, count: int) -> str:
    parts = [f"--sample {count} --seed {args.seed} --seconds {args.seconds:g}", *args.modules]
    return " ".join(["python -m benchmarks.mutation", *parts])


def _tried(
    sample: Sequence[Mutant], sources: dict[str, str], folder: Path, args: argparse.Namespace
) -> list[Result]:
    place, note, end = folder / "tree", folder / "report.json", time.monotonic() + 60 * args.minutes
    trial.copy_tree(ROOT, place)
    _check_unchanged(place, note, {test for m in sample for test in _tests(m, place)})
    results: list[Result] = []
    for mutant in sample:
        if time.monotonic() > end:
            break
        with _put(place / mutant.path, Text(sources[mutant.path]).changed(mutant.edit)):
            outcome = trial.run(place, _tests(mutant, place), args.seconds, note)
        results.append(Result(mutant, outcome))
        print(f"{len(results)} {outcome.verdict} {outcome.seconds} s, {mutant.line} {mutant.name}")
        sys.stdout.flush()
    return _sound(results, place, note)


def _tests(mutant: Mutant, place: Path) -> list[str]:
    return tests_of(mutant.path.removeprefix(f"{PACKAGE}/").removesuffix(".py"), place)


def _check_unchanged(place: Path, note: Path, tests: Iterable[str]) -> None:
    """Raise RuntimeError unless the tests can be collected; compiles them by the way."""
    outcome = trial.run(place, sorted(tests), 0, note)
    if outcome.verdict != "unfinished":
        raise RuntimeError(f"the tests of the unchanged tree cannot be collected: {outcome.by}")


@contextmanager
def _put(file: Path, source: str) -> Iterator[None]:
    """A file with another content for a while; nothing compiled of either outlives it."""
    kept = file.read_text("utf-8")
    try:
        _write(file, source)
        yield
    finally:
        _write(file, kept)


def _write(file: Path, source: str) -> None:
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()
    file.write_text(source, "utf-8")


def _sound(results: Sequence[Result], place: Path, note: Path) -> list[Result]:
    """The results, without the kills by tests that fail on the unchanged tree as well."""
    tests = sorted({result.outcome.by for result in results if "::" in result.outcome.by})
    while tests:
        outcome = trial.run(place, tests, float("inf"), note)
        if outcome.verdict == "survived":
            break
        if outcome.by not in tests:
            raise RuntimeError(f"the unchanged tree under the tests that killed: {outcome.by}")
        print(f"fails on the unchanged tree too: {outcome.by}")
        tests.remove(outcome.by)
    return [
        r.without_kill() if "::" in r.outcome.by and r.outcome.by not in tests else r
        for r in results
    ]


if __name__ == "__main__":
    sys.exit(main())
