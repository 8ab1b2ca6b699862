"""Warnings come where numbers found on their own say so, and only there."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler
from diffusers_curriculum.analysis.advice import TWICE, double_emphasis
from diffusers_curriculum.analysis.preview import make_preview
from diffusers_curriculum.weighting import loss_weights
from tests.floors_fixtures import SCHEDULERS, SD


def warnings(
    density: str, weighting: str, target: str, scheduler: str = "sd", **config: Any
) -> list[str]:
    sampler = DensityTimestepSampler.from_scheduler(
        SCHEDULERS[scheduler](), density=density, **config
    )
    weights = loss_weights(weighting, sampler.levels, target)
    return [w for w in make_preview(sampler, weights).warnings if "twice" in w]


# -- emphasis --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["sd", "linear", "cosine"])
@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "p2", "debiased"])
def test_a_narrow_law_and_a_peaked_weight_are_told(scheduler: str, weighting: str) -> None:
    assert warnings("laplace", weighting, "v_prediction", scheduler)


@pytest.mark.parametrize(
    ("density", "weighting", "target"),
    [
        ("laplace", "none", "v_prediction"),
        ("uniform", "min_snr", "v_prediction"),  # one of the two alone
        ("uniform", "debiased", "epsilon"),
        ("laplace", "min_snr", "epsilon"),  # flat where the law is
        ("laplace", "debiased", "epsilon"),  # the one favours noise, the other the middle
        ("cosine", "soft_min_snr", "epsilon"),
    ],
)
def test_what_does_not_meet_is_not_told(density: str, weighting: str, target: str) -> None:
    assert not warnings(density, weighting, target)


def test_a_full_correction_leaves_nothing_twice() -> None:
    assert warnings("laplace", "min_snr", "v_prediction", importance_correction="none")
    assert not warnings("laplace", "min_snr", "v_prediction", importance_correction="full")


def test_the_ratio_is_the_mean_weight_of_draws_over_that_of_uniform_ones() -> None:
    sampler = DensityTimestepSampler.from_scheduler(SCHEDULERS["sd"](), density="laplace")
    weights = loss_weights("min_snr", sampler.levels, "v_prediction")
    assert weights is not None
    indices = sampler.sample(400_000, step=0).indices
    drawn = float(weights[indices].double().mean() / weights.double().mean())
    ratio = double_emphasis(sampler.probabilities(), weights)
    assert ratio == pytest.approx(drawn, rel=0.01)
    assert ratio == pytest.approx(double_emphasis(sampler.probabilities(), 7 * weights))
    assert ratio > TWICE


def test_the_ratio_by_hand() -> None:
    mass = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    same, opposite = torch.tensor([3.0, 3, 1, 1]), torch.tensor([1.0, 1, 3, 3])
    assert double_emphasis(mass, same) == 1.5
    assert double_emphasis(mass, opposite) == 0.5
    assert double_emphasis(mass, torch.ones(4)) == 1
    assert double_emphasis(torch.full((4,), 0.25), same) == 1


def test_levels_of_no_weight_are_told() -> None:
    sampler = DensityTimestepSampler.from_scheduler(
        SCHEDULERS["sd_zero_terminal"](), density="uniform"
    )
    weights = loss_weights("min_snr", sampler.levels, "v_prediction")
    (told,) = make_preview(sampler, weights).warnings
    assert "0 at 1 of 1000" in told
    assert "index 999" in told
    on_epsilon = loss_weights("min_snr", sampler.levels, "epsilon")
    assert make_preview(sampler, on_epsilon).warnings == ()


# -- inference -------------------------------------------------------------------------------------


def told(density: str, floor: float, scheduler: Any, steps: int = 50, **config: Any) -> str:
    training = diffusers.DDPMScheduler.from_config(scheduler.config)
    sampler = DensityTimestepSampler.from_scheduler(
        training, density=density, floor=floor, **config
    )
    preview = make_preview(sampler, inference=scheduler, inference_steps=steps)
    return "".join(preview.warnings)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "PNDM"])
def test_levels_that_inference_visits_untrained_are_told(name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SD)
    text = told("laplace", 0.0, scheduler)
    assert "hardly ever trained" in text
    assert "fit_inference(scheduler, sampler, 50)" in text
    assert told("laplace", 0.1, scheduler) == ""  # each level has a tenth of its share
    assert told("uniform", 0.0, scheduler) == ""


@pytest.mark.parametrize(("steps", "density"), [(10, "laplace"), (50, "laplace"), (50, "normal")])
def test_the_untrained_levels_are_counted_right(steps: int, density: str) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")  # type: ignore[call-arg]
    sampler = DensityTimestepSampler.from_scheduler(
        diffusers.DDPMScheduler.from_config(scheduler.config), density=density, floor=0.0
    )
    mass = sampler.probabilities().numpy()
    visited = np.arange(1000 // steps, 1001, 1000 // steps) - 1
    nearest = np.abs(np.arange(1000)[:, None] - visited[None]).argmin(1)
    shares = [mass[nearest == k].sum() * 1000 / (nearest == k).sum() for k in range(steps)]
    poor = sum(share < 0.05 for share in shares)
    assert poor > 0
    assert f"{poor} of the {steps} levels" in told(density, 0.0, scheduler, steps)


def test_a_cluster_that_opens_too_late_is_told() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)  # type: ignore[call-arg]
    sampler = CurriculumTimestepSampler.from_scheduler(
        diffusers.DDPMScheduler.from_config(scheduler.config),
        clusters=4,
        clustering="uniform",
        pacing="fixed",
        pacing_args={"stage_steps": 33},
    )
    (told,) = make_preview(sampler, None, 100, inference=scheduler).warnings
    assert "13 of the 50 levels" in told  # 0, 20, ..., 240 of the cleanest quarter
    assert make_preview(sampler, None, 1000, inference=scheduler).warnings == ()


def test_both_ends_are_named() -> None:
    text = told("laplace", 0.0, diffusers.DDIMScheduler())  # type: ignore[call-arg]
    low, high = text.split("log-SNR ")[1].split(":")[0].split(" and ")
    assert float(low.split(" to ")[0]) < float(low.split(" to ")[1]) < -2
    assert 2 < float(high.split(" to ")[0]) < float(high.split(" to ")[1])


def test_a_scheduler_that_cannot_be_asked_is_told() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)  # type: ignore[call-arg]
    sampler = DensityTimestepSampler.from_scheduler(scheduler, density="normal", floor=0.0)
    (text,) = make_preview(sampler, inference=scheduler).warnings
    assert "could not be looked at" in text
    assert "mu" in text


@pytest.mark.parametrize("name", ["flow", "flow_shift_3", "edm"])
def test_other_families_are_looked_at_too(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    narrow = {"density": "normal", "density_args": {"mean": 0.0, "std": 0.3}}
    poor = DensityTimestepSampler.from_scheduler(scheduler, floor=0.0, **narrow)
    rich = DensityTimestepSampler.from_scheduler(scheduler, floor=0.1, **narrow)
    assert "hardly ever" in "".join(make_preview(poor, inference=SCHEDULERS[name]()).warnings)
    assert make_preview(rich, inference=SCHEDULERS[name]()).warnings == ()


# -- a name that means something else --------------------------------------------------------------


def test_diffusers_own_laplace_betas_are_told_to_be_another_law() -> None:
    own = diffusers.DDPMScheduler(beta_schedule="laplace")  # type: ignore[call-arg]
    sampler = DensityTimestepSampler.from_scheduler(own, density="uniform")
    (told,) = [w for w in make_preview(sampler, inference=own).warnings if "2407.03297" in w]
    assert "log-SNR is 1.18, 0.88, 0.59, where that law has 0.35, 0.00, -0.35" in told
    law = DensityTimestepSampler.from_scheduler(SCHEDULERS["cosine"](), density="laplace").density
    quarters = law.icdf(torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64))
    assert [f"{float(q):.2f}" for q in quarters] == ["0.35", "0.00", "-0.35"]
    plain = make_preview(sampler, inference=SCHEDULERS["cosine"]()).warnings
    assert not [w for w in plain if "2407.03297" in w]
