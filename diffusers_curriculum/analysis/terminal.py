"""Previews in the form that is asked for: text of at most 100 columns, a picture, or numbers."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusers_curriculum.analysis.preview import (
    QUANTILES,
    Preview,
    check_comparable,
    log_snr_histogram,
    quantiles,
)

TERMINAL = "terminal"
WIDTH = 100
COLUMNS = 80  # of a chart
_MARGIN = 18
_HEAT_ROWS = 16


class Characters(NamedTuple):
    """What charts are made of, the empty character first."""

    heights: str  # filling a character from the bottom
    shades: str


BLOCKS = Characters(
    " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", " \u00b7\u2591\u2592\u2593\u2588"
)
ASCII = Characters(" _.-=oO#", " .:-=+*#@")


def show(preview: Preview, where: str) -> str:
    """Write ``preview`` to the .json, .png or .svg file ``where`` and return a line on it and any
    warnings, or return the whole preview as text where that is "terminal".

    Raises:
        OSError: the file could not be written.
    """
    if where == TERMINAL:
        return render(preview, characters_for(sys.stdout.encoding))
    if where.endswith(".json"):
        Path(where).write_text(json.dumps(preview.to_json(), allow_nan=False) + "\n", "utf-8")
    else:
        # here, as matplotlib takes part of a second and the other forms do without it
        from diffusers_curriculum.analysis.plots import plot_preview, save_figure

        save_figure(plot_preview(preview), where)
    warnings = [f"warning: {warning}" for warning in preview.warnings]
    return "\n".join([f"{where}: {preview.title}", *warnings])


def characters_for(encoding: str | None) -> Characters:
    """Blocks where a terminal's ``encoding`` has them, else ASCII."""
    try:
        (BLOCKS.heights + BLOCKS.shades).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return BLOCKS


def render(preview: Preview, characters: Characters = BLOCKS) -> str:
    """The whole preview as lines of at most ``WIDTH`` characters."""
    parts = [
        _paragraph(preview.title),
        _paragraph(preview.schedule),
        _paragraph(preview.normalised),
        "",
        "density over log-SNR, noisiest left, each chart to its own peak (per unit of log-SNR)",
        *_density_charts(preview, characters),
        "",
        "draws of each timestep, cleanest left (times the share of uniform timesteps)",
        *_timestep_charts(preview, characters),
        "",
        *_share_table(preview, characters),
        "",
        *_heat_map(preview, characters),
        "",
        *_quantile_table(preview),
        "",
        *(_paragraph(warning, "warning: ") for warning in preview.warnings),
    ]
    return "\n".join(part.rstrip() for part in parts).rstrip()


def comparison_table(previews: Mapping[str, Preview]) -> str:
    """The samplers line by line: quantiles of log-SNR and of timesteps, of log-SNR under the loss
    weight where there is one, then how they are known and their warnings. A ValueError comes from
    :func:`preview.check_comparable`."""
    check_comparable(previews)
    name = max(14, *(len(key) + 2 for key in previews))
    head = "".join(f"{q:>9.0%}" for q in QUANTILES)
    columns = [
        (f"{'log-SNR':<{name}}{head}", "drawn", "log_snr", ".2f"),
        (f"{'timestep':<{name}}{head}", "drawn", "timestep", ".5g"),
    ]
    if any(preview.weights is not None for preview in previews.values()):
        title = f"{'log-SNR x weight':<{name}}{head[max(0, 16 - name) :]}"
        columns.append((title, "effective", "log_snr", ".2f"))
    lines = [next(iter(previews.values())).schedule, ""]
    for title, law, field, form in columns:
        rows = ((key, getattr(p.quantiles[law], field)) for key, p in previews.items())
        lines += [title, *(f"{key:<{name}}" + _numbers(row, form, 9) for key, row in rows), ""]
    for key, preview in previews.items():
        if preview.training.how:
            lines.append(textwrap.fill(f"{key}: {preview.training.how}", WIDTH))
        lines += [textwrap.fill(f"{key}: warning: {w}", WIDTH) for w in preview.warnings]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def chart(values: np.ndarray, peak: float, rows: int, characters: Characters) -> list[str]:
    """``rows`` lines of bars, one character for each of ``values``, the highest ``peak`` high."""
    steps = len(characters.heights) - 1
    filled = np.rint(np.clip(values / peak if peak > 0 else values, 0, 1) * rows * steps)
    lines = []
    for row in reversed(range(rows)):
        heights = np.clip(filled - row * steps, 0, steps).astype(int)
        lines.append("".join(characters.heights[height] for height in heights))
    return lines


def shade(values: np.ndarray, peak: float, characters: Characters) -> str:
    """One line, darker where ``values`` are higher; nothing only where they are 0.

    The root of the value is shown, so that tails do not vanish beside a peak.
    """
    last = len(characters.shades) - 1
    levels = np.ceil(np.sqrt(np.clip(values / peak, 0, 1)) * last)
    return "".join(characters.shades[int(level)] for level in levels)


def _density_charts(preview: Preview, characters: Characters) -> Iterator[str]:
    edges, densities = log_snr_histogram(preview.levels, np.stack(list(preview.laws.values())))
    for name, density in zip(preview.laws, densities, strict=True):
        yield from _labelled(name, density, characters)
    yield _axis(f"{edges[0]:.1f}", "log-SNR", f"{edges[-1]:.1f}")


def _timestep_charts(preview: Preview, characters: Characters) -> Iterator[str]:
    count = len(preview.mass)
    bounds = np.linspace(0, count, COLUMNS + 1)
    for name, mass in preview.laws.items():
        if name == "uniform timesteps":
            continue  # 1 everywhere
        below = np.interp(bounds, np.arange(count + 1), np.append(0, mass.cumsum()))
        yield from _labelled(name, np.diff(below) * COLUMNS, characters)
    yield _axis("0", "timestep index", str(count - 1))


def _labelled(name: str, values: np.ndarray, characters: Characters) -> list[str]:
    peak = values.max()
    labels = [name[: _MARGIN - 1], f"  peak {peak:.3g}", ""]
    lines = chart(values, peak, len(labels), characters)
    return [f"{label:<{_MARGIN}}{line}" for label, line in zip(labels, lines, strict=True)]


def _axis(left: str, middle: str, right: str) -> str:
    return " " * _MARGIN + left + middle.center(COLUMNS - len(left) - len(right)) + right


def _share_table(preview: Preview, characters: Characters) -> Iterator[str]:
    group = preview.grouped_by
    yield f"share of each {group}{'' if group == 'cluster' else ' of the schedule'}, cleanest first"
    yield (
        f"{group:>8}{'index':>12}{'log-SNR':>17}{'uniform':>9}{'drawn':>8}{'x weight':>10}"
        f"{'over run':>10}{'opens':>8}"
    )
    highest = max(share.drawn for share in preview.shares)
    full = characters.heights[-1]
    for number, share in enumerate(preview.shares, 1):
        opens = "never" if share.opens is None else f"{share.opens:.0f}"
        yield (
            f"{number:>8}{f'{share.first}..{share.last}':>12}"
            f"{f'{share.log_snr_low:.2f}..{share.log_snr_high:.2f}':>17}"
            f"{share.uniform:>9.2%}{share.drawn:>8.2%}{share.effective:>10.2%}"
            f"{share.over_run:>10.2%}{opens:>8}  {full * round(15 * share.drawn / highest)}"
        )


def _heat_map(preview: Preview, characters: Characters) -> Iterator[str]:
    training, (edges, density) = preview.training, preview.by_log_snr
    known = f" ({training.how})" if training.how else ""
    yield f"density from each step on, noisiest left{known}; blank: not drawn"
    rows = np.linspace(0, len(density) - 1, min(_HEAT_ROWS, len(density))).round().astype(int)
    for row in np.unique(rows):
        drawn = np.where(density[row] < 1e-9, 0, density[row])
        label = f"step {training.starts[row]:.0f}"
        yield f"{label:<{_MARGIN}}" + shade(drawn, density.max(), characters)
    yield _axis(f"{edges[0]:.1f}", "log-SNR", f"{edges[-1]:.1f}")


def _quantile_table(preview: Preview) -> Iterator[str]:
    yield f"{'quantiles':<{_MARGIN}}" + "".join(f"{q:>10.0%}" for q in QUANTILES)
    labels = {"drawn": "drawn", "effective": "drawn x weight", "uniform": "uniform"}
    for name, label in labels.items():
        if name == "effective" and label not in preview.laws:
            continue
        row = preview.quantiles[name]
        yield f"{label:<{_MARGIN}}" + _numbers(row.log_snr, ".2f") + "  log-SNR"
        yield " " * _MARGIN + _numbers(row.timestep, ".5g") + "  timestep"
    course = preview.training.course
    for step, mass in course.items() if len(course) > 1 else ():
        log_snr = quantiles(preview.levels, mass).log_snr
        yield f"{f'drawn, step {step}':<{_MARGIN}}" + _numbers(log_snr, ".2f") + "  log-SNR"


def _numbers(values: Sequence[float], form: str, width: int = 10) -> str:
    return "".join(f"{value:>z{width}{form}}" for value in values)


def _paragraph(text: str, mark: str = "") -> str:
    return textwrap.fill(mark + text, WIDTH, subsequent_indent=" " * len(mark))
