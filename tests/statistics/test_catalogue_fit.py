"""A million draws of every density that came with the catalogue, against an independent oracle.

The first densities are drawn on every schedule in every mode of drawing; these on three schedules,
the modes taken in turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.randomness import DRAWS
from tests.densities.oracles import LAWS, ON_SCHEDULE
from tests.floors_fixtures import SCHEDULERS
from tests.statistics import checks

pytestmark = pytest.mark.statistics
SCHEDULES = ("sd_zero_terminal", "flow_shift_3", "edm")
MOVED = ("mode", "heavy_tail")  # by a schedule's shift, which their oracles do not know
ORACLES = {
    name: (args, lambda _edges, law=law: law) for name, args, law in LAWS if name not in checks.LAWS
} | {name: case for name, case in ON_SCHEDULE.items() if name not in checks.LAWS}
CASES = [
    (name, schedule, sorted(DRAWS)[(i + j) % len(DRAWS)])
    for i, name in enumerate(ORACLES)
    for j, schedule in enumerate(SCHEDULES)
]
# chi-square and Kolmogorov for each case, at the overall level of the other tests
SIGNIFICANCE = 1e-4 / (2 * len(CASES))


def _cleaner(oracle: Any, edges: np.ndarray) -> np.ndarray:
    """(T+1,) share of draws cleaner than each edge, of the law cut to the schedule."""
    total = oracle.cdf(edges[0]) - oracle.cdf(edges[-1])
    below = oracle.cdf(edges[0]) - oracle.cdf(edges)
    above = oracle.sf(edges) - oracle.sf(edges[0])
    return np.where(edges <= oracle.median(), below, above) / total


def _rejections(sampler: DensityTimestepSampler, cdf: np.ndarray) -> list[str]:
    counts = checks.draw_counts(sampler)
    mass = np.clip(np.diff(cdf), 0, None)
    found = {
        "chi-square": checks.chi_square(counts, mass, sampler.draw) < SIGNIFICANCE,
        "kolmogorov": checks.kolmogorov(counts, cdf, sampler.draw) < SIGNIFICANCE,
        "evenness": checks.deviation(counts, mass) > checks.deviation_bound(sampler.draw),
    }
    return [name for name, rejected in found.items() if rejected]


def test_every_density_is_drawn_somewhere() -> None:
    assert set(checks.LAWS) | set(ORACLES) == set(DENSITIES)
    assert {draw for _, _, draw in CASES} == set(DRAWS)


@pytest.mark.parametrize(("name", "schedule", "draw"), CASES)
def test_drawn_levels_follow_the_density(name: str, schedule: str, draw: str) -> None:
    args, oracle = ORACLES[name]
    args = {"shift": 1.0} | args if name in MOVED else args
    seed = CASES.index((name, schedule, draw))
    sampler = DensityTimestepSampler(
        SCHEDULERS[schedule](), name, args, draw=draw, floor=0.0, seed=seed
    )
    edges = sampler.levels.edges.numpy()
    assert _rejections(sampler, _cleaner(oracle(edges), edges)) == []


@pytest.mark.parametrize(
    ("drawn", "told"),
    [
        (("logit_normal", {"mean": 0.1}), ("logit_normal", {"mean": -0.1})),
        (("beta", {"alpha": 0.8}), ("beta", {"alpha": 1.0, "beta": 0.8})),
        (("speed", {"tau": 0.7}), ("speed", {"tau": 0.699})),
        (
            ("timestep_bias", {"strategy": "range", "begin": 100, "end": 200}),
            ("timestep_bias", {"strategy": "range", "begin": 100, "end": 201}),
        ),
        (("mode", {"scale": 1.29}), ("mode", {"scale": 1.27})),
    ],
)
def test_a_neighbouring_law_is_rejected(drawn: Any, told: Any) -> None:
    """The control: a mirrored clock, a range that is one timestep too long."""
    right, wrong = (
        DensityTimestepSampler(SCHEDULERS["sd"](), name, args, draw="iid", floor=0.0)
        for name, args in (drawn, told)
    )
    counts = checks.draw_counts(right)
    assert checks.chi_square(counts, right.probabilities().numpy()) > SIGNIFICANCE
    assert checks.chi_square(counts, wrong.probabilities().numpy()) < SIGNIFICANCE
