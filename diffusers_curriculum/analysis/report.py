"""A report on difficulty: what is told of it, and how it is to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from torch import Tensor

from diffusers_curriculum.analysis import figures
from diffusers_curriculum.analysis.convergence import Curves
from diffusers_curriculum.analysis.difficulty import DataDifficulty, Difficulty, cluster_names
from diffusers_curriculum.analysis.page import Plot, Section, Table, facts_table, page, section
from diffusers_curriculum.analysis.probes import Grid

_TRAPS = (
    "K grows as the square of the step in log-SNR: much of “low noise is harder” is the "
    "schedule's wide steps there. Compare J, which is for equal steps.",
    "Raw losses do not rank difficulty: the floor that a loss ends at is not 0 and differs from "
    "level to level. Compare shares, ratios and progress.",
    "At low noise a finite set of samples has J near half its dimension whatever it shows: that is "
    "a statement about its being finite.",
    "What is suggested follows from these statistics alone. It is something to try beside uniform "
    "timesteps, with the same seed and steps, and no promise.",
)


def render(
    difficulty: Difficulty, facts: Mapping[str, str], files: Mapping[str, str], notes: Sequence[str]
) -> str:
    """The report as a page of HTML.

    Args:
        facts: what was looked at, and how, in words, by name.
        files: of each suggestion, the value for ``--timestep_sampler_config``.
        notes: what the reader should know of this very report.
    """
    body = [
        *facts_table(facts),
        *(f"<aside>{escape(note)}</aside>" for note in notes),
        *_suggestions(difficulty, files),
        *(line for each in _sections(difficulty) for line in section(each)),
        "<h2>Before you draw conclusions</h2><ul>",
        *(f"<li>{escape(trap)}</li>" for trap in _TRAPS),
        "</ul>",
    ]
    return page("Which noise levels are difficult", body)


# -- what is told ----------------------------------------------------------------------------------


def _suggestions(difficulty: Difficulty, files: Mapping[str, str]) -> Iterator[str]:
    reading = (
        "Where each law spends its draws, beside uniform timesteps: the best founded is listed "
        "first below."
    )
    yield from section(Section("Worth trying", [Plot(figures.law_figure(difficulty), reading)]))
    yield "<dl>"
    for each in difficulty.suggestions:
        flag = f"--timestep_sampler_config {files[each.name]}"
        yield f"<dt>{escape(each.name)}</dt><dd>{escape(each.reason)}"
        yield f"<br><code>{escape(flag)}</code></dd>"
    yield "</dl>"


def _sections(difficulty: Difficulty) -> Iterator[Section]:
    if difficulty.probes:
        yield _errors(difficulty)
    if difficulty.gradients is not None:
        yield _gradients(difficulty)
    if difficulty.convergence:
        yield _convergence(difficulty.convergence)
    yield _entropy(difficulty)


def _errors(difficulty: Difficulty) -> Section:
    probes, last = difficulty.probes, [*difficulty.probes.values()][-1]
    plots = [
        Plot(
            figures.relative_figure(probes),
            "Below 1 the network knows more than mean and covariance; above 1 it has still to "
            "learn even these. Bands are two standard errors.",
        ),
        Plot(
            figures.error_figure(probes),
            "The same errors in one unit for all prediction types; the level of a curve is no "
            "difficulty, its distance to an earlier checkpoint is progress.",
        ),
        Plot(
            figures.information_figure(last),
            "Half the epsilon error is the rate at which information about the data has to be "
            "explained; a broad hump is where most of it lies.",
        ),
    ]
    if len(probes) > 1:
        reading = (
            "Where the curve is above 0 the network still learned between two checkpoints, on the "
            "same samples and noise: that is where steps were well spent."
        )
        plots.insert(0, Plot(figures.progress_figure(probes), reading))
    header = ("log-SNR", "x0 error", "v error", "± ", "over linear", "±", "nats so far")
    (v, v_error), (ratio, r_error) = last.error("v"), last.relative
    columns = (last.error("x0").value, v, v_error, ratio, r_error, last.information)
    return Section("What the network has learned", plots, _columns(header, last.grid, *columns))


def _gradients(difficulty: Difficulty) -> Section:
    gradients = difficulty.gradients
    if gradients is None:
        return Section("Gradients")
    plots = [
        Plot(
            figures.gradient_figure(gradients),
            "Where the spread is far above the mean, single samples say little: such levels gain "
            "from more draws, which is the law of least variance.",
        ),
        Plot(
            figures.affinity_figure(gradients),
            "1: what teaches one cluster teaches the other; 0: they have nothing to do with each "
            "other; below 0: they pull apart. ?: lost in noise.",
        ),
    ]
    names = cluster_names(gradients.grid, gradients.groups)
    rows = [
        (name, *map(_number, row))
        for name, row in zip(names, gradients.affinity.tolist(), strict=True)
    ]
    return Section("Gradients", plots, Table(("cluster (log-SNR)", *names), rows))


def _convergence(found: Mapping[str, Curves]) -> Section:
    reading = (
        "The share of the fall of each cluster's loss that is still to come; the slower a curve "
        "falls, the harder the cluster."
    )
    plots = [
        Plot(figures.convergence_figure(name, curves), reading) for name, curves in found.items()
    ]
    rows = []
    for name, curves in found.items():
        halves, tenths = (curves.steps_to(share) for share in (0.5, 0.1))
        for cluster, area, half, tenth in zip(
            curves.clusters, curves.area.tolist(), halves, tenths, strict=True
        ):
            rows.append(
                (
                    name,
                    cluster,
                    f"{area:.3f}",
                    *("-" if x is None else str(x) for x in (half, tenth)),
                )
            )
    header = ("trained", "log-SNR", "area", "steps to 0.5", "steps to 0.1")
    return Section("How fast clusters converge", plots, Table(header, rows))


def _entropy(difficulty: Difficulty) -> Section:
    data, network = difficulty.data, difficulty.network_rate
    at = data.grid.log_snr.numpy()
    of_network = [*difficulty.probes.values()][-1].grid.log_snr.numpy() if network else at
    plots = [
        Plot(
            figures.rate_figure(data, network, of_network),
            "How quickly the law of the noisy samples changes, for equal steps of log-SNR: this "
            "is a property of the data.",
        ),
        Plot(
            figures.entropy_figure(data),
            "The paper's measure of difficulty, for the schedule's own steps: J times half the "
            "square of the step. Compare with J before you call the clean end hard.",
        ),
    ]
    header = (
        "log-SNR",
        "J finite set",
        "±",
        "J Gaussian",
        "K finite set",
        "±",
        "K Gaussian",
        "K bound",
    )
    columns = (
        *data.rate["finite"],
        data.rate["gaussian"].value,
        *data.entropy["finite"],
        data.entropy["gaussian"].value,
        data.entropy["bound"].value,
    )
    table = _columns(header, data.grid, *columns)
    return Section(f"Relative entropy of the data ({_of(data)})", plots, table)


def _of(data: DataDifficulty) -> str:
    return (
        f"{data.samples} samples of {data.dimension} numbers, standard deviation {data.std:.3g}; "
        f"the finite set: {data.finite_samples} of them"
    )


def _columns(header: Sequence[str], grid: Grid, *columns: Tensor) -> Table:
    """One row for each level of a grid."""
    rows = zip(grid.log_snr.tolist(), *(column.tolist() for column in columns), strict=True)
    return Table(header, [(f"{at:.2f}", *map(_number, row)) for at, *row in rows])


def _number(value: float) -> str:
    return f"{value:.4g}" if value == value else "?"
