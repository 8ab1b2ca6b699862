"""Continuous draws of every density, by Kolmogorov's test against an independent oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from diffusers_curriculum import DensityTimestepSampler
from tests.floors_fixtures import SCHEDULERS
from tests.statistics import checks
from tests.statistics.test_catalogue_fit import ORACLES

pytestmark = pytest.mark.statistics
DRAWN = 200_000
LAWS: dict[str, tuple[dict[str, Any], Any]] = ORACLES | {
    name: (args, lambda _edges, law=law: law)
    for name, (args, law) in checks.LAWS.items()
    if law is not None
}
SIGNIFICANCE = 1e-4 / (len(LAWS) + 4)


def _p_value(log_snr: np.ndarray, oracle: Any, edges: np.ndarray) -> float:
    """Of the law cut to the schedule; the share of a noisier level, as cdfs have it.

    Between 8,001 places, and the edges, the cdf is a line: wrong by less than 1e-4, where the test
    sees 2e-3.
    """
    places = np.union1d(np.linspace(edges[-1], edges[0], 8001), edges)
    shares = oracle.cdf(places)
    shares = (shares - shares[0]) / (shares[-1] - shares[0])
    return stats.kstest(log_snr, lambda x: np.interp(x, places, shares)).pvalue


@pytest.mark.parametrize("name", LAWS)
def test_continuous_edm_draws_follow_the_density(name: str) -> None:
    args, oracle = LAWS[name]
    sampler = DensityTimestepSampler(
        SCHEDULERS["edm"](), name, args, draw="iid", floor=0.0, continuous=True, seed=len(name)
    )
    edges = sampler.levels.edges.numpy()
    drawn = sampler.sample(DRAWN).log_snr
    assert drawn is not None
    assert len(drawn.unique()) > 0.999 * DRAWN
    assert _p_value(drawn.numpy(), oracle(edges), edges) > SIGNIFICANCE


@pytest.mark.parametrize(("levels", "told", "rejected"), [(20, 1.2, False), (20, 1.25, True)])
def test_log_normal_sigmas_on_a_coarse_table(levels: int, told: float, rejected: bool) -> None:
    """Twenty levels, and still the law of arXiv 2206.00364 to what a million draws can tell; a law
    4 % wider is told apart."""
    scheduler = SCHEDULERS["edm"](num_train_timesteps=levels)
    sampler = DensityTimestepSampler(scheduler, "edm", draw="iid", floor=0.0, continuous=True)
    edges = sampler.levels.edges.numpy()
    log_snr = sampler.sample(5 * DRAWN).log_snr
    assert log_snr is not None
    p_value = _p_value(log_snr.numpy(), stats.norm(2.4, 2 * told), edges)
    assert (p_value < SIGNIFICANCE) == rejected


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_flow_draws_are_uniform_in_time(shift: float) -> None:
    """In t where there is no shift; else in the t before the shift."""
    scheduler = SCHEDULERS["flow"](shift=shift)
    sampler = DensityTimestepSampler(scheduler, "uniform", draw="iid", floor=0.0, continuous=True)
    log_snr = sampler.sample(5 * DRAWN).log_snr
    assert log_snr is not None
    sigma = torch.sigmoid(-log_snr / 2).numpy()
    assert stats.kstest(sigma / (shift - (shift - 1) * sigma), "uniform").pvalue > SIGNIFICANCE
