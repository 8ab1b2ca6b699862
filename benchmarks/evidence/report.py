"""Tables, pictures and words of what was measured; every figure of them is in report.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.cells import config
from benchmarks.evidence.claims import Verdict, judged
from benchmarks.evidence.curves import Interval
from benchmarks.evidence.rates import rates_table
from benchmarks.evidence.results import (
    REFERENCE,
    Result,
    Results,
    over_tasks,
    quality_ratios,
    step_ratios,
    time_ratios,
)
from benchmarks.evidence.tables import plus_minus, table

NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?:\.\d+)*(?![\w.]*\w)")


def write_report(
    results: Results, planned: int, tiers: Sequence[str], output_dir: Path, file: Path
) -> None:
    """RESULTS.md, report.json with every figure that stands there, and the pictures."""
    from benchmarks.evidence.pictures import draw

    pictures = {pair: draw(results, pair, output_dir) for pair in results.pairs()}
    verdicts, found = judged(results), summary(results)
    text = "\n".join(
        [
            *_head(results, planned, tiers),
            *in_words(found),
            *_summary_table(found),
            *_claims_table(verdicts),
            *rates_table(results),
            *_pairs(results, pictures, file.parent),
        ]
    )
    figures = {"cells": [_facts(result) for result in results.all], "text": NUMBER.findall(text)}
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "report.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    file.write_text(text.rstrip("\n") + "\n", "utf-8")


def missing_figures(file: Path, figures: dict[str, Any]) -> list[str]:
    """Numbers with a decimal point in a document that are no figures of the report; numbers of
    papers and versions do not count."""
    text = re.sub(r"arXiv [\d.]+|`[^`\n]*`", "", file.read_text("utf-8"))
    known = set(figures["text"])
    return [number for number in NUMBER.findall(text) if number not in known]


def _facts(result: Result) -> dict[str, Any]:
    """The figures of a cell, in full."""
    return {
        "name": result.name,
        "file": result.document["config"],
        "final": {m: result.values(m) for m in result.checkpoints[-1]["metrics"]},
    }


# -- what follows ----------------------------------------------------------------------------------


def summary(results: Results) -> dict[str, dict[str, Interval]]:
    """For each method, ratios to uniform draws as geometric means, over the tasks it was designed
    on and over those kept aside: steps, also by samples alone and against the best static law,
    processor time, final quality."""
    methods = sorted({r.method for r in results.all} - {REFERENCE})
    return {method: _of_method(results, method) for method in methods}


def _of_method(results: Results, method: str) -> dict[str, Interval]:
    columns: dict[str, list[Sequence[float]]] = {}
    for pair in results.pairs():
        reference, result = results.find(*pair, REFERENCE), results.find(*pair, method)
        if reference is None or result is None:
            continue
        kept = " (kept aside)" if result.held_out else ""
        ratios = step_ratios(reference, result)
        by_samples = step_ratios(reference, result, result.by_samples)
        columns.setdefault(f"steps{kept}", []).append(ratios)
        columns.setdefault(f"samples{kept}", []).append(by_samples)
        columns.setdefault(f"time{kept}", []).append(time_ratios(reference, result))
        columns.setdefault(f"quality{kept}", []).append(quality_ratios(reference, result))
        best = best_static(results, pair)
        if best:
            against = [own / other for own, other in zip(ratios, best, strict=False)]
            columns.setdefault(f"best{kept}", []).append(against)
    return {name: over_tasks(groups) for name, groups in columns.items()} | {
        f"{name} tasks": Interval(len(groups), 0, 0) for name, groups in columns.items()
    }


def best_static(results: Results, pair: tuple[str, str]) -> Sequence[float]:
    """Step ratios of the law of a density that saves most, in hindsight; empty where none but
    uniform draws was measured."""
    reference = results.find(*pair, REFERENCE)
    found = [results.find(*pair, r.method) for r in results.of_pair(*pair) if _static(r)]
    if all(result is reference for result in found):
        return ()
    rows = [step_ratios(reference, r) for r in found if reference is not None and r is not None]
    return max(rows, key=lambda ratios: over_tasks([ratios]).value, default=())


def _static(result: Result) -> bool:
    told = result.document["config"]["method"]
    return set(told) <= {"sampler", "about"} and "density" in told["sampler"]


# -- as text ---------------------------------------------------------------------------------------


def _head(results: Results, planned: int, tiers: Sequence[str]) -> list[str]:
    made = sorted({json.dumps(r.document["made_with"], sort_keys=True) for r in results.all})
    told = [", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in made]
    seconds = sum(r.checkpoints[-1]["seconds"] for r in results.all)
    return [
        "# Does it train better?",
        "",
        "Written by `python -m benchmarks.evidence report` from the JSON of",
        f"{' and '.join(f'`python -m benchmarks.evidence {tier} --held_out`' for tier in tiers)} "
        "in `benchmarks/results/evidence`: "
        f"{len(results.all)} of {planned} "
        f"cells, {seconds / 60:.1f} minutes of one core in training,",
        *(f"with {text}." for text in told),
        "",
        "**Steps saved** is uniform's steps to its final quality / the method's steps to the same",
        "(where the method never gets there: uniform's steps to the method's final quality / the",
        "method's). **Time** counts the law's own cost. All ratios: above 1 is better than uniform",
        "draws; geometric means with 95 % bootstrap intervals over seeds, paired by seed. Quality",
        "is the Frechet distance in a classifier's features, of mixtures the exact excess loss.",
        "**On** counts tasks x targets: what was measured on one is not comparable with the rest.",
        "**By samples alone** takes the sliced Wasserstein distance of samples for mixtures, which",
        "does not fall below that of the mixture's own samples.",
        "",
    ]


def in_words(found: dict[str, dict[str, Interval]]) -> list[str]:
    """What helped, what did not, and what cannot be told, each on so many tasks and targets."""
    steps = {method: row["steps"] for method, row in found.items() if "steps" in row}
    told = {m: f"{m} {steps[m]} on {found[m]['steps tasks'].value:.0f}" for m in steps}
    better = [told[m] for m in _by_value(steps) if steps[m].low > 1]
    worse = [told[m] for m in reversed(_by_value(steps)) if steps[m].high < 1]
    even = [told[m] for m in _by_value(steps) if steps[m].low <= 1 <= steps[m].high]
    broken = [m for m, each in steps.items() if math.isnan(each.low)]
    texts = [("Saved steps", better), ("Cost steps", worse), ("No difference beyond noise", even)]
    texts += [("No interval, as a seed's samples were not finite", broken)] if broken else []
    return [f"- {what}: {', '.join(names) or 'nothing'}." for what, names in texts] + [""]


def _by_value(steps: dict[str, Interval]) -> list[str]:
    return sorted(steps, key=lambda method: -steps[method].value)


def _summary_table(found: dict[str, dict[str, Interval]]) -> list[str]:
    own = {"steps": "steps saved", "samples": "steps saved, by samples alone"}
    own |= {"time": "time saved", "quality": "final quality", "best": "steps, best static law = 1"}
    aside = {f"{c} (kept aside)": f"{own[c]}, tasks kept aside" for c in [*own][:3]}
    columns = own | aside
    order = sorted(found, key=lambda m: -found[m].get("steps", Interval(0, 0, 0)).value)
    rows = [
        [method, *(str(found[method].get(c, "-")) for c in columns), _count(found[method])]
        for method in order
    ]
    heads = ["method", *columns.values(), "tasks x targets"]
    return ["## Over all tasks", "", *table(heads, rows), ""]


def _count(row: dict[str, Interval]) -> str:
    own, aside = (row.get(f"steps{kept} tasks") for kept in ("", " (kept aside)"))
    return f"{own.value if own else 0:.0f} + {aside.value if aside else 0:.0f}"


def _claims_table(verdicts: Iterable[Verdict]) -> list[str]:
    rows = []
    for verdict in verdicts:
        figures = [
            f"{c.better} / {c.worse}, {c.statistic} ({c.on}): {c.ratio or 'not measured'}"
            for c in verdict.comparisons
        ]
        told = "; ".join([*figures, *filter(None, [verdict.about])])
        rows.append([verdict.claim, verdict.source, told, f"**{verdict.verdict}**"])
    return [
        "## Claims of papers",
        "",
        "A claim is reproduced where the interval of every comparison lies above 1.",
        "",
        *table(["claim", "source", "comparison", "verdict"], rows),
        "",
    ]


def _pairs(results: Results, pictures: dict[tuple[str, str], Path], place: Path) -> list[str]:
    lines: list[str] = []
    for aside in (False, True):
        pairs = [p for p in results.pairs() if config("tasks", p[0])["held_out"] == aside]
        lines += ["## Tasks kept aside", ""] if aside and pairs else []
        for pair in pairs:
            found = results.of_pair(*pair)
            lines += [f"### {pair[0]}, {pair[1]}", "", *_pair_table(found), ""]
            lines += ["At the end:", "", *_final_table(found), ""]
            if pictures[pair].is_relative_to(place):
                lines += [f"![{' '.join(pair)}]({pictures[pair].relative_to(place)})", ""]
    return lines


def _pair_table(found: Sequence[Result]) -> list[str]:
    reference = next((r for r in found if r.method == REFERENCE), None)
    measures = [*dict.fromkeys([found[0].quality, found[0].by_samples])]
    steps = sorted({step for r in found for step in r.steps})
    rows = []
    for result in found:
        means = [
            plus_minus(result.mean(result.quality, s)) if s in result.steps else "-" for s in steps
        ]
        ratios = _ratios(reference, result, measures)
        rows.append([_name(result), *means, *ratios, f"{100 * result.law_share:.1f} %"])
    heads = [f"{measures[0]} after {steps[0]}", *map(str, steps[1:])]
    saved = ["steps saved", *(f"steps saved, by {measure}" for measure in measures[1:])]
    return table(["method", *heads, *saved, "final quality", "law's share of time"], rows)


def _ratios(reference: Result | None, result: Result, measures: Sequence[str]) -> list[str]:
    """Steps saved by each measure, and the final quality."""
    if reference is None or result.name == reference.name:
        return ["-"] * (len(measures) + 1)
    groups = [step_ratios(reference, result, measure) for measure in measures]
    return [str(over_tasks([group])) for group in [*groups, quality_ratios(reference, result)]]


def _final_table(found: Sequence[Result]) -> list[str]:
    """All measures, and under other guidance and numbers of sampling steps the one that decides."""
    quality = found[0].quality
    names = {m: None for r in found for m in r.checkpoints[-1]["metrics"] if m != quality}
    shown = [m for m in names if "," not in m or m.startswith(quality)]
    rows = []
    for result in found:
        known = result.checkpoints[-1]["metrics"]
        rows.append([_name(result), *(_told(result, m) if m in known else "-" for m in shown)])
    return table(["method", *shown], rows)


def _told(result: Result, metric: str) -> str:
    return plus_minus(result.mean(metric))


def _name(result: Result) -> str:
    return result.name.split("/", 2)[2]
