"""Draws between the levels of the table: their law, their cells, their curricula, their configs."""

from __future__ import annotations

import inspect
import json
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.densities import DENSITIES, make_density
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.samplers import SAMPLERS, SequenceTimestepSampler
from diffusers_curriculum.samplers.description import plain_config
from tests.floors_fixtures import SCHEDULERS
from tests.samplers.draws import parts

EDM = {"density": "edm", "floor": 0.0}
LAWS = [
    ("edm", {}),
    ("laplace", {"mu": 0.0, "b": 0.5}),
    ("cauchy", {}),
    ("logit_normal", {}),
    ("mixture", DENSITIES.entry("mixture").example),
    ("truncated", DENSITIES.entry("truncated").example),
    ("spline", DENSITIES.entry("spline").example),
    ("beta", {}),
]


def drawn_from(schedule: str = "edm", density: str = "edm", **kwargs: Any) -> Any:
    settings = {"floor": 0.0, "continuous": True} | kwargs
    return DensityTimestepSampler(SCHEDULERS[schedule](), density, **settings)


def u_grid(count: int = 4001) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def samplers() -> dict[str, Any]:
    """A builder of every kind of sampler, by its name."""
    found: dict[str, Any] = {
        kind.__name__: lambda scheduler, kind=kind, **kw: kind(scheduler, **kw)
        for kind in SAMPLERS.values()
        if "scheduler" in inspect.signature(kind).parameters
        and kind.__module__.startswith("diffusers_curriculum")
    }
    found["CurriculumTimestepSampler"] = lambda scheduler, **kw: (
        CurriculumTimestepSampler.from_scheduler(scheduler, base=kw, clusters=5)
    )
    found["SequenceTimestepSampler"] = lambda scheduler, **kw: (
        SequenceTimestepSampler.from_scheduler(
            scheduler,
            [
                {"until": 2, "sampler": {"density": "normal"} | kw},
                {"until": None, "sampler": {"density": "uniform"} | kw},
            ],
        )
    )
    return found


def test_every_sampler_is_looked_at() -> None:
    own = [k for k in SAMPLERS.values() if k.__module__.startswith("diffusers_curriculum")]
    # that of several sources is told them, and one draws pairs: test_sources.py, test_interval.py
    elsewhere = {"PerSourceTimestepSampler", "IntervalTimestepSampler"}
    assert {*samplers()} | elsewhere == {kind.__name__ for kind in own}


@pytest.mark.parametrize("schedule", ["flow_shift_3", "edm"])
@pytest.mark.parametrize("name", samplers())
def test_levels_are_drawn_as_ever_and_then_a_place_in_their_cell(name: str, schedule: str) -> None:
    build, scheduler = samplers()[name], SCHEDULERS[schedule]()
    continuous, table = (build(scheduler, continuous=on, seed=3) for on in (True, False))
    levels = continuous.levels
    for step in range(4):
        drawn, plain = (s.sample(64, step=step) for s in (continuous, table))
        assert torch.equal(drawn.indices, plain.indices)
        assert torch.equal(drawn.importance, plain.importance)
        assert plain.log_snr is None
        assert plain.at is plain.indices
        assert drawn.at is drawn.log_snr
        assert drawn.log_snr.dtype == torch.float64
        assert bool(drawn.log_snr.isfinite().all())
        assert torch.equal(drawn.timesteps, levels.conditioning(drawn.log_snr))
        assert drawn.timesteps.dtype == plain.timesteps.dtype
        # of its own cell or the half of a neighbour's that flow's sigma intervals reach into
        upper = levels.edges[(drawn.indices - 1).clamp_min(0)]
        upper = torch.where(drawn.indices == 0, torch.inf, upper)
        assert bool((drawn.log_snr <= upper).all())
        assert bool((drawn.log_snr >= levels.edges[drawn.indices + 1]).all())
        losses = torch.linspace(0.1, 1, 64)
        for sampler in (continuous, table):
            sampler.observe(drawn.indices, losses, step)


@pytest.mark.parametrize("name", samplers())
def test_schedules_with_timesteps_only_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"continuous=True needs flow matching or EDM.*'vp'"):
        samplers()[name](SCHEDULERS["sd"](), continuous=True)
    with pytest.raises(ValueError, match="continuous=1 must be true or false"):
        samplers()[name](SCHEDULERS["edm"](), continuous=1)


# -- the law ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer_edges", ["half", "clip"])
@pytest.mark.parametrize("schedule", ["flow", "edm"])
@pytest.mark.parametrize(("name", "args"), LAWS, ids=[n for n, _ in LAWS])
def test_numbers_go_through_the_inverse_cdf(
    name: str, args: dict[str, Any], schedule: str, outer_edges: str
) -> None:
    """The share of the law on the clean side of what u gives is u, to the last 64th of a cell."""
    sampler = drawn_from(schedule, name, density_args=args, outer_edges=outer_edges)
    edges, u = sampler.levels.edges, u_grid()
    if schedule == "flow" and name in ("mixture", "beta"):  # they have an atom at sigma = 1
        u = u[u < float(sampler.probabilities()[:-1].sum())]
    density = make_density(name, edges, **args)
    found = sampler.sample(u=u).log_snr
    top, bottom = density.cdf(edges[:1]), density.cdf(edges[-1:])
    expected = top - u * (top - bottom)
    assert bool((found.diff() <= 0).all())
    # in a cell without an end, one straight piece of 64 is all that can be off
    endless = float(sampler.probabilities()[-1]) / 64 if edges[-1].isinf() else 0.0
    torch.testing.assert_close(density.cdf(found), expected, atol=max(1e-6, endless), rtol=0)


@pytest.mark.parametrize("levels", [1000, 50])
def test_the_error_of_the_table_is_far_below_a_cell(levels: int) -> None:
    scheduler = diffusers.EDMEulerScheduler(num_train_timesteps=levels)
    sampler = DensityTimestepSampler(scheduler, "edm", floor=0.0, continuous=True)
    law, u = stats.norm(2.4, 2.4), u_grid(20_001)
    top, bottom = (law.cdf(float(sampler.levels.edges[i])) for i in (0, -1))
    found = law.cdf(sampler.sample(u=u).log_snr.numpy())  # pyright: ignore
    error = np.abs(found - (top - u.numpy() * (top - bottom))).max()
    assert error < (2e-8 if levels == 1000 else 1e-5)


@pytest.mark.parametrize("schedule", ["flow", "edm"])
def test_uniform_is_uniform_in_the_coordinate_of_the_noise(schedule: str) -> None:
    sampler, u = drawn_from(schedule, "uniform"), u_grid()
    found = sampler.sample(u=u)
    if schedule == "flow":  # sigma = u; the table's sigmas are float32
        torch.testing.assert_close(torch.sigmoid(-found.log_snr / 2), u, atol=3e-8, rtol=0)
        torch.testing.assert_close(found.timesteps.double(), 1000 * u, atol=1e-4, rtol=0)
        return
    edges, place = sampler.levels.edges, u * len(sampler.levels)
    low = edges[place.long()]
    expected = low + (place - place.floor()) * (edges[place.long() + 1] - low)
    torch.testing.assert_close(found.log_snr, expected, atol=1e-9, rtol=0)


def test_the_ends_keep_their_digits() -> None:
    sampler = drawn_from("flow", "uniform")
    ends = torch.tensor([0.0, 1e-12, 1e-6, 1 - 1e-9, 1 - 1e-12, 1.0], dtype=torch.float64)
    drawn = sampler.sample(u=ends)
    assert bool(drawn.log_snr.isfinite().all())
    sigma = torch.sigmoid(-drawn.log_snr / 2)
    torch.testing.assert_close(sigma[1:3], ends[1:3], atol=0, rtol=1e-6)
    alpha = torch.sigmoid(drawn.log_snr / 2)
    torch.testing.assert_close(alpha[3:5], 1 - ends[3:5], atol=1e-16, rtol=1e-4)
    x0, noise = torch.ones(6, 1), torch.full((6, 1), -2.0)
    objective = Objective(sampler.levels)
    for values in (objective.add_noise(x0, noise, drawn.at), drawn.timesteps):
        assert bool(values.isfinite().all())


@pytest.mark.parametrize("density", ["cauchy", "uniform", "edm"])
@pytest.mark.parametrize("schedule", ["flow", "flow_shift_3", "edm"])
def test_infinite_outer_cells_give_finite_levels(schedule: str, density: str) -> None:
    sampler = drawn_from(schedule, density, outer_edges="inf", floor=0.1)
    drawn = sampler.sample(u=u_grid(100_001))
    sigma = sampler.levels.coefficients(drawn.log_snr)[1]
    assert bool(sigma.isfinite().all())
    assert bool((sigma > 0).all())
    assert bool(drawn.log_snr.isfinite().all())
    if schedule == "edm":  # half a step beyond the table, no further
        half = NoiseLevels.from_scheduler(SCHEDULERS["edm"]()).edges
        assert bool((drawn.log_snr <= half[0]).all())
        assert bool((drawn.log_snr >= half[-1]).all())


def test_a_floor_draws_whole_cells_where_the_density_has_no_mass() -> None:
    """The cdf has no digits there: not all draws of a cell may fall on one place."""
    sampler = drawn_from("edm", "normal", density_args={"mean": -6.0, "std": 0.3}, floor=0.2)
    indices = torch.zeros(1000, dtype=torch.int64)
    cells = sampler.cells(0, torch.device("cpu"))
    found = cells.log_snr(indices, u_grid(1000))
    high, low = sampler.levels.edges[:2]
    expected = high + u_grid(1000) * (low - high)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("draw", ["stratified", "systematic"])
def test_strata_survive(draw: str) -> None:
    """Each of n equal shares of the law holds one of n draws, though a cell holds many."""
    scheduler = diffusers.EDMEulerScheduler(num_train_timesteps=20)
    sampler = DensityTimestepSampler(scheduler, "edm", floor=0.0, continuous=True, draw=draw)
    law, edges = stats.norm(2.4, 2.4), sampler.levels.edges
    for step in range(5):
        share = law.cdf(sampler.sample(512, step=step).log_snr.numpy())  # pyright: ignore
        top, bottom = law.cdf(float(edges[0])), law.cdf(float(edges[-1]))
        share = (top - share) / (top - bottom)
        shift = share.min() if draw == "systematic" else 0.0
        strata = np.floor((share - shift) * 512 + 0.25 * (draw == "systematic"))
        # the table's straight pieces may carry a few across an edge by a hundredth of a stratum
        assert len(np.unique(strata)) >= 508


def test_nothing_is_solved_when_drawing() -> None:
    sampler = drawn_from("edm", "mixture", density_args=DENSITIES.entry("mixture").example)
    sampler.density = None
    assert sampler.sample(8).log_snr is not None


# -- curricula over noise levels -------------------------------------------------------------------

# boundaries between clusters of equal mass, sigma of EDM and t of flow matching
QUANTILES: list[tuple[str, str, dict[str, Any], list[float]]] = [
    ("edm", "edm", {}, [0.13407, 0.30119, 0.67664]),
    ("edm", "edm", {}, [0.10971, 0.22224, 0.40821, 0.82691]),
    ("edm", "edm", {"p_mean": -0.4, "p_std": 1.0}, [0.28892, 0.52030, 0.86359, 1.55523]),
    ("edm", "edm", {"p_mean": -0.8, "p_std": 1.6}, [0.11688, 0.29959, 0.67392, 1.72736]),
    ("flow", "logit_normal", {}, [0.30119, 0.43700, 0.56300, 0.69881]),
    ("flow", "uniform", {}, [0.2, 0.4, 0.6, 0.8]),
]
TWENTY = (
    "0.04184 0.06471 0.08684 0.10971 0.13407 0.16053 0.18969 0.22224 0.25903 0.30119 0.35022 "
    "0.40821 0.47825 0.56512 0.67664 0.82691 1.04469 1.40195 2.16804"
)
QUANTILES.append(("edm", "edm", {}, [float(value) for value in TWENTY.split()]))


def curriculum(schedule: str, density: str, args: dict[str, Any], clusters: int) -> Any:
    base = drawn_from(schedule, density, density_args=args)
    pacing = {"pacing": "fixed", "pacing_args": {"stage_steps": 1}}
    return CurriculumTimestepSampler(base, clusters=clusters, **pacing)


@pytest.mark.parametrize(("schedule", "density", "args", "bounds"), QUANTILES)
def test_clusters_have_equal_mass_and_stages_open_them_from_the_noise_on(
    schedule: str, density: str, args: dict[str, Any], bounds: list[float]
) -> None:
    count = len(bounds) + 1
    sampler = curriculum(schedule, density, args, count)
    mass = sampler.base.probabilities()
    clusters = [float(part.sum()) for part in torch.tensor_split(mass, sampler.starts[1:])]
    assert len(clusters) == count
    assert max(abs(c - 1 / count) for c in clusters) <= float(mass.max()) + 1e-12
    # u spread over each stage finds its open end, which is the quantile up to one cell
    u = u_grid(200_001)
    for stage in range(1, count + 1):
        drawn = sampler.sample(u=u, step=stage - 1)
        sigma = sampler.levels.coefficients(drawn.log_snr)[1]
        least = float(sigma.min())
        start = sampler.starts[count - stage]
        if stage == count:
            assert start == 0
            continue
        wanted = bounds[count - stage - 1]
        tables = sampler.levels.sigma[[max(start - 2, 0), start + 1]].tolist()
        assert tables[0] <= wanted <= tables[1]  # the quantile lies in the boundary's cell
        assert tables[0] <= least <= tables[1]
        assert int(drawn.indices.min()) == start


def test_uniform_clusters_of_flow_matching_end_at_i_over_n() -> None:
    sampler = curriculum("flow", "uniform", {}, 5)
    for stage in range(1, 6):
        sigma = torch.sigmoid(-sampler.sample(u=u_grid(), step=stage - 1).log_snr / 2)
        edge = 1 - stage / 5
        # uniform over (edge, 1]
        expected = edge + (1 - edge) * u_grid()
        torch.testing.assert_close(sigma, expected, atol=1e-7, rtol=0)


STAGES = {
    1: (1.04469, 1.40195, 2.16804),
    2: (0.56512, 0.82691, 1.40195),
    3: (0.35022, 0.56512, 1.04469),
    5: (0.13407, 0.30119, 0.67664),
}


@pytest.mark.parametrize("stage", STAGES)
def test_quartiles_of_sigma_in_the_stages_of_edm(stage: int) -> None:
    sampler = curriculum("edm", "edm", {}, 5)
    sigma = torch.exp(-sampler.sample(u=u_grid(100_001), step=stage - 1).log_snr / 2)
    found = np.quantile(sigma.numpy(), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(found, STAGES[stage], rtol=0.01)  # a cell is 2 % wide


@pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy"])
def test_inside_a_stage_the_law_is_the_base_restricted_to_whole_cells(order: str) -> None:
    base = drawn_from("edm", "edm")
    pacing = {"pacing": "fixed", "pacing_args": {"stage_steps": 1}, "order": order}
    sampler = CurriculumTimestepSampler(base, clusters=5, **pacing)
    law, edges = stats.norm(2.4, 2.4), base.levels.edges
    start = sampler.starts[3] if order == "easy_to_hard" else sampler.starts[2]
    cut = law.cdf(float(edges[start]))
    low, high = (
        (law.cdf(float(edges[-1])), cut)
        if order == "easy_to_hard"
        else (cut, law.cdf(float(edges[0])))
    )
    found = law.cdf(sampler.sample(u=u_grid(), step=1).log_snr.numpy())  # pyright: ignore
    np.testing.assert_allclose(found, high - u_grid().numpy() * (high - low), atol=1e-7)


# -- other samplers, configs and state -------------------------------------------------------------


def test_phases_must_agree_and_the_new_one_rules_inside_a_cell() -> None:
    scheduler = SCHEDULERS["edm"]()
    phases = [
        {"until": 10, "sampler": EDM | {"continuous": True}},
        {"until": None, "sampler": {"density": "uniform", "floor": 0.0, "continuous": True}},
    ]
    sequence = SequenceTimestepSampler.from_scheduler(scheduler, phases, mix="linear", mix_steps=5)
    assert sequence.continuous
    device = torch.device("cpu")
    alone = [
        drawn_from("edm", "edm").cells(0, device),
        drawn_from("edm", "uniform").cells(0, device),
    ]
    for step, cells in ((9, alone[0]), (10, alone[1]), (50, alone[1])):
        assert torch.equal(sequence.cells(step, device).knots, cells.knots)
    phases[1]["sampler"].pop("continuous")
    with pytest.raises(ValueError, match="phase 2 has continuous=False and phase 1 True"):
        SequenceTimestepSampler.from_scheduler(scheduler, phases)


def test_a_setting_that_is_off_is_not_told() -> None:
    """What older versions wrote builds the same sampler, and is not taken for another run."""
    for name, build in samplers().items():
        off, on = (build(SCHEDULERS["edm"](), continuous=c) for c in (False, True))
        assert "continuous" not in json.dumps(plain_config(off)), name
        assert '"continuous": true' in json.dumps(plain_config(on)), name
        again = TimestepSampler.from_config(plain_config(off))
        assert not again.continuous
        assert torch.equal(again.probabilities(), off.probabilities())


@pytest.mark.parametrize("name", samplers())
def test_a_config_and_a_state_go_on_with_the_same_draws(name: str) -> None:
    sampler = samplers()[name](SCHEDULERS["edm"](), continuous=True, seed=11)
    sampler.sample(16)
    copy = TimestepSampler.from_config(json.loads(sampler.to_json_string()))
    copy.load_state_dict(sampler.state_dict())
    for _ in range(3):
        for ours, theirs in zip(parts(sampler.sample(16)), parts(copy.sample(16)), strict=True):
            assert torch.equal(ours, theirs)
    assert len(parts(sampler.sample(2))) == 4


def test_steps_and_slots_decide_the_draw() -> None:
    sampler = drawn_from("edm", "edm", draw="iid")
    first, again = sampler.sample(8, step=5), sampler.sample(8, step=5)
    assert torch.equal(first.log_snr, again.log_snr)
    assert not torch.equal(first.log_snr, sampler.sample(8, step=6).log_snr)
    levels = first.log_snr.sort().values
    assert all(a < b for a, b in pairwise(levels.tolist()))
