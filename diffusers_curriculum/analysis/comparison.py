"""Several samplers in one picture and one table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from diffusers_curriculum.analysis.preview import QUANTILES, Preview

# The table does without matplotlib, which takes part of a second.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# distinct in print and to colour-blind readers (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MOST = len(COLOURS)


def check_comparable(previews: Mapping[str, Preview]) -> None:
    """Refuse what one picture cannot hold.

    Raises:
        ValueError: fewer than two or more than ``MOST`` samplers, or different schedules.
    """
    if not 2 <= len(previews) <= MOST:
        raise ValueError(
            f"{len(previews)} different samplers are given: compare from 2 to {MOST} of them."
        )
    schedules = {preview.schedule for preview in previews.values()}
    if len(schedules) > 1:
        raise ValueError(
            f"the samplers are for different schedules ({'; '.join(sorted(schedules))}): compare "
            "samplers of one schedule."
        )


def plot_comparison(previews: Mapping[str, Preview]) -> Figure:
    """Overlay what several samplers train on: density over log-SNR and draws of each timestep;
    where there are loss weights, a second row shows mass x weight.

    Raises:
        ValueError: see :func:`check_comparable`.
    """
    from matplotlib.figure import Figure

    check_comparable(previews)
    weighted = any(preview.weights is not None for preview in previews.values())
    figure = Figure(figsize=(11, 7.5 if weighted else 4.2), layout="constrained")
    figure.suptitle(next(iter(previews.values())).schedule, fontsize=11)
    axes = figure.subplots(1 + weighted, 2, squeeze=False)
    _overlay(axes[0], previews, "mass", "drawn")
    if weighted:
        _overlay(axes[1], previews, "effective", "drawn x weight")
    return figure


def comparison_table(previews: Mapping[str, Preview], width: int = 100) -> str:
    """The samplers line by line: quantiles of log-SNR and of timesteps, then their warnings.

    Raises:
        ValueError: see :func:`check_comparable`.
    """
    check_comparable(previews)
    name = max(14, *(len(key) + 2 for key in previews))
    head = "".join(f"{q:>9.0%}" for q in QUANTILES)
    lines = [next(iter(previews.values())).schedule, ""]
    for title, field, form in (("log-SNR", "log_snr", "z.2f"), ("timestep", "timestep", "z.5g")):
        lines.append(f"{title:<{name}}{head}")
        for key, preview in previews.items():
            values = getattr(preview.quantiles["drawn"], field)
            lines.append(f"{key:<{name}}" + "".join(f"{v:>{form[0]}9{form[1:]}}" for v in values))
        lines.append("")
    lines += _weighted(previews, name, head)
    for key, preview in previews.items():
        lines += [textwrap.fill(f"{key}: warning: {w}", width) for w in preview.warnings]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _weighted(previews: Mapping[str, Preview], name: int, head: str) -> Iterator[str]:
    """Quantiles of mass x weight, where there is a weight."""
    if not any(preview.weights is not None for preview in previews.values()):
        return
    yield f"{'log-SNR x weight':<{name}}{head[max(0, 16 - name) :]}"
    for key, preview in previews.items():
        values = preview.quantiles["effective"].log_snr
        yield f"{key:<{name}}" + "".join(f"{v:>z9.2f}" for v in values)
    yield ""


def _overlay(axes: np.ndarray, previews: Mapping[str, Preview], field: str, what: str) -> None:
    from diffusers_curriculum.analysis.plots import GREY, density_line

    left: Axes = axes[0]
    right: Axes = axes[1]
    first = next(iter(previews.values()))
    left.plot(*density_line(first, first.uniform), color=GREY, linestyle="--", linewidth=1)
    right.axhline(1, color=GREY, linestyle="--", linewidth=1, label="uniform timesteps")
    for (name, preview), colour in zip(previews.items(), COLOURS, strict=False):
        mass = getattr(preview, field)
        left.plot(*density_line(preview, mass), color=colour, label=name, linewidth=1.8)
        right.plot(mass * len(mass), color=colour, label=name, linewidth=1.8)
    left.set(xlabel="log-SNR (higher = cleaner)", ylabel="per unit of log-SNR")
    right.set(xlabel="timestep index (0 = cleanest)", ylabel="times the uniform share")
    left.set_title(f"{what}: density over log-SNR")
    right.set_title(f"{what}: each timestep")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.margins(x=0.01)
    right.legend(fontsize=8)
