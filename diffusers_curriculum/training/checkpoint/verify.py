"""Which checkpoints of a run are whole, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_curriculum.training.errors import CheckpointError, UsageError
from diffusers_curriculum.training.storage.folders import checkpoints
from diffusers_curriculum.training.storage.manifest import find_faults, read_manifest

WIDTH = 100
_SHOWN = ("torch", "diffusers")  # versions with a column


@dataclass(frozen=True)
class CheckpointReport:
    """What is known of one checkpoint."""

    name: str  # its folder
    faults: tuple[str, ...]  # one line per damaged or missing file; none if it is whole
    step: int | None = None  # optimizer steps made; None if the manifest cannot be trusted
    sampler: str = "-"  # its timestep sampler in a few words, "-" if unknown
    versions: Mapping[str, str | None] | None = None  # of the libraries that wrote it

    @property
    def whole(self) -> bool:
        return not self.faults


def inspect_run(run_dir: str | Path) -> list[CheckpointReport]:
    """Read every byte of every checkpoint of a run, oldest first; nothing is changed or
    unpickled."""
    root = Path(run_dir)
    found = checkpoints(root)
    if not found:
        problem = "holds no checkpoint-N folders" if root.is_dir() else "is not a folder"
        raise UsageError(f"{str(root)!r} {problem}: give the --output_dir of a training run.")
    return [_inspect(folder) for folder in found]


def report_table(reports: Sequence[CheckpointReport]) -> str:
    """One line per checkpoint, the faults of damaged ones below it, then what can be resumed.

    The lines of the table have at most 100 columns; what is too long is cut, faults are not.
    """
    head = ("checkpoint", "state", "step", "sampler", *_SHOWN)
    rows = [head, *map(_cells, reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    widths[3] -= max(0, sum(widths) + 2 * (len(widths) - 1) - WIDTH)  # the sampler gives way
    widths[3] = max(widths[3], len("sampler"))
    lines = [_line(row, widths) for row in rows]
    lines += [f"{r.name}: {fault}" for r in reports for fault in r.faults]
    return "\n".join([*lines, _conclusion(reports)])


def _inspect(folder: Path) -> CheckpointReport:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return CheckpointReport(folder.name, (str(error),))
    from diffusers_curriculum.samplers import describe_config

    return CheckpointReport(
        name=folder.name,
        faults=tuple(find_faults(folder, manifest)),
        step=manifest["step"],
        sampler=describe_config(manifest.get("facts", {}).get("sampler")),
        versions=manifest.get("versions"),
    )


def _cells(report: CheckpointReport) -> tuple[str, ...]:
    told = report.versions or {}
    state = "whole" if report.whole else "damaged"
    step = "-" if report.step is None else str(report.step)
    versions = (told.get(name) or "-" for name in _SHOWN)
    return (report.name, state, step, report.sampler, *versions)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    cut = (c if len(c) <= w else c[: w - 3] + "..." for c, w in zip(cells, widths, strict=True))
    padded = (cell.ljust(width) for cell, width in zip(cut, widths, strict=True))
    return "  ".join(padded).rstrip()


def _conclusion(reports: Sequence[CheckpointReport]) -> str:
    whole = [report.name for report in reports if report.whole]
    counted = f"{len(whole)} of {len(reports)} checkpoints whole"
    if reports[-1].whole:
        return f"{counted}; the newest is whole."
    resumes = f"latest would resume from {whole[-1]}" if whole else "none can be resumed"
    return f"{counted}; THE NEWEST IS DAMAGED, {resumes}."
