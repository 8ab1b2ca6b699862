"""What clusters "auto" makes: of equal mass under the law that is drawn."""

from __future__ import annotations

from typing import Any

import pytest

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.samplers.description import plain_config
from tests.floors_fixtures import SCHEDULERS

BY_LOG_SNR = (0, 149, 372, 605, 816)  # sd, 5 clusters
FIXED: dict[str, Any] = {"pacing": "fixed", "pacing_args": {"stage_steps": 10}}


def _density(schedule: str, density: str, **settings: Any) -> DensityTimestepSampler:
    return DensityTimestepSampler(SCHEDULERS[schedule](), density, **settings)


def _curriculum(
    base: TimestepSampler, clusters: int = 5, **settings: Any
) -> CurriculumTimestepSampler:
    return CurriculumTimestepSampler(base, clusters, **settings)


@pytest.mark.parametrize(
    ("schedule", "density", "method"),
    [
        ("sd", "uniform", "log_snr"),
        ("sd_zero_terminal", "uniform", "log_snr"),
        ("sd", "laplace", "quantile"),
        ("sd", "beta", "quantile"),
        ("flow", "uniform", "quantile"),
        ("flow", "laplace", "quantile"),
        ("edm", "edm", "quantile"),
    ],
)
def test_auto_clustering_follows_family_and_law(schedule: str, density: str, method: str) -> None:
    auto = _curriculum(_density(schedule, density))
    named = _curriculum(_density(schedule, density), clustering=method)
    assert auto.starts == named.starts
    other = "log_snr" if method == "quantile" else "quantile"
    assert auto.starts != _curriculum(_density(schedule, density), clustering=other).starts


LAWS = ["laplace", "logit_normal", "cauchy", "mode", "edm", "beta", "speed"]


@pytest.mark.parametrize("schedule", ["linear", "sd", "cosine", "flow", "flow_shift_3", "edm"])
@pytest.mark.parametrize("density", LAWS)
def test_the_newest_cluster_gets_its_share_of_the_draws(schedule: str, density: str) -> None:
    """About 1 / n at stage n; with log_snr Laplace's has 82, 74, 68 % on linear betas."""
    for floor in (0.0, 0.1):
        sampler = _curriculum(_density(schedule, density, floor=floor), clusters=20, **FIXED)
        for stage in (2, 5, 10):
            newest = sampler.open_levels(stage) & ~sampler.open_levels(stage - 1)
            drawn = sampler.sample(4000, step=10 * stage - 5).indices
            share = stage * float(newest[drawn].double().mean())
            assert 0.78 - floor < share < 1.2 + floor, (floor, stage, share / stage)


def test_a_stored_auto_of_before_keeps_its_clusters() -> None:
    sampler = _curriculum(_density("sd", "laplace"))
    config = plain_config(sampler)
    assert config["clustering"] == "quantile"
    before = TimestepSampler.from_config(config | {"clustering": "auto"})
    assert before.starts == BY_LOG_SNR
    stored = plain_config(before) | {"clustering": "auto"}
    inside = {"_class_name": "SequenceTimestepSampler", "phases": [{"sampler": stored}]}
    assert TimestepSampler.from_config(inside).inner[0].starts == BY_LOG_SNR
    around = plain_config(_curriculum(before, clustering="uniform"))
    around["base"] = stored
    assert TimestepSampler.from_config(around).inner[0].starts == BY_LOG_SNR
    # where both rules agree, nothing is named
    assert plain_config(_curriculum(_density("sd", "uniform")))["clustering"] == "auto"
    assert plain_config(_curriculum(_density("flow", "uniform")))["clustering"] == "auto"
