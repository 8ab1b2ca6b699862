"""The report as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LEFT_OUT = "left out"


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report in Markdown."""
    parts = report["parts"]
    smoke = " (smoke test: the numbers mean nothing)" if report["smoke"] else ""
    lines = [f"# {report['device_name']}{smoke}", "", _versions(parts), ""]
    lines += ["| part | status | seconds |", "|---|---|---|"]
    lines += [
        f"| {k} | {v['status']} | {v['seconds']} of {v['limit_seconds']:.0f} |"
        for k, v in parts.items()
    ]
    for name, part in parts.items():
        if name != "environment":
            lines += ["", f"## {name}", "", *_table(part)]
    return "\n".join(lines) + "\n"


def _versions(parts: Mapping[str, Any]) -> str:
    rows = parts.get("environment", {}).get("rows", {})
    facts = {**rows.get("versions", {}), **rows.get("device", {})}
    return ", ".join(f"{k} {v}" for k, v in facts.items() if k not in ("status", "seconds"))


def _table(part: Mapping[str, Any]) -> Iterator[str]:
    yield "| row | status | found |"
    yield "|---|---|---|"
    for name, row in part["rows"].items():
        text = row["error"] if "error" in row else ", ".join(_facts(row))
        yield f"| {name} | {row['status']} | {_cell(text)} |"
    if part["error"]:
        yield f"| (the part) | {part['status']} | {_cell(part['error'])} |"


def _facts(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if name in ("status", "seconds", "ratio_of_pairs", "stack"):
            continue
        if isinstance(value, Mapping):
            yield f"{name}: {_measured(value)}"
        elif isinstance(value, list):
            texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
            yield f"{name} {' '.join(texts)}"
        else:
            yield f"{name} {value}"


def _measured(value: Mapping[str, Any]) -> str:
    if "images_per_second" not in value:
        return ", ".join(f"{k} {v} us" for k, v in value.items())
    windows, peak = value["windows"], value["peak_memory_gib"]
    memory = "" if peak is None else f", {peak} GiB"
    spread = f"{min(windows)} to {max(windows)} in {len(windows)} windows"
    return f"{value['images_per_second']} images/s ({spread}){memory}"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "/")[:400]
