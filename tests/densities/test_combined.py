"""Mixtures and conditional laws, of any densities, on any schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.densities import Density, make_density
from tests.densities.oracles import ON_SCHEDULE
from tests.floors_fixtures import SCHEDULERS, levels_of

each_schedule = pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
EDGES = torch.linspace(8.0, -6.0, 15, dtype=torch.float64)


def _t(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _law(name: str, edges: Tensor = EDGES, /, **args: Any) -> Density:
    return make_density(name, edges, **args)


def _mixture(*components: dict[str, Any]) -> Density:
    return _law("mixture", components=list(components))


# -- mixtures --------------------------------------------------------------------------------------


@each_schedule
def test_a_component_of_the_reference_is_the_samplers_floor(schedule: str) -> None:
    components = [
        {"density": "laplace", "weight": 0.9, "b": 0.75},
        {"density": "uniform", "weight": 0.1},
    ]
    mixed = DensityTimestepSampler(
        SCHEDULERS[schedule](), "mixture", {"components": components}, floor=0.0
    )
    floored = DensityTimestepSampler(SCHEDULERS[schedule](), "laplace", {"b": 0.75}, floor=0.1)
    # the sampler normalises the law on the schedule before it mixes, the mixture after
    missing = 1 - float(
        make_density("laplace", mixed.levels.edges, b=0.75).cdf(mixed.levels.edges[0])
        - make_density("laplace", mixed.levels.edges, b=0.75).cdf(mixed.levels.edges[-1])
    )
    torch.testing.assert_close(
        mixed.probabilities(), floored.probabilities(), atol=2 * missing + 1e-15, rtol=0
    )
    assert float(mixed.probabilities().min()) >= 0.1 / len(mixed.levels)


def test_masses_are_the_weighted_means_exactly() -> None:
    edges = levels_of("sd_zero_terminal").edges
    speed, laplace = _law("speed", edges), _law("laplace", edges)
    mixed = _law(
        "mixture",
        edges,
        components=[{"density": "speed", "weight": 3}, {"density": "laplace", "weight": 1}],
    )
    expected = 0.75 * speed.masses(edges) + 0.25 * laplace.masses(edges)
    torch.testing.assert_close(mixed.masses(edges), expected, atol=0, rtol=1e-14)


def test_weights_are_relative_and_one_by_default() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    one = _mixture({"density": "laplace", "weight": 30}, {"density": "cauchy", "weight": 10})
    two = _mixture({"density": "laplace", "weight": 0.3}, {"density": "cauchy", "weight": 0.1})
    torch.testing.assert_close(one.cdf(x), two.cdf(x), atol=1e-15, rtol=0)
    even = _mixture({"density": "laplace"}, {"density": "cauchy"})
    expected = (_law("laplace").cdf(x) + _law("cauchy").cdf(x)) / 2
    torch.testing.assert_close(even.cdf(x), expected, atol=1e-15, rtol=0)
    huge = _mixture({"density": "laplace", "weight": 1e308}, {"density": "cauchy", "weight": 1e308})
    torch.testing.assert_close(huge.cdf(x), expected, atol=1e-15, rtol=0)
    assert torch.equal(_mixture({"density": "laplace"}).cdf(x), _law("laplace").cdf(x))


def test_parameters_stand_beside_or_under_density_args() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    flat = _mixture({"density": "laplace", "mu": 1.0, "b": 2.0})
    nested = _mixture({"density": "laplace", "density_args": {"mu": 1.0, "b": 2.0}})
    both = _mixture({"density": "laplace", "mu": 1.0, "density_args": {"b": 2.0}})
    assert torch.equal(flat.cdf(x), nested.cdf(x))
    assert torch.equal(flat.cdf(x), both.cdf(x))


def test_quantiles_of_mixtures_far_out() -> None:
    law = _mixture({"density": "laplace", "b": 1.0}, {"density": "normal", "mean": 3.0})
    for p in (1e-12, 1e-100, 1e-290):
        x = law.icdf(_t([p]))
        torch.testing.assert_close(law.cdf(x), _t([p]), atol=0, rtol=1e-11)
        # there the Laplace is all there is
        torch.testing.assert_close(x, _t([math.log(4 * p)]), atol=1e-3, rtol=0)
    assert law.icdf(_t([0.0, 1.0])).tolist() == [-math.inf, math.inf]
    for rest in (2.0**-30, 2.0**-52):  # the clean tail, of which 1 - p still says all
        x = law.icdf(_t([1 - rest]))
        torch.testing.assert_close(law.sf(x), _t([rest]), atol=0, rtol=1e-11)


def test_a_mixture_of_two_ranges_ends_where_they_do_and_leaves_a_gap() -> None:
    low = {"density": "log_snr_uniform", "low": -3.0, "high": -1.0}
    high = {"density": "log_snr_uniform", "low": 2.0, "high": 4.0, "weight": 3.0}
    law = _mixture(low, high)
    assert law.support == (-3.0, 4.0)
    p = _t([0.0, 0.125, 0.5, 0.75, 1.0])
    expected = _t([-3.0, -2.0, 2 + 2 / 3, 2 + 4 / 3, 4.0])
    torch.testing.assert_close(law.icdf(p), expected, atol=1e-14, rtol=0)
    assert law.pdf(_t([-2.0, 0.0, 3.0])).tolist() == [0.125, 0.0, 0.375]


def test_the_tails_of_a_mixture_keep_their_digits() -> None:
    law = _mixture({"density": "laplace", "b": 1.0}, {"density": "laplace", "b": 0.5, "weight": 3})
    x = _t([200.0])
    tail = _t([0.25 * math.exp(-200) / 2 + 0.75 * math.exp(-400) / 2])
    torch.testing.assert_close(law.sf(x), tail, atol=0, rtol=1e-13)
    torch.testing.assert_close(law.cdf(-x), tail, atol=0, rtol=1e-13)
    masses = law.masses(_t([201.0, 200.0]))
    expected = tail - _t([0.25 * math.exp(-201) / 2 + 0.75 * math.exp(-402) / 2])
    torch.testing.assert_close(masses, expected, atol=0, rtol=1e-12)


@each_schedule
def test_a_mixture_of_mixtures_is_a_mixture(schedule: str) -> None:
    edges = levels_of(schedule).edges
    inner = {
        "density": "mixture",
        "weight": 2,
        "components": [{"density": "cauchy"}, {"density": "uniform"}],
    }
    nested = _law("mixture", edges, components=[inner, {"density": "beta", "weight": 2}])
    flat = _law(
        "mixture",
        edges,
        components=[
            {"density": "cauchy", "weight": 1},
            {"density": "uniform", "weight": 1},
            {"density": "beta", "weight": 2},
        ],
    )
    torch.testing.assert_close(nested.masses(edges), flat.masses(edges), atol=0, rtol=1e-14)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (None, r"components=None is not a list of densities: write"),
        ({"density": "laplace"}, r"is not a list of densities"),
        ([], r"components=\[\] is empty"),
        (["laplace"], r"components\[0\]='laplace' names no density: write"),
        ([{"weight": 1}], r"names no density"),
        ([{"density": "laplac"}], r"'laplac' is unknown: choose from .*laplace"),
        ([{"density": ["laplace"]}], r"\['laplace'\] is unknown"),
        ([{"density": "laplace"}, {"density": "cosine", "weight": 0}], r"components\[1\].*greater"),
        ([{"density": "laplace", "weight": -1}], r"'weight'\]=-1 must be greater than 0"),
        ([{"density": "laplace", "weight": "1"}], r"'weight'\]='1' is not a finite number"),
        ([{"density": "laplace", "weight": math.nan}], r"=nan is not a finite number"),
        ([{"density": "laplace", "b": -1}], r"components\[0\]: b=-1 must be greater than 0"),
        ([{"density": "laplace", "s": 1}], r"components\[0\]: .* has no parameter 's'"),
        ([{"density": "spline"}], r"components\[0\]: density 'spline' needs 'points'"),
        ([{"density": "laplace", "density_args": 3}], r"density_args=3 is not a dict"),
        (
            [{"density": "laplace", "b": 1, "density_args": {"b": 2}}],
            r"'b' stands in density_args and beside it",
        ),
    ],
)
def test_mixtures_that_are_refused(components: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _law("mixture", components=components)
    with pytest.raises(ValueError, match=message):
        DensityTimestepSampler(SCHEDULERS["sd"](), "mixture", {"components": components})


# -- truncation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-2.0, 1.0), (None, 0.5), (-1.5, None)])
def test_the_part_between_two_levels_is_scipys(low: float | None, high: float | None) -> None:
    law = _law("truncated", density="normal", mean=1.0, std=2.0, low=low, high=high)
    a = -math.inf if low is None else (low - 1) / 2
    b = math.inf if high is None else (high - 1) / 2
    oracle: Any = stats.truncnorm(a, b, loc=1, scale=2)
    x = torch.linspace(-6, 8, 401, dtype=torch.float64)
    torch.testing.assert_close(law.pdf(x), _t(oracle.pdf(x.numpy())), atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(law.cdf(x), _t(oracle.cdf(x.numpy())), atol=1e-14, rtol=0)
    torch.testing.assert_close(law.sf(x), _t(oracle.sf(x.numpy())), atol=1e-14, rtol=0)
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    torch.testing.assert_close(law.icdf(p), _t(oracle.ppf(p.numpy())), atol=1e-11, rtol=0)


def test_a_part_far_in_a_tail_keeps_its_shape() -> None:
    """Laplace beyond its centre is an exponential law, however far."""
    for sign in (1.0, -1.0):
        ends = {"low": 40.0, "high": 50.0} if sign > 0 else {"low": -50.0, "high": -40.0}
        law = _law("truncated", density="laplace", b=0.5, **ends)
        x = sign * _t([40.0, 40.1, 41.0, 45.0, 50.0])
        expected = (1 - torch.exp(-2 * (x.abs() - 40))) / (1 - math.exp(-20))
        found = law.cdf(x) if sign > 0 else law.sf(x)
        torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-11)
        p = _t([0.1, 0.5, 0.9])
        x = law.icdf(p)
        torch.testing.assert_close(law.cdf(x), p, atol=1e-12, rtol=0)


@each_schedule
@pytest.mark.parametrize("name", [*sorted(ON_SCHEDULE), "laplace", "cosine", "mode"])
def test_a_range_of_timesteps_is_the_conditional_law(name: str, schedule: str) -> None:
    edges = levels_of(schedule).edges
    args = ON_SCHEDULE[name][0] if name in ON_SCHEDULE else {}
    whole = _law(name, edges, **args).masses(edges)
    first, last = 150, 420
    law = _law(
        "truncated", edges, density=name, density_args=args, min_timestep=first, max_timestep=last
    )
    masses = law.masses(edges)
    assert float(masses[:first].sum() + masses[last + 1 :].sum()) == 0.0
    expected = whole[first : last + 1] / whole[first : last + 1].sum()
    torch.testing.assert_close(masses[first : last + 1], expected, atol=1e-15, rtol=1e-11)


@each_schedule
@pytest.mark.parametrize("outer_edges", ["half", "clip", "inf"])
def test_both_limits_of_a_range_are_kept(outer_edges: str, schedule: str) -> None:
    levels = levels_of(schedule, outer_edges)
    last = len(levels) - 1
    for limits, kept in [
        ({"min_timestep": last}, [last]),
        ({"max_timestep": 0}, [0]),
        ({"min_timestep": last - 1}, [last - 1, last]),
        ({"min_timestep": 7, "max_timestep": 7}, [7]),
        ({"min_timestep": 0, "max_timestep": last}, list(range(last + 1))),
    ]:
        law = _law("truncated", levels.edges, density="uniform", **limits)
        masses = law.masses(levels.edges)
        assert masses.nonzero().flatten().tolist() == kept
        torch.testing.assert_close(
            masses[kept], torch.full_like(masses[kept], 1 / len(kept)), atol=1e-15, rtol=1e-12
        )


def test_a_cell_cut_by_a_level_keeps_its_part() -> None:
    law = _law("truncated", _t([2, 1, 0, -1]), density="uniform", low=0.5)
    masses = law.masses(_t([2, 1, 0, -1]))
    torch.testing.assert_close(masses, _t([2 / 3, 1 / 3, 0]), atol=1e-15, rtol=0)


def test_the_atom_at_the_terminal_level_stays_or_goes() -> None:
    edges = levels_of("sd_zero_terminal").edges
    kept = _law("truncated", edges, density="uniform", high=0.0).masses(edges)
    assert float(kept[-1]) == pytest.approx(float(kept[-2]), rel=1e-9)
    assert float(kept[-1]) > 0
    cut = _law("truncated", edges, density="uniform", low=-100.0).masses(edges)
    assert float(cut[-1]) == 0.0


def test_a_part_of_a_part_is_a_part() -> None:
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    inner = {"density": "cauchy", "density_args": {"gamma": 2.0}, "low": -3.0, "high": 3.0}
    nested = _law("truncated", density="truncated", density_args=inner, low=-1.0, high=5.0)
    direct = _law("truncated", density="cauchy", gamma=2.0, low=-1.0, high=3.0)
    torch.testing.assert_close(nested.cdf(x), direct.cdf(x), atol=1e-14, rtol=0)
    assert nested.support == (-1.0, 3.0)


def test_names_that_are_taken_go_under_density_args() -> None:
    law = _law(
        "truncated", density="log_snr_uniform", density_args={"low": -2.0, "high": 4.0}, low=0.0
    )
    x = _t([-1.0, 0.0, 1.0, 4.0])
    torch.testing.assert_close(law.cdf(x), _t([0, 0, 0.25, 1]), atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"low": 0}, r"'truncated' needs 'density', for example"),
        ({"density": "laplac", "low": 0}, r"'laplac' is unknown"),
        ({"density": 3, "low": 0}, r"density 3 is unknown"),
        ({"density": "laplace"}, r"needs low or high .*limits of one of the two kinds"),
        ({"density": "laplace", "low": 0, "max_timestep": 3}, r"limits of one of the two kinds"),
        ({"density": "laplace", "low": 1, "high": 1}, r"keeps nothing"),
        ({"density": "laplace", "low": 2, "high": 1}, r"keeps nothing"),
        ({"density": "laplace", "low": math.nan}, r"low=nan is not a finite number"),
        ({"density": "laplace", "high": "1"}, r"high='1' is not a finite number"),
        ({"density": "laplace", "min_timestep": -1}, r"min_timestep=-1 must be a whole number"),
        ({"density": "laplace", "max_timestep": 1.5}, r"max_timestep=1.5 must be a whole number"),
        ({"density": "laplace", "max_timestep": True}, r"max_timestep=True must be a whole"),
        ({"density": "laplace", "max_timestep": 14}, r"max_timestep=14 .* <= 13, the noisiest"),
        (
            {"density": "laplace", "min_timestep": 5, "max_timestep": 4},
            r"min_timestep=5 and max_timestep=4",
        ),
        ({"density": "laplace", "low": 0, "scale": 1}, r"'laplace' has no parameter 'scale'"),
        ({"density": "laplace", "low": 0, "b": 0}, r"b=0 must be greater than 0"),
        ({"density": "laplace", "low": 0, "density_args": []}, r"density_args=\[\] is not a dict"),
        (
            {"density": "laplace", "low": 0, "b": 1, "density_args": {"b": 2}},
            r"'b' stands in density_args and beside it",
        ),
        ({"density": "laplace", "low": 800}, r"has no mass between log-SNR 800 and inf"),
        ({"density": "log_snr_uniform", "low": 20}, r"keeps nothing"),
    ],
)
def test_parts_that_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _law("truncated", **args)
