"""Laws of the noise fraction are laws of the model's own clock: a shift of the schedule moves them,
as it moves the draws of diffusers' training scripts."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, training_utils

from diffusers_curriculum import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    NoiseLevels,
    TimestepSampler,
    drop_in,
)
from diffusers_curriculum.samplers import LossProportionalTimestepSampler
from diffusers_curriculum.samplers.description import plain_config
from tests.floors_fixtures import SCHEDULERS

MOVED = ["logit_normal", "mode", "heavy_tail", "cosmap", "flow_uniform"]
UNMOVED = ["laplace", "cosine", "normal", "logistic", "u_shaped", "uniform", "beta"]


def _scheduler(shift: float = 3.0, **config: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def _sampler(name: str, of: float = 3.0, /, **args: Any) -> DensityTimestepSampler:
    """On a schedule with the shift ``of``."""
    return DensityTimestepSampler(_scheduler(of), name, args, floor=0.0)


def _median(sampler: DensityTimestepSampler) -> float:
    cdf = sampler.probabilities().cumsum(0)
    return float(sampler.levels.log_snr[int((cdf < 0.5).sum())])


# -- the shift of a schedule -----------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.3, 1.5, 3.0, 3.1582, 12.0, 100.0])
@pytest.mark.parametrize("count", [10, 50, 1000])
def test_the_shift_of_a_schedule_is_read_from_its_levels(shift: float, count: int) -> None:
    levels = NoiseLevels.from_scheduler(_scheduler(shift, num_train_timesteps=count))
    assert levels.shift == pytest.approx(shift, rel=1e-4)


def test_schedules_without_a_shift() -> None:
    for scheduler in (_scheduler(1.0), *(SCHEDULERS[n]() for n in ("sd", "edm", "cosine", "flow"))):
        assert NoiseLevels.from_scheduler(scheduler).shift is None
    # put on when images are drawn, and not in training
    assert NoiseLevels.from_scheduler(_scheduler(3.0, use_dynamic_shifting=True)).shift is None
    assert NoiseLevels.from_scheduler(SCHEDULERS["flow_shift_3"]()).shift == 3.0


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", MOVED)
@pytest.mark.parametrize("shift", [0.5, 3.0, 5.5])
def test_the_shift_moves_them_by_twice_its_logarithm(density: str, shift: float) -> None:
    moved, named = _sampler(density, shift), _sampler(density, shift, shift=shift)
    assert torch.equal(moved.probabilities(), named.probabilities())
    assert _median(moved) == pytest.approx(-2 * math.log(shift), abs=0.01)
    assert moved.config["density_args"] == {"shift": shift}


@pytest.mark.parametrize("density", MOVED)
@pytest.mark.parametrize("told", [{"shift": 1.0}, {"shift": 2.0}, {"tokens": 1024.0}])
def test_a_shift_that_is_given_replaces_it(density: str, told: dict[str, Any]) -> None:
    sampler = _sampler(density, **told)
    shift = told.get("shift", math.exp(0.5 + (1024 - 256) * 0.65 / 3840))
    assert _median(sampler) == pytest.approx(-2 * math.log(shift), abs=0.02)
    assert sampler.config["density_args"] == told


@pytest.mark.parametrize("density", UNMOVED)
def test_laws_of_log_snr_and_of_timesteps_stay(density: str) -> None:
    assert _sampler(density).config["density_args"] == {}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("scheme", "ours", "theirs"),
    [
        ("logit_normal", {"mean": 0.5, "std": 1.2}, {"logit_mean": -0.5, "logit_std": 1.2}),
        ("logit_normal", {}, {"logit_mean": 0.0, "logit_std": 1.0}),
        ("mode", {"scale": 1.29}, {"mode_scale": 1.29}),
        ("flow_uniform", {}, {}),
    ],
)
def test_they_are_the_laws_of_diffusers_own_draws(
    shift: float, scheme: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """As diffusers' scripts draw: u, an index into the descending timesteps of the scheduler."""
    scheduler, count = _scheduler(shift), 200_000
    u = training_utils.compute_density_for_timestep_sampling(
        scheme, count, generator=torch.Generator().manual_seed(0), **theirs
    )
    indices = (u * 1000).long().clamp(max=999)
    sigmas = scheduler.sigmas[indices].double()
    sampler = _sampler(scheme, shift, **ours)
    cdf = sampler.probabilities().cumsum(0)
    drawn = torch.searchsorted(sampler.levels.sigma, sigmas.sort().values - 1e-7)
    empirical = torch.bincount(drawn, minlength=1000).cumsum(0) / count
    assert float((empirical - cdf).abs().max()) < 0.005


def test_nested_laws_move_with_their_parts() -> None:
    parts: list[dict[str, Any]] = [
        {"density": "logit_normal", "mean": 0.5, "weight": 3},
        {"density": "laplace"},
        {"density": "mode", "density_args": {"shift": 2.0}},
    ]
    given: Any = _sampler("mixture", components=parts).config["density_args"]
    mixed = given["components"]
    assert [part["density_args"] for part in mixed] == [
        {"mean": 0.5, "shift": 3.0},
        {},
        {"shift": 2.0},
    ]
    cut = _sampler("truncated", density="cosmap", high=4.0)
    assert cut.config["density_args"]["density_args"] == {"shift": 3.0}


def test_the_warm_up_of_a_law_that_learns_moves() -> None:
    learning = LossProportionalTimestepSampler(_scheduler(), warm_up_density="logit_normal")
    assert learning.config["warm_up_density_args"] == {"shift": 3.0}


@pytest.mark.parametrize("reversed_sigmas", [False, True])
def test_drop_ins_draw_what_samplers_draw(reversed_sigmas: bool) -> None:
    bound = drop_in.for_scheduler(_scheduler(), reversed_sigmas=reversed_sigmas)
    u = bound.compute_density_for_timestep_sampling(
        "density:logit_normal", 50_000, floor=0.0, draw="stratified", seed=0
    )
    sigma = _scheduler().sigmas[(u * 1000).long()].double()
    noise = 1 - sigma if reversed_sigmas else sigma
    shift = 1 / 3 if reversed_sigmas else 3
    median = float(2 * ((1 - noise) / noise).log().median())
    assert median == pytest.approx(-2 * math.log(shift), abs=0.05)


# -- configs of versions before --------------------------------------------------------------------


def _config(sampler: TimestepSampler) -> dict[str, Any]:
    return json.loads(json.dumps(plain_config(sampler)))


def _older(density: str, **args: Any) -> dict[str, Any]:
    return _config(_sampler(density, **args)) | {"density_args": args}


@pytest.mark.parametrize("density", MOVED)
def test_a_stored_law_of_before_stays_where_it_was(density: str) -> None:
    stored = _older(density)
    still = _sampler(density, shift=1.0).probabilities()
    for config in (stored, _config(TimestepSampler.from_config(stored))):
        assert torch.equal(TimestepSampler.from_config(config).probabilities(), still)
    around = _config(CurriculumTimestepSampler(_sampler(density))) | {"base": stored}
    assert torch.equal(TimestepSampler.from_config(around).inner[0].probabilities(), still)


def test_stored_parts_and_warm_ups_of_before_stay() -> None:
    stored = _older("mixture", components=[{"density": "mode", "weight": 1, "density_args": {}}])
    moved = TimestepSampler.from_config(stored).config["density_args"]
    assert moved["components"][0]["density_args"] == {"shift": 1.0}
    learning = LossProportionalTimestepSampler(_scheduler(), warm_up_density="mode")
    old = _config(learning) | {"warm_up_density_args": {}}
    assert TimestepSampler.from_config(old).config["warm_up_density_args"] == {"shift": 1.0}


def test_a_config_without_its_scheduler_is_no_stored_one() -> None:
    config = {"_class_name": "DensityTimestepSampler", "density": "mode"}
    sampler = TimestepSampler.from_config(config, scheduler=_scheduler())
    assert sampler.config["density_args"] == {"shift": 3.0}
