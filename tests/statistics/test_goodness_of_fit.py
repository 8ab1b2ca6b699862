"""A million draws of every density on every family of schedulers in every mode of drawing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.randomness import DRAWS, Slots
from tests.floors_fixtures import SCHEDULERS
from tests.statistics import checks

pytestmark = pytest.mark.statistics
CASES = [(d, s, w) for d in checks.LAWS for s in SCHEDULERS for w in sorted(DRAWS)]


def test_every_density_is_here() -> None:
    assert set(checks.LAWS) <= set(DENSITIES)  # the others: test_catalogue_fit.py


@pytest.mark.parametrize(("density", "schedule", "draw"), CASES)
def test_drawn_levels_follow_the_density(density: str, schedule: str, draw: str) -> None:
    sampler = DensityTimestepSampler(
        SCHEDULERS[schedule](),
        density,
        checks.LAWS[density][0],
        draw=draw,
        floor=0.0,
        seed=CASES.index((density, schedule, draw)),
    )
    counts = checks.draw_counts(sampler)
    assert counts.sum() == checks.DRAWN
    mass, cdf = sampler.probabilities().numpy(), checks.exact_cdf(density, sampler.levels.edges)
    assert checks.rejections(counts, mass, cdf, draw) == []


@pytest.mark.parametrize("draw", sorted(DRAWS))
@pytest.mark.parametrize("schedule", ["sd", "sd_zero_terminal", "flow_shift_3", "edm"])
def test_drawn_levels_follow_the_density_with_a_floor(schedule: str, draw: str) -> None:
    sampler = DensityTimestepSampler(SCHEDULERS[schedule](), draw=draw, floor=0.1, seed=1)
    density = checks.exact_cdf("laplace", sampler.levels.edges)
    cdf = 0.9 * density + 0.1 * checks.exact_cdf("uniform", sampler.levels.edges)
    counts = checks.draw_counts(sampler)
    assert checks.rejections(counts, sampler.probabilities().numpy(), cdf, draw) == []


@pytest.mark.parametrize("draw", sorted(DRAWS))
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8])
def test_one_slot_of_small_batches_follows_the_density(batch: int, draw: str) -> None:
    """Strata live in cdf space: each slot alone, over many steps, has the whole density."""
    sampler = DensityTimestepSampler(SCHEDULERS["sd"](), draw=draw, floor=0.1, seed=batch)
    slots = Slots(batch - 1, 1, batch)
    drawn = [sampler.sample(slots, step=step).indices for step in range(10_000)]
    counts = checks.counts_of(torch.cat(drawn), 1000)
    mass = sampler.probabilities().numpy()
    assert checks.chi_square(counts, mass) > checks.SIGNIFICANCE
    cdf = [0.0, *mass.cumsum()]
    assert checks.kolmogorov(counts, np.array(cdf)) > checks.SIGNIFICANCE


@pytest.mark.parametrize("stage", [1, 3, 5])
@pytest.mark.parametrize("within", ["base", "balanced"])
def test_stages_of_a_curriculum_follow_the_restricted_density(within: str, stage: int) -> None:
    base = DensityTimestepSampler(SCHEDULERS["sd"](), draw="iid", floor=0.1, seed=stage)
    sampler = CurriculumTimestepSampler(
        base, 5, pacing="fixed", pacing_args={"stage_steps": 10}, within=within
    )
    first = 10 * (stage - 1)
    drawn = [sampler.sample(100_000, step=first + step).indices for step in range(10)]
    counts = checks.counts_of(torch.cat(drawn), 1000)
    mass = sampler.probabilities(first).numpy()
    assert checks.chi_square(counts, mass) > checks.SIGNIFICANCE
    assert counts[mass == 0].sum() == 0
