"""The pictures show the numbers: each curve and image is compared with what it should hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.analysis.plots import (
    effective_density,
    figure_to_image,
    final_probabilities,
    plot_loss_by_noise_level,
    plot_timesteps,
    save_figure,
)
from diffusers_curriculum.weighting import loss_weights
from tests.floors_fixtures import SCHEDULERS


def laplace(scheduler: str = "sd", **config: Any) -> TimestepSampler:
    settings = {"density": "laplace", "density_args": {"mu": 1.0, "b": 2.0}, "floor": 0.0}
    return DensityTimestepSampler.from_scheduler(SCHEDULERS[scheduler](), **(settings | config))


def curriculum(pacing: str = "fixed", **numbers: Any) -> CurriculumTimestepSampler:
    return CurriculumTimestepSampler(laplace(), clusters=4, pacing=pacing, pacing_args=numbers)


def curves(figure: Figure, place: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The labelled lines of one of the axes."""
    lines = figure.axes[place].get_lines()
    columns = ((x.get_label(), x.get_xdata(), x.get_ydata()) for x in lines)
    return {str(name): (np.asarray(x), np.asarray(y)) for name, x, y in columns}


def mesh(figure: Figure) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, log-SNR edges, densities (steps, levels)) of the picture over training."""
    (drawn,) = figure.axes[3].collections
    corners = drawn.get_coordinates()  # type: ignore[attr-defined]
    values = np.asarray(drawn.get_array()).reshape(corners.shape[0] - 1, corners.shape[1] - 1)
    return corners[0, :, 0], corners[:, 0, 1], values.T


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


def test_the_mass_of_each_timestep_is_the_samplers() -> None:
    sampler = laplace()
    drawn = curves(plot_timesteps(sampler), 1)
    np.testing.assert_array_equal(drawn["drawn"][1], sampler.probabilities().numpy())
    np.testing.assert_allclose(drawn["uniform timesteps"][1], 1e-3)


def test_the_effective_density_is_mass_times_weight() -> None:
    sampler = laplace()
    weights = loss_weights("min_snr", sampler.levels)
    assert weights is not None
    density = curves(plot_timesteps(sampler, weights), 2)["mass x weight"][1]
    product = sampler.probabilities().numpy() * weights.numpy()
    widths = -np.diff(sampler.levels.edges.numpy())
    np.testing.assert_allclose(density, product / product.sum() / widths, rtol=1e-6)


def test_a_full_importance_correction_gives_back_the_uniform_law() -> None:
    sampler = laplace(floor=0.1, importance_correction="full")
    effective = effective_density(sampler, sampler.probabilities(), None)
    torch.testing.assert_close(effective, torch.full_like(effective, 1e-3))
    half = laplace(floor=0.1, importance_correction=0.5)
    mass = half.probabilities()
    effective = effective_density(half, mass, None)
    expected = mass.sqrt() / mass.sqrt().sum()
    torch.testing.assert_close(effective, expected)


@pytest.mark.parametrize("stage", [1, 4])
def test_a_curriculum_is_shown_with_everything_open(stage: int) -> None:
    sampler = curriculum(stage_steps=10)
    for step in range(10 * (stage - 1)):
        sampler.observe(torch.tensor([900]), torch.ones(1), step)
    torch.testing.assert_close(final_probabilities(sampler), laplace().probabilities())
    drawn = curves(plot_timesteps(sampler), 1)["drawn"][1]
    np.testing.assert_allclose(drawn, laplace().probabilities().numpy())


@pytest.mark.parametrize("scheduler", ["sd_zero_terminal", "flow", "flow_shift_3", "edm", "cosine"])
def test_every_schedule_can_be_drawn(scheduler: str) -> None:
    sampler = laplace(scheduler, density_args={"mu": 0.0, "b": 3.0}, floor=0.1)
    place, density = curves(plot_timesteps(sampler), 0)["drawn"]
    assert len(place) > len(sampler.levels) - 3
    assert np.isfinite(place).all()
    assert np.isfinite(density).all()
    assert (density > 0).all()
    assert figure_to_image(plot_timesteps(sampler)).size == (1100, 750)


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
        assert row[(centres > high + 0.4) | (centres < low - 0.4)] == pytest.approx(0, abs=1e-9)
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
