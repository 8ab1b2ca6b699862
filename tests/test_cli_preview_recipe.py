"""`--recipe` in `diffusers-curriculum preview`: what a script with it trains on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.training.arguments.recipes import RECIPES
from tests.floors_fixtures import SD
from tests.test_cli_preview import Capture, error, numbers
from tests.training.arguments.test_recipes import levels

LAPLACE = "laplace-2407.03297"


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    diffusers.DDPMScheduler(**SD).save_pretrained(tmp_path / "linear")  # type: ignore[arg-type]
    return tmp_path / "linear"


def shown(tmp_path: Path, name: str, *more: Any, flags: Any = ()) -> tuple[Any, dict[str, Any]]:
    """What a script chooses by a recipe and ``more``, and a preview of its schedule by the recipe
    and ``flags``."""
    steps = ("--max_train_steps", 100_000)
    chosen = levels("unconditional", "--recipe", name, *more, *steps)
    chosen.scheduler.save_pretrained(tmp_path / "schedule")
    told = numbers(tmp_path / "schedule", "--recipe", name, *flags, *steps, folder=tmp_path)
    return chosen, told


@pytest.mark.parametrize("name", RECIPES)
def test_a_preview_shows_what_the_script_trains_on(name: str, tmp_path: Path) -> None:
    chosen, told = shown(tmp_path, name)
    assert told["mass"] == pytest.approx(chosen.sampler.opened.probabilities().tolist(), rel=1e-12)
    weights = None if chosen.weights is None else chosen.weights.tolist()
    assert told["weights"] == (None if weights is None else pytest.approx(weights, rel=1e-12))
    assert len(told["shares"]) == (20 if name == "denoising-difficulty" else 10)


@pytest.mark.parametrize(("name", "resolution"), [(LAPLACE, 512), ("sd3", 1024)])
def test_the_resolution_reaches_the_recipe(name: str, resolution: int, tmp_path: Path) -> None:
    flags = ("--resolution", resolution)
    chosen, told = shown(tmp_path, name, *flags, flags=flags)
    assert told["mass"] == pytest.approx(chosen.sampler.probabilities().tolist(), rel=1e-12)


@pytest.mark.parametrize("name", ["edm", "edm2"])
def test_log_normal_laws_follow_the_data_of_the_schedule(name: str, tmp_path: Path) -> None:
    chosen, told = shown(tmp_path, name, "--sigma_data", 1.5)
    assert told["mass"] == pytest.approx(chosen.sampler.probabilities().tolist(), rel=1e-12)


def test_a_flag_by_hand_wins_and_one_line_says_so(
    linear: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        by_hand = ("--curriculum_clusters", 5)
        told = numbers(linear, "--recipe", "denoising-difficulty", *by_hand, folder=tmp_path)
    assert len(told["shares"]) == 5
    (line,) = [record.getMessage() for record in caplog.records]
    assert "has --curriculum_clusters 20, which gives way to --curriculum_clusters 5" in line


def test_what_is_left_to_the_source_is_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        shown(tmp_path, LAPLACE)
    (line,) = [r.getMessage() for r in caplog.records if "--recipe" in r.getMessage()]
    assert line.startswith(f"--recipe {LAPLACE}: a preview leaves out its --")
    assert "--sampling_scheduler, --sampling_scheduler_args, --validation_inference_steps" in line
    assert "--prediction_type" not in line  # shown as the recipe has it


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sd3", "--recipe sd3 trains with --formulation flow"),
        (LAPLACE, "--ddpm_beta_schedule squaredcos_cap_v2"),
    ],
)
def test_another_schedule_is_refused(
    name: str, message: str, linear: Path, capsys: Capture
) -> None:
    said = error(capsys, linear, "--recipe", name)
    assert message in said
    assert "has ddpm" in said or "has scaled_linear" in said


def test_the_shift_of_another_resolution_is_refused(tmp_path: Path, capsys: Capture) -> None:
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path)
    said = error(capsys, tmp_path, "--recipe", "sd3")
    assert "--flow_shift 1.0 (--resolution 256), and" in said
    assert "has 3.0" in said


def test_a_resolution_without_a_recipe_is_refused(linear: Path, capsys: Capture) -> None:
    assert "no effect without --recipe NAME" in error(capsys, linear, "--resolution", 64)


def test_beside_a_samplers_own_file(linear: Path, tmp_path: Path, capsys: Capture) -> None:
    """A loss weight is taken, a law is not."""
    scheduler = diffusers.DDPMScheduler(**SD)  # type: ignore[arg-type]
    sampler = DensityTimestepSampler(scheduler, "cauchy")
    sampler.save_pretrained(str(tmp_path / "saved"))
    told = numbers(tmp_path / "saved", "--recipe", "min-snr", folder=tmp_path)
    assert told["weights"][0] < told["weights"][-1]
    capsys.readouterr()
    said = error(capsys, tmp_path / "saved", "--recipe", "denoising-difficulty")
    assert "so --recipe denoising-difficulty has no effect" in said
    said = error(capsys, tmp_path / "saved", "--recipe", "min-snr", "--timestep_sampler", "normal")
    assert "so --timestep_sampler has no effect" in said
    file = tmp_path / "saved" / "timestep_sampler_config.json"
    more = ("--recipe", "denoising-difficulty", "--compare", "laplace", file)
    both = numbers(linear, *more, folder=tmp_path)
    assert len(both["laplace"]["shares"]) == 20
    expected = torch.tensor(both[str(file)]["mass"], dtype=torch.float64)
    assert torch.equal(expected, sampler.probabilities())
