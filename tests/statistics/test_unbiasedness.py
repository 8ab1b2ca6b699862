"""With the full correction, weighted means are those of the reference law."""

from __future__ import annotations

import pytest
import torch

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler
from diffusers_curriculum.randomness import DRAWS
from tests.floors_fixtures import SCHEDULERS
from tests.statistics import checks

pytestmark = pytest.mark.statistics


@pytest.mark.parametrize("draw", sorted(set(DRAWS) - {"antithetic"}))
@pytest.mark.parametrize("density", sorted(checks.LAWS))
@pytest.mark.parametrize("schedule", ["linear", "sd_zero_terminal", "flow_shift_3", "edm"])
def test_full_correction_is_unbiased(schedule: str, density: str, draw: str) -> None:
    sampler = DensityTimestepSampler(
        SCHEDULERS[schedule](),
        density,
        checks.LAWS[density][0],
        draw=draw,
        floor=0.1,
        importance_correction="full",
        seed=2,
    )
    count = len(sampler.levels)
    sample, mass = sampler.sample(200_000), sampler.probabilities()
    reference = torch.full_like(mass, 1 / count)
    assert float((mass * sampler.importance()).sum()) == pytest.approx(1, abs=1e-12)
    log_snr = sampler.levels.log_snr
    assert checks.biased(sample.indices, sample.importance, log_snr, mass, reference) == []


@pytest.mark.parametrize("stage", [1, 3, 5])
def test_a_curriculum_is_unbiased_for_its_restricted_reference(stage: int) -> None:
    base = DensityTimestepSampler(
        SCHEDULERS["sd"](), draw="iid", floor=0.1, importance_correction="full"
    )
    sampler = CurriculumTimestepSampler(base, 5, pacing="fixed", pacing_args={"stage_steps": 10})
    step = 10 * (stage - 1)
    sample, mass = sampler.sample(500_000, step=step), sampler.probabilities(step)
    opened = sampler.open_levels(stage).double()
    log_snr = sampler.levels.log_snr
    indices, importance = sample.indices, sample.importance
    assert checks.biased(indices, importance, log_snr, mass, opened / opened.sum()) == []


def test_without_a_correction_the_mean_is_that_of_the_density() -> None:
    sampler = DensityTimestepSampler(SCHEDULERS["sd"](), draw="iid", floor=0.1)
    sample, mass = sampler.sample(500_000), sampler.probabilities()
    reference, log_snr = torch.full_like(mass, 1 / 1000), sampler.levels.log_snr
    assert checks.biased(sample.indices, sample.importance, log_snr, mass, mass) == []
    wrong = checks.biased(sample.indices, sample.importance, log_snr, mass, reference)
    assert {"t", "snr", "bin 3"} <= set(wrong)


@pytest.mark.parametrize("draw", ["stratified", "systematic", "sobol"])
def test_even_draws_have_no_more_variance_than_iid(draw: str) -> None:
    """Of the weighted mean of a batch, for smooth and for rough functions of the level."""
    t = torch.arange(1000, dtype=torch.float64) / 1000
    functions = {"smooth": (3 * t).sin(), "step": (t > 0.37).double(), "peak": (-80 * t).exp()}

    def variances(mode: str) -> dict[str, float]:
        sampler = DensityTimestepSampler(
            SCHEDULERS["sd"](), draw=mode, floor=0.1, importance_correction="full"
        )
        samples = [sampler.sample(16, step=step) for step in range(1500)]
        return {
            name: float(torch.stack([(s.importance * f[s.indices]).mean() for s in samples]).var())
            for name, f in functions.items()
        }

    iid, even = variances("iid"), variances(draw)
    for name in functions:
        assert even[name] < iid[name]
