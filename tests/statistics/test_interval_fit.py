"""A million pairs of times, by Kolmogorov's test against their law."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.samplers import IntervalTimestepSampler
from tests.floors_fixtures import SCHEDULERS

pytestmark = pytest.mark.statistics
DRAWN, SIGNIFICANCE = 1_000_000, 1e-4


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_pairs_are_the_larger_and_the_smaller_of_two_draws(share: float) -> None:
    """Of the logit-normal law: the larger has the square of its cdf, and given that, the smaller
    is a draw below it; all but a share of the pairs are single times, of the same law of t."""
    base = DensityTimestepSampler(
        SCHEDULERS["flow"](), "logit_normal", draw="iid", floor=0.0, continuous=True
    )
    sampler = IntervalTimestepSampler(base, share=share)
    drawn = sampler.sample(DRAWN, step=0)
    assert drawn.interval is not None
    later, length = (drawn.timesteps.double() / 1000).numpy()
    apart = drawn.interval.longer.numpy()

    def cdf(t: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return stats.norm.cdf(np.log(t) - np.log1p(-t))

    assert stats.kstest(cdf(later) ** 2, "uniform").pvalue > SIGNIFICANCE
    assert stats.binomtest(len(apart), DRAWN, share).pvalue > SIGNIFICANCE
    assert (np.delete(length, apart) == 0).all()
    below = cdf((later - length)[apart]) / cdf(later[apart])
    assert stats.kstest(below, "uniform").pvalue > SIGNIFICANCE
    # and the two are independent
    assert abs(np.corrcoef(below, later[apart])[0, 1]) < 4 / np.sqrt(len(apart))
