"""Runs side by side, from the records that each leaves in its output folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_curriculum.analysis.page import Section, Table

RUN, LOSSES = "run.json", "loss_per_noise_level.json"
# Arguments that say where and how a run was started, and not what it is.
_PLACES = ("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
_PLACES += ("allow_config_change", "logging_dir", "hub_model_id")
_ABSENT = "-"
_FACTS = ("guidance_scale",)  # beside the metrics of a step
Metrics = Mapping[int, Mapping[str, float]]  # by step, then by name


@dataclass(frozen=True)
class RecordedRun:
    """What a run left.

    Attributes:
        folder: where it lies.
        sessions: of its run.json, one for each start of the program.
        metrics: those that were computed now and then, by the file without its ending.
        losses: edges of the bins of log-SNR, and the mean training loss in each bin of the
            "first_half" and "second_half"; empty for a run that has not ended.
    """

    folder: Path
    sessions: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Metrics]
    losses: Mapping[str, Sequence[float]]

    @property
    def settings(self) -> dict[str, Any]:
        """What the newest session was run with: flags, what was in effect, versions."""
        last = self.sessions[-1]
        own = {k: v for k, v in last.get("arguments", {}).items() if k not in _PLACES}
        return own | dict(last.get("in_effect", {})) | dict(last.get("versions", {}))

    @property
    def course(self) -> dict[str, Any]:
        """How it went."""
        last = self.sessions[-1]
        return {
            "steps": last.get("last_step"),
            "outcome": last.get("outcome"),
            "started": self.sessions[0].get("started"),
            "ended": last.get("ended"),
            "sessions": len(self.sessions),
        }


def read_run(folder: str | Path) -> RecordedRun:
    """The records in the output folder of a run.

    Raises:
        ValueError: there is no run.json, or a record that cannot be read.
    """
    root = Path(folder)
    if not (root / RUN).is_file():
        raise ValueError(f"{folder} holds no {RUN}: give the --output_dir of a training run.")
    sessions = _read(root / RUN, json.loads).get("sessions")
    if not isinstance(sessions, list) or not sessions:
        raise ValueError(f"{root / RUN} tells of no session.")
    files = sorted(root.glob("*.jsonl"))
    metrics = {path.stem: found for path in files if (found := _read(path, _metrics))}
    losses = _read(root / LOSSES, json.loads) if (root / LOSSES).is_file() else {}
    return RecordedRun(root, sessions, metrics, losses)


def named_runs(folders: Sequence[str]) -> dict[str, RecordedRun]:
    """Several runs by the names of their folders, or by as much of the paths as tells them apart.

    Raises:
        ValueError: fewer than two folders, one of them twice, or one that is no run.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len({*paths}) < max(2, len(paths)):
        raise ValueError(f"{len({*paths})} different runs: give two or more, each once.")
    common = Path(os.path.commonpath(paths))
    short = [path.name for path in paths]
    names = short if len({*short}) == len(short) else [str(p.relative_to(common)) for p in paths]
    return {name: read_run(path) for name, path in zip(names, paths, strict=True)}


def differences(runs: Mapping[str, RecordedRun]) -> dict[str, list[Any]]:
    """Settings by name that are not the same in all runs, with the value in each."""
    settings = [run.settings for run in runs.values()]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name) for each in settings] for name in names}
    return {name: row for name, row in values.items() if any(x != row[0] for x in row)}


def compared_step(runs: Mapping[str, RecordedRun], kind: str) -> int | None:
    """The last step at which all runs have metrics of one kind; None where there is none."""
    steps = [set(run.metrics.get(kind, {})) for run in runs.values()]
    return max(set.intersection(*steps), default=None)


def at_compared_step(runs: Mapping[str, RecordedRun], kind: str) -> dict[str, Mapping[str, float]]:
    """Metrics of one kind of each run at the step that all have, else at its own last one."""
    step = compared_step(runs, kind)
    found = {name: run.metrics.get(kind, {}) for name, run in runs.items()}
    return {n: m[max(m) if step is None else step] if m else {} for n, m in found.items()}


def kinds(runs: Mapping[str, RecordedRun]) -> list[str]:
    """The kinds of metrics that any run has."""
    return [*dict.fromkeys(kind for run in runs.values() for kind in run.metrics)]


def sections(runs: Mapping[str, RecordedRun]) -> list[Section]:
    """Tables with a column for each run."""
    course = {
        name: [r.course[name] for r in runs.values()] for name in next(iter(runs.values())).course
    }
    found = [Section("Runs", table=_table(runs, course))]
    found.append(Section("Settings that differ", table=_table(runs, differences(runs))))
    for kind in kinds(runs):
        step, told = compared_step(runs, kind), at_compared_step(runs, kind)
        where = "at the last step of each" if step is None else f"after {step} steps"
        names = dict.fromkeys(name for values in told.values() for name in values)
        rows = {name: [values.get(name) for values in told.values()] for name in names}
        found.append(Section(f"{_words(kind)} {where}", table=_table(runs, rows)))
    edges = [run.losses.get("edges") for run in runs.values()]
    if edges[0] and all(each == edges[0] for each in edges):
        lows = zip(edges[0], edges[0][1:], strict=False)
        bins = [f"log-SNR {low:.2f} to {high:.2f}" for low, high in lows]
        columns = [run.losses["second_half"] for run in runs.values()]
        rows = {name: [*row] for name, *row in zip(bins, *columns, strict=True)}
        title = "training loss per noise level, second half"
        found.append(Section(title, table=_table(runs, rows)))
    return found


def markdown(content: Sequence[Section]) -> str:
    """Tables as Markdown, which reads well in a terminal, too."""
    return "\n\n".join(line for section in content for line in _markdown(section))


def as_json(runs: Mapping[str, RecordedRun]) -> dict[str, Any]:
    """Everything that is compared, as plain data; what is not finite is null."""
    told = {
        name: {
            "folder": str(run.folder),
            **run.course,
            "settings": run.settings,
            "metrics": run.metrics,
            "losses": run.losses,
        }
        for name, run in runs.items()
    }
    return {"runs": told, "settings_that_differ": differences(runs)}


def _table(runs: Mapping[str, RecordedRun], rows: Mapping[str, Sequence[Any]]) -> Table:
    return Table(["", *runs], [[name, *map(_shown, row)] for name, row in rows.items()])


def _shown(value: Any) -> str:
    if value is None:
        return _ABSENT
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    table = section.table
    if table is None or not table.rows:
        yield "None."
        return
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (table.header, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    yield "\n".join(
        "| " + " | ".join(f"{x:<{w}}" for x, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _read(path: Path, parse: Any) -> Any:
    try:
        found = parse(path.read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no record of a run.")
    return found


def _metrics(text: str) -> dict[int, dict[str, float]]:
    """Of the lines of a file, those that have a step, and their finite numbers."""
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    return {int(line["step"]): _numbers(line) for line in lines if "step" in line}


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    found = {k: v for k, v in line.items() if isinstance(v, float) and math.isfinite(v)}
    return {name: value for name, value in found.items() if name not in _FACTS}
