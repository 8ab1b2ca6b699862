"""The pictures show the numbers: each curve and image is compared with what it should hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

from diffusers_curriculum import MovingTimestepSampler
from diffusers_curriculum.analysis.plots import (
    density_line,
    figure_to_image,
    plot_comparison,
    plot_loss_by_noise_level,
    plot_preview,
    plot_timesteps,
    save_figure,
)
from diffusers_curriculum.analysis.preview import make_preview
from diffusers_curriculum.weighting import loss_weights
from tests.analysis.samplers import curriculum, laplace
from tests.floors_fixtures import SCHEDULERS


def curves(figure: Figure, place: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The labelled lines of one of the axes."""
    lines = figure.axes[place].get_lines()
    columns = ((x.get_label(), x.get_xdata(), x.get_ydata()) for x in lines)
    return {str(name): (np.asarray(x), np.asarray(y)) for name, x, y in columns}


def mesh(figure: Figure) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, log-SNR edges, densities (steps, levels)) of the picture over training."""
    (drawn,) = figure.axes[3].collections
    corners = drawn.get_coordinates()  # type: ignore[attr-defined]
    values = np.ma.filled(cast(Any, drawn).get_array(), 0.0)
    shape = corners.shape[0] - 1, corners.shape[1] - 1
    return corners[0, :, 0], corners[:, 0, 1], values.reshape(shape).T


def bars(figure: Figure) -> dict[str, np.ndarray]:
    """The heights of each group of bars, by its label."""
    groups = cast(Any, figure.axes[2].containers)
    return {
        str(group.get_label()): np.array([bar.get_height() for bar in group]) for group in groups
    }


# -- densities -------------------------------------------------------------------------------------


def test_the_density_over_log_snr_is_the_samplers() -> None:
    sampler = laplace()
    place, density = curves(plot_timesteps(sampler), 0)["drawn"]
    widths = -np.diff(sampler.levels.edges.numpy())
    assert (density * widths).sum() == pytest.approx(1, abs=1e-9)
    inside = (place > -2) & (place < 4)
    expected = np.exp(-np.abs(place - 1) / 2)
    ratio = (density / expected)[inside]
    assert ratio.max() / ratio.min() < 1.01


def test_each_timestep_is_compared_with_uniform_ones() -> None:
    sampler = laplace()
    drawn = curves(plot_timesteps(sampler), 1)
    relative = sampler.probabilities().numpy() * 1000
    np.testing.assert_allclose(drawn["drawn"][1], relative, rtol=1e-12)
    np.testing.assert_array_equal(drawn["drawn"][0], np.arange(1000))
    np.testing.assert_allclose(drawn["uniform timesteps"][1], 1)


def test_the_effective_density_is_mass_times_weight() -> None:
    sampler = laplace()
    weights = loss_weights("min_snr", sampler.levels)
    assert weights is not None
    figure = plot_timesteps(sampler, weights)
    product = sampler.probabilities().numpy() * weights.numpy()
    product /= product.sum()
    widths = -np.diff(sampler.levels.edges.numpy())
    np.testing.assert_allclose(curves(figure, 0)["drawn x weight"][1], product / widths, rtol=1e-6)
    np.testing.assert_allclose(curves(figure, 1)["drawn x weight"][1], product * 1000, rtol=1e-6)


def test_without_a_weight_there_is_no_such_curve() -> None:
    figure = plot_timesteps(laplace())
    assert list(curves(figure, 0)) == ["uniform timesteps", "drawn"]
    assert list(bars(figure)) == ["drawn"]


def test_ninety_per_cent_of_the_draws_are_shaded() -> None:
    sampler = laplace()
    (span,) = plot_timesteps(sampler).axes[0].patches
    left, right = cast(Any, span).get_x(), cast(Any, span).get_x() + cast(Any, span).get_width()
    inside = (sampler.levels.log_snr > left) & (sampler.levels.log_snr < right)
    assert float(sampler.probabilities()[inside].sum()) == pytest.approx(0.9, abs=0.005)


def test_bars_are_the_shares_noisiest_first() -> None:
    sampler = laplace()
    weights = loss_weights("p2", sampler.levels)
    assert weights is not None
    shown = bars(plot_timesteps(sampler, weights))
    mass = sampler.probabilities().numpy()
    product = mass * weights.numpy()
    for name, law in (("drawn", mass), ("drawn x weight", product / product.sum())):
        expected = 100 * law.reshape(10, 100).sum(1)[::-1]
        np.testing.assert_allclose(shown[name], expected, rtol=1e-6)


def test_bars_of_a_curriculum_show_the_run() -> None:
    sampler = curriculum(stage_steps=10)
    figure = plot_timesteps(sampler, None, 80)
    stages = np.stack([sampler.at_stage(n)[0] for n in range(1, sampler.stages + 1)])
    average = (10 * stages[:3].sum(0) + 50 * stages[3]) / 80
    clusters = np.split(average, sampler.starts[1:])
    expected = [100 * cluster.sum() for cluster in reversed(clusters)]
    np.testing.assert_allclose(bars(figure)["drawn, mean over the run"], expected, rtol=1e-9)


@pytest.mark.parametrize("scheduler", ["sd_zero_terminal", "flow", "flow_shift_3", "edm", "cosine"])
def test_every_schedule_can_be_drawn(scheduler: str) -> None:
    sampler = laplace(scheduler, density_args={"mu": 0.0, "b": 3.0}, floor=0.1)
    figure = plot_timesteps(sampler)
    place, density = curves(figure, 0)["drawn"]
    assert len(place) > len(sampler.levels) - 3
    assert np.isfinite(place).all()
    assert np.isfinite(density).all()
    assert (density > 0).all()
    assert figure_to_image(figure).size == (1100, 750)
    infinite = bool((~sampler.levels.finite).any())
    assert ("infinite" in figure.axes[0].get_title()) == infinite


@pytest.mark.parametrize("data_std", [None, 0.9])
def test_where_the_law_lies_for_the_data_is_told(data_std: float | None) -> None:
    preview = make_preview(laplace(), data_std=data_std)
    assert "normalised log-SNR" in preview.normalised
    assert preview.normalised in plot_preview(preview).get_suptitle().replace("\n", " ")
    assert preview.to_json()["normalised_log_snr"] == preview.normalised


def test_warnings_stand_on_the_picture() -> None:
    sampler = laplace(density_args={"mu": 0.0, "b": 0.5}, floor=0.1)
    weights = loss_weights("min_snr", sampler.levels, "v_prediction")
    preview = make_preview(sampler, weights)
    assert len(preview.warnings) == 1
    shown = "".join(plot_preview(preview).get_supxlabel().split())
    assert "".join(preview.warnings[0].split()) in shown
    assert plot_preview(make_preview(sampler)).get_supxlabel() == ""


# -- over training ---------------------------------------------------------------------------------


def test_without_a_curriculum_the_law_is_one_column() -> None:
    steps, edges, density = mesh(plot_timesteps(laplace(), None, 500))
    assert steps.tolist() == [0, 500]
    assert density.shape == (1, 80)
    assert (density * np.diff(edges)).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("pacing", "numbers", "expected"),
    [
        ("fixed", {"stage_steps": 10}, [0, 10, 20, 30, 100]),
        ("linear", {"total_steps": 60}, [0, 20, 40, 60, 100]),
        # sqrt(s / 45) reaches 1/3, 2/3 and 1 at 5, 20 and 45
        ("root", {"total_steps": 45}, [0, 5, 20, 45, 100]),
        ("patience", {"patience": 10}, [0, 17.81, 35.62, 53.43, 100]),
    ],
)
def test_stages_stand_where_they_are_planned(
    pacing: str, numbers: dict[str, int], expected: list[float]
) -> None:
    sampler = curriculum(pacing, **numbers)
    steps, edges, density = mesh(plot_timesteps(sampler, None, 100))
    assert steps.tolist() == pytest.approx(expected, abs=0.01)
    np.testing.assert_allclose((density * np.diff(edges)).sum(1), 1)
    centres = (edges[:-1] + edges[1:]) / 2
    for row, stage in zip(density, range(1, 5), strict=True):
        low, high = sampler.open_range(stage)
        assert (row[(centres > high + 0.4) | (centres < low - 0.4)] == 0).all()
        assert (row[(centres > low) & (centres < high)] > 1e-4).all()


@pytest.mark.parametrize("scheduler", ["sd", "sd_zero_terminal", "flow", "edm"])
def test_the_picture_holds_all_of_the_mass(scheduler: str) -> None:
    sampler = laplace(scheduler, density_args={"mu": 0.0, "b": 3.0}, floor=0.1)
    _, edges, density = mesh(plot_timesteps(sampler, None, 10))
    mass = density[0] * np.diff(edges)
    assert mass.sum() == pytest.approx(1)
    place = (edges[:-1] + edges[1:]) / 2
    levels = sampler.levels.log_snr.clamp(edges[0], edges[-1])
    mean = float((sampler.probabilities() * levels).sum())
    assert (mass * place).sum() == pytest.approx(mean, abs=(edges[1] - edges[0]) / 2)


def test_stages_beyond_the_run_are_left_out() -> None:
    steps, _, density = mesh(plot_timesteps(curriculum(stage_steps=40), None, 100))
    assert steps.tolist() == [0, 40, 80, 100]
    assert len(density) == 3


def test_stages_stand_where_they_opened_once_the_run_is_on() -> None:
    sampler = curriculum("patience", patience=3)
    for step in range(50):
        losses = torch.full((4,), 1.0 if step < 9 else 1.0 / step)  # a plateau, then none
        sampler.observe(sampler.sample(4, step=step).indices, losses, step)
    opened = [int(x) for x in sampler.opened_at if x >= 0]
    assert 1 < len(opened) < 4
    figure = plot_timesteps(sampler, None, 50)
    assert mesh(figure)[0].tolist() == [*opened, 50]
    assert "as they opened" in figure.axes[3].get_title()
    rows = make_preview(sampler, None, 50).training.masses
    stages = np.stack([sampler.at_stage(n)[0] for n in range(1, len(opened) + 1)])
    np.testing.assert_allclose(rows, stages)
    fresh = plot_timesteps(curriculum("patience", patience=3), None, 50)
    assert "as on a loss plateau" in fresh.axes[3].get_title()


# -- losses ----------------------------------------------------------------------------------------


def test_losses_and_counts_stand_over_their_bins() -> None:
    edges, counts = (-2.0, -1.0, 0.0, 3.0), (5, 0, 7)
    losses = {"first half": (0.5, math.nan, 0.25), "second half": (0.4, math.nan, 0.125)}
    figure = plot_loss_by_noise_level(edges, losses, counts)
    left, right = figure.axes
    shown = {patch.get_label(): patch.get_data() for patch in left.patches}  # type: ignore[attr-defined]
    for name, means in losses.items():
        np.testing.assert_array_equal(shown[name].values, means)
        np.testing.assert_array_equal(shown[name].edges, edges)
    np.testing.assert_array_equal(right.patches[0].get_data().values, counts)  # type: ignore[attr-defined]
    assert "unweighted" in left.get_ylabel()


def test_a_run_that_saw_nothing_can_be_drawn() -> None:
    nothing = {"first half": [math.nan] * 2, "second half": [math.nan] * 2}
    figure = plot_loss_by_noise_level([0, 1, 2], nothing, [0, 0])
    assert figure_to_image(figure).size == (800, 500)


# -- legends ---------------------------------------------------------------------------------------


def covered(figure: Figure) -> list[str]:
    """The names of legends that lie over a panel, or leave the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    panels = [axis.get_window_extent() for axis in figure.axes]
    owners = [figure, *figure.subfigs, *figure.axes]
    legends = [c for o in owners for c in o.get_children() if isinstance(c, Legend)]
    assert legends
    boxes = {
        str(legend.get_texts()[0].get_text()): legend.get_window_extent() for legend in legends
    }
    inside = figure.bbox
    return [
        name
        for name, box in boxes.items()
        if any(box.overlaps(panel) for panel in panels)
        or not (inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y1 <= inside.y1)
    ]


def test_no_legend_covers_what_it_explains() -> None:
    weights = loss_weights("p2", laplace().levels)
    figures = [
        plot_timesteps(laplace(), weights),
        plot_timesteps(curriculum(stage_steps=10), weights, 80),
    ]
    figures.append(plot_timesteps(laplace("sd_zero_terminal", density_args={"b": 3.0}, floor=0.1)))
    losses = {"first half": [0.9, 0.8], "second half": [0.7, 0.9]}
    figures.append(plot_loss_by_noise_level([0, 1, 2], losses, [5, 3]))
    named = {name: make_preview(laplace(), weights) for name in ("laplace", "a/" * 40, "c", "d")}
    figures.append(plot_comparison(named))
    assert [covered(figure) for figure in figures] == [[]] * len(figures)


def test_a_legend_that_covers_is_seen() -> None:
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], label="line")
    axis.legend()
    assert covered(figure) == ["line"]


def test_legends_tell_each_name_once() -> None:
    figure = plot_timesteps(curriculum(stage_steps=10), loss_weights("p2", laplace().levels), 80)
    (legend,) = figure.subfigs[0].legends
    told = [text.get_text() for text in legend.get_texts()]
    names = {"uniform timesteps", "drawn", "drawn x weight", "90 % of the draws"}
    over_time = {"drawn, mean over the run", "drawn at step 0", "drawn at step 20"}
    assert set(told) == names | over_time
    assert len(told) == len(set(told))


def test_the_laws_of_a_run_are_drawn_beside_the_last_one() -> None:
    sampler = MovingTimestepSampler(SCHEDULERS["sd"](), move_steps=60, widen_steps=40)
    preview = make_preview(sampler, None, 101)
    axis = next(a for a in plot_preview(preview).axes if "over log-SNR" in a.get_title())
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    steps = {f"drawn at step {step}": step for step in (0, 25, 50, 76)}
    assert set(lines) == {*steps, "uniform timesteps", "drawn"}
    for name, step in (steps | {"drawn": 100}).items():
        wanted = density_line(preview.levels, sampler.probabilities(step).numpy())
        np.testing.assert_allclose(np.transpose(lines[name].get_xydata()), wanted, rtol=1e-12)
    still = make_preview(laplace(), None, 101)
    axis = next(a for a in plot_preview(still).axes if "over log-SNR" in a.get_title())
    assert [line.get_label() for line in axis.get_lines()] == ["uniform timesteps", "drawn"]


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_ending_chooses_the_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "new" / f"figure.{ending}"
    save_figure(plot_loss_by_noise_level([0, 1], {"a": [1.0]}, [3]), path)
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[ending])


def test_an_image_for_trackers() -> None:
    image = figure_to_image(plot_timesteps(laplace()))
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    assert len(np.unique(np.asarray(image))) > 50


def test_drawing_changes_no_state() -> None:
    sampler = curriculum("patience", patience=3)
    before = sampler.state_dict()
    plot_timesteps(sampler, None, 100)
    after = sampler.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(after[k])) for k in before)
