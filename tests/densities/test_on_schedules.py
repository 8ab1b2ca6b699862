"""Laws that end, or that depend on the schedule, against their oracles on every schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.densities import DENSITIES, Density, make_density
from tests.densities.oracles import LAWS, ON_SCHEDULE
from tests.floors_fixtures import SCHEDULERS, levels_of

each_schedule = pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
each_law = pytest.mark.parametrize("name", sorted(ON_SCHEDULE))
# what the default parameters leave out, or what they cannot do without
PARAMETERS = {name: args for name, args, _ in LAWS} | {n: a for n, (a, _) in ON_SCHEDULE.items()}


def _t(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _law(name: str, schedule: str) -> tuple[Density, Any, Tensor]:
    args, oracle = ON_SCHEDULE[name]
    edges = levels_of(schedule).edges
    return make_density(name, edges, **args), oracle(edges.numpy()), edges


@each_schedule
@each_law
def test_masses_are_those_of_the_oracle(name: str, schedule: str) -> None:
    law, oracle, edges = _law(name, schedule)
    expected = _t(oracle.cdf(edges[:-1].numpy()) - oracle.cdf(edges[1:].numpy()))
    torch.testing.assert_close(law.masses(edges), expected, atol=2e-14, rtol=1e-12)
    assert bool((law.masses(edges) >= 0).all())


@each_schedule
@each_law
def test_cdf_and_sf_at_and_between_levels(name: str, schedule: str) -> None:
    law, oracle, edges = _law(name, schedule)
    finite = edges[edges.isfinite()]
    x = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, _t([-math.inf, -40.0, 40.0, math.inf])])
    torch.testing.assert_close(law.cdf(x), _t(oracle.cdf(x.numpy())), atol=2e-12, rtol=0)
    torch.testing.assert_close(law.sf(x), _t(oracle.sf(x.numpy())), atol=2e-12, rtol=0)
    assert law.cdf(_t([-math.inf, math.inf])).tolist() == [0.0, 1.0]
    assert law.sf(_t([-math.inf, math.inf])).tolist() == [1.0, 0.0]
    assert law.pdf(_t([-math.inf, math.inf])).tolist() == [0.0, 0.0]


@each_schedule
@each_law
def test_quantiles_invert_the_cdf(name: str, schedule: str) -> None:
    law, _, _ = _law(name, schedule)
    p = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
    x = law.icdf(p)
    low, high = law.support
    assert bool(((x >= low) & (x <= high)).all())
    inner = x.isfinite()  # an atom at minus infinity is reached by many probabilities
    torch.testing.assert_close(law.cdf(x)[inner], p[inner], atol=1e-12, rtol=0)
    atom = float(law.masses(levels_of(schedule).edges)[-1])
    assert bool((p[~inner & (x < 0)] <= atom + 1e-12).all())


@each_schedule
@each_law
def test_pdf_integrates_to_the_cdf(name: str, schedule: str) -> None:
    """Simpson's rule inside single cells, where every law here is smooth."""
    law, _, edges = _law(name, schedule)
    cell = len(edges) // 3
    high, low = edges[cell], edges[cell + 1]
    x = torch.linspace(float(low), float(high), 401, dtype=torch.float64)[1:-1]
    weights = torch.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    integral = (weights * law.pdf(x)).sum() * (x[1] - x[0]) / 3
    mass = law.cdf(x[-1]) - law.cdf(x[0])
    torch.testing.assert_close(integral, mass, atol=1e-13, rtol=1e-8)


@pytest.mark.parametrize("name", ["log_snr_uniform", "spline", "tabulated", "truncated"])
def test_pdf_of_oracles_that_have_one(name: str) -> None:
    law, oracle, _ = _law(name, "sd")
    x = torch.linspace(-5.3, 6.9, 500, dtype=torch.float64)
    torch.testing.assert_close(law.pdf(x), _t(oracle.pdf(x.numpy())), atol=1e-12, rtol=1e-10)


@each_schedule
@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_configs_round_trip_to_equal_probabilities(name: str, schedule: str, tmp_path: Any) -> None:
    sampler = DensityTimestepSampler(SCHEDULERS[schedule](), name, PARAMETERS[name], floor=0.05)
    sampler.save_pretrained(str(tmp_path))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.probabilities(), sampler.probabilities())
    assert loaded.config["density_args"] == sampler.config["density_args"]


@each_schedule
@pytest.mark.parametrize("outer_edges", ["half", "clip", "inf"])
@pytest.mark.parametrize("name", sorted(ON_SCHEDULE))
def test_examples_have_mass_on_every_schedule(name: str, outer_edges: str, schedule: str) -> None:
    sampler = DensityTimestepSampler(
        SCHEDULERS[schedule](),
        name,
        DENSITIES.entry(name).example,
        floor=0.0,
        outer_edges=outer_edges,
    )
    mass = sampler.probabilities()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
    assert float(mass.min()) >= 0
