"""Laws over log-SNR against scipy, against themselves, and against worked numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from diffusers_curriculum.densities import DENSITIES, Density, make_density, register
from diffusers_curriculum.samplers import DensityTimestepSampler
from tests.densities.oracles import LAWS, ON_SCHEDULE
from tests.floors_fixtures import SCHEDULERS, levels_of

NO_EDGES = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)

IDS = [f"{name}-{'-'.join(map(str, args.values()))}" for name, args, _ in LAWS]
each_law = pytest.mark.parametrize(("name", "args", "oracle"), LAWS, ids=IDS)


def _law(name: str, args: dict[str, float]) -> Density:
    return make_density(name, NO_EDGES, **args)


def _t(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def test_every_registered_law_is_tested_here() -> None:
    assert set(DENSITIES) == {name for name, _, _ in LAWS} | set(ON_SCHEDULE)


@each_law
def test_against_scipy(name: str, args: dict[str, float], oracle: Any) -> None:
    law = _law(name, args)
    x = torch.linspace(-15, 15, 1201, dtype=torch.float64)
    torch.testing.assert_close(law.pdf(x), _t(oracle.pdf(x.numpy())), atol=0, rtol=1e-11)
    torch.testing.assert_close(law.cdf(x), _t(oracle.cdf(x.numpy())), atol=1e-15, rtol=1e-9)
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    torch.testing.assert_close(law.icdf(p), _t(oracle.ppf(p.numpy())), atol=1e-12, rtol=1e-11)


@each_law
def test_pdf_is_the_derivative_of_the_cdf(name: str, args: dict[str, float], oracle: Any) -> None:
    law, h = _law(name, args), 1e-4
    x = torch.linspace(-8, 8, 1000, dtype=torch.float64) + 0.003  # off the Laplace's kink
    slope = (law.cdf(x + h) - law.cdf(x - h)) / (2 * h)
    torch.testing.assert_close(slope, law.pdf(x), atol=1e-7, rtol=0)
    finer = (law.cdf(x + h / 2) - law.cdf(x - h / 2)) / h
    richardson = (4 * finer - slope) / 3
    torch.testing.assert_close(richardson, law.pdf(x), atol=1e-9, rtol=0)


@each_law
def test_cdf_and_survival_add_up_and_invert(name: str, args: dict[str, float], oracle: Any) -> None:
    law = _law(name, args)
    x = torch.linspace(-6, 6, 500, dtype=torch.float64)
    torch.testing.assert_close(law.sf(x), 1 - law.cdf(x), atol=1e-15, rtol=0)
    torch.testing.assert_close(law.icdf(law.cdf(x)), x, atol=1e-6, rtol=0)
    u = torch.linspace(1e-6, 1 - 1e-6, 1001, dtype=torch.float64)
    torch.testing.assert_close(law.cdf(law.icdf(u)), u, atol=1e-12, rtol=0)
    torch.testing.assert_close(law.sf(law.icdf(1 - u)), u, atol=1e-12, rtol=0)


@each_law
def test_ends_of_the_axis(name: str, args: dict[str, float], oracle: Any) -> None:
    law = _law(name, args)
    ends = _t([-math.inf, math.inf])
    assert law.cdf(ends).tolist() == [0.0, 1.0]
    assert law.sf(ends).tolist() == [1.0, 0.0]
    assert law.pdf(ends).tolist() == [0.0, 0.0]
    # Cauchy's quantile at 1 is tan(pi/2) in floating point in some libraries: here it is infinite
    assert law.icdf(_t([0.0, 1.0])).tolist() == [-math.inf, math.inf]


def test_tails_keep_their_digits_down_to_1e_300() -> None:
    laplace, cosine = _law("laplace", {"b": 0.5}), _law("cosine", {})
    normal, cauchy = _law("normal", {"std": 2.0}), _law("cauchy", {})
    x = _t([345.0])
    for tail in (laplace.cdf(-x), laplace.sf(x)):
        torch.testing.assert_close(tail.log(), _t([-690.0 - math.log(2)]), atol=1e-10, rtol=0)
    for tail in (cosine.cdf(-4 * x), cosine.sf(4 * x)):
        torch.testing.assert_close(
            tail.log(), _t([-690.0 + math.log(2 / math.pi)]), atol=1e-10, rtol=0
        )
    for tail in (normal.cdf(-_t([74.0])), normal.sf(_t([74.0]))):
        torch.testing.assert_close(tail.log(), _t([stats.norm.logcdf(-37.0)]), atol=1e-9, rtol=0)
    for tail in (cauchy.cdf(_t([-1e300])), cauchy.sf(_t([1e300]))):
        torch.testing.assert_close(tail, _t([1e-300 / math.pi]), atol=0, rtol=1e-12)


@pytest.mark.parametrize("p", [1e-300, 1e-100, 1e-20])
@each_law
def test_quantiles_of_tiny_probabilities(
    name: str, args: dict[str, float], oracle: Any, p: float
) -> None:
    law = _law(name, args)
    back = law.cdf(law.icdf(_t([p])))
    # d ln F / d ln x is up to |ln p|, which magnifies the rounding of the quantile
    torch.testing.assert_close(back, _t([p]), atol=0, rtol=1e-11)


@each_law
def test_masses_far_in_a_tail_keep_their_digits(
    name: str, args: dict[str, float], oracle: Any
) -> None:
    law = _law(name, args)
    edges = _t([30.0, 29.0, 28.0])
    clean = law.masses(edges)
    expected = _t(oracle.sf([29.0, 28.0]) - oracle.sf([30.0, 29.0]))
    torch.testing.assert_close(clean, expected, atol=0, rtol=1e-9)
    noisy = law.masses(-edges.flip(0))
    expected = _t(oracle.cdf([-28.0, -29.0]) - oracle.cdf([-29.0, -30.0]))
    torch.testing.assert_close(noisy, expected, atol=0, rtol=1e-9)


SURVIVAL = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95, 0.99]


@pytest.mark.parametrize(
    ("name", "args", "log_snr"),
    [
        ("laplace", {"b": 0.5}, "1.9560 1.1513 0.8047 0.3466 0 -0.3466 -1.1513 -1.9560"),
        ("laplace", {"b": 0.75}, "2.9340 1.7269 1.2071 0.5199 0 -0.5199 -1.7269 -2.9340"),
        ("laplace", {"mu": 1, "b": 2}, "8.8240 5.6052 4.2189 2.3863 1 -0.3863 -3.6052 -6.8240"),
        ("cauchy", {}, "31.8205 6.3138 3.0777 1 0 -1 -6.3138 -31.8205"),
        ("cosine", {}, "8.3070 5.0842 3.6855 1.7627 0 -1.7627 -5.0842 -8.3070"),
        ("cosine_scaled", {"s": 2}, "4.1535 2.5421 1.8427 0.8814 0 -0.8814 -2.5421 -4.1535"),
        # EDM's log-normal sigma (-1.2, 1.2), and the logit-normal (0, 1) of rectified flows
        (
            "normal",
            {"mean": 2.4, "std": 2.4},
            "7.9832 6.3476 5.4757 4.0188 2.4 .7812 -1.5476 -3.1832",
        ),
        ("normal", {"mean": 0, "std": 2}, "4.6527 3.2897 2.5631 1.3490 0 -1.3490 -3.2897 -4.6527"),
    ],
)
def test_log_snr_at_given_survival(name: str, args: dict[str, float], log_snr: str) -> None:
    law, expected = _law(name, args), _t([float(v) for v in log_snr.split()])
    torch.testing.assert_close(law.icdf(1 - _t(SURVIVAL)), expected, atol=6e-5, rtol=0)
    torch.testing.assert_close(law.sf(expected), _t(SURVIVAL), atol=5e-5, rtol=0)


def test_laplace_in_the_units_of_three_families() -> None:
    lam = _law("laplace", {"b": 0.5}).icdf(1 - _t([0.05, 0.25, 0.5, 0.75, 0.95]))
    flow = _t([0.359935, 0.456786, 0.5, 0.543214, 0.640065])
    edm = _t([0.562341, 0.840896, 1, 1.189207, 1.778279])
    power = _t([0.759747, 0.585786, 0.5, 0.414214, 0.240253])
    torch.testing.assert_close(torch.sigmoid(-lam / 2), flow, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.exp(-lam / 2), edm, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.sigmoid(lam), power, atol=1e-6, rtol=0)


# -- laws on schedules -----------------------------------------------------------------------------

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
QUANTILES: dict[tuple[str, tuple[tuple[str, float], ...]], tuple[str, str, str]] = {
    ("laplace", (("b", 0.5),)): (
        "161/226/258/292/372",
        "196/303/354/406/528",
        "320/440/495/550/670",
    ),
    ("laplace", (("b", 0.75),)): (
        "123/211/258/309/430",
        "135/278/354/433/610",
        "247/413/495/578/743",
    ),
    ("laplace", (("mu", 1), ("b", 2))): (
        "17/90/173/296/592",
        "7/87/214/400/767",
        "34/182/342/558/895",
    ),
    ("normal", (("mean", 2.4), ("std", 2.4))): (
        "9/37/88/189/412",
        "2/21/85/247/586",
        "19/77/179/373/722",
    ),
    ("normal", (("mean", 0), ("std", 2))): (
        "55/147/258/392/571",
        "38/173/353/554/796",
        "114/293/495/697/877",
    ),
    ("cosine", ()): ("22/122/258/432/698", "10/132/341/581/866", "45/246/497/748/949"),
}
FLOOR_01 = ("151/227/261/303/520", "177/301/356/419/621", "275/433/495/557/718")
NO_CELL_WIDTH = ("173/232/261/296/375", "216/310/357/409/526", "335/443/495/547/655")
SCHEDULES = ("linear", "sd", "cosine")


def _quantiles(mass: Tensor) -> list[int]:
    """First index with cumulative mass of at least each level."""
    return torch.searchsorted(mass.cumsum(0), _t(LEVELS)).tolist()


def _numbers(text: str) -> list[int]:
    return [int(v) for v in text.split("/")]


@pytest.mark.parametrize("column", range(3), ids=SCHEDULES)
@pytest.mark.parametrize("law", QUANTILES, ids=lambda law: f"{law[0]}{dict(law[1])}")
def test_timestep_quantiles(law: tuple[str, tuple[tuple[str, float], ...]], column: int) -> None:
    sampler = DensityTimestepSampler(
        SCHEDULERS[SCHEDULES[column]](), law[0], dict(law[1]), floor=0.0
    )
    expected = _numbers(QUANTILES[law][column])
    assert _quantiles(sampler.probabilities()) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("column", range(3), ids=SCHEDULES)
def test_timestep_quantiles_with_a_floor(column: int) -> None:
    sampler = DensityTimestepSampler(SCHEDULERS[SCHEDULES[column]](), "laplace", floor=0.1)
    expected = _numbers(FLOOR_01[column])
    assert _quantiles(sampler.probabilities()) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("column", range(3), ids=SCHEDULES)
def test_the_cell_width_is_not_forgotten(column: int) -> None:
    """Masses that leave out the cell width are a known mistake: the control gives its numbers, and
    they are not those of the library."""
    name, wrong_row = SCHEDULES[column], _numbers(NO_CELL_WIDTH[column])
    levels = levels_of(name)
    wrong = _law("laplace", {"b": 0.5}).pdf(levels.log_snr)
    assert _quantiles(wrong / wrong.sum()) == pytest.approx(wrong_row, abs=1)
    right = DensityTimestepSampler(SCHEDULERS[name](), "laplace", floor=0.0).probabilities()
    assert max(abs(a - b) for a, b in zip(_quantiles(right), wrong_row, strict=True)) > 5


@pytest.mark.parametrize(
    ("name", "largest", "at", "mean"),
    [
        ("linear", 1.04743e-2, 258, 261.147),
        ("sd", 6.63984e-3, 354, 356.966),
        ("cosine", 6.21471e-3, 495, 495.053),
    ],
)
def test_largest_mass_and_mean_timestep(name: str, largest: float, at: int, mean: float) -> None:
    mass = DensityTimestepSampler(SCHEDULERS[name](), "laplace", floor=0.0).probabilities()
    # cell widths read from the float32 table are good to four digits
    assert float(mass.max()) == pytest.approx(largest, rel=2e-4)
    assert int(mass.argmax()) == at
    assert float((mass * torch.arange(1000)).sum()) == pytest.approx(mean, abs=2e-3)


@pytest.mark.parametrize(
    ("outer_edges", "first", "last"),
    [("clip", 4.79e-3, 6.6e-5), ("half", 8.77e-3, 1.31e-4), ("inf", 2.86e-2, 2.08e-2)],
)
def test_outer_edges_decide_the_masses_of_the_ends(
    outer_edges: str, first: float, last: float
) -> None:
    mass = DensityTimestepSampler(
        SCHEDULERS["sd"](), "laplace", {"mu": 1, "b": 2}, floor=0.0, outer_edges=outer_edges
    ).probabilities()
    assert float(mass[0]) == pytest.approx(first, rel=6e-3)
    assert float(mass[-1]) == pytest.approx(last, rel=1e-2)


@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
@each_law
def test_masses_add_up_to_the_mass_of_the_schedule(
    name: str, args: dict[str, float], oracle: Any, schedule: str
) -> None:
    edges, law = levels_of(schedule).edges, _law(name, args)
    masses = law.masses(edges)
    assert bool((masses >= 0).all())
    top, bottom = float(edges[0]), float(edges[-1])
    assert float(masses.sum()) == pytest.approx(oracle.cdf(top) - oracle.cdf(bottom), abs=1e-12)


@pytest.mark.parametrize("outer_edges", ["half", "clip", "inf"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
@each_law
def test_probabilities_add_up_to_one(
    name: str, args: dict[str, float], oracle: Any, schedule: str, outer_edges: str
) -> None:
    sampler = DensityTimestepSampler(
        SCHEDULERS[schedule](), name, args, floor=0.1, outer_edges=outer_edges
    )
    mass = sampler.probabilities()
    assert mass.dtype == torch.float64
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
    assert float(mass.min()) >= 0.1 / len(mass)


@given(
    mu=st.floats(-5, 5),
    b=st.floats(0.05, 5),
    p=st.floats(1e-12, 1 - 1e-12),
    name=st.sampled_from(["laplace", "cauchy"]),
)
def test_quantile_and_cdf_invert_for_any_parameters(
    mu: float, b: float, p: float, name: str
) -> None:
    law = _law(name, {"mu": mu, "b" if name == "laplace" else "gamma": b})
    assert float(law.cdf(law.icdf(_t(p)))) == pytest.approx(p, rel=1e-6, abs=1e-12)


def test_relations_between_laws() -> None:
    x = torch.linspace(-9, 9, 181, dtype=torch.float64)
    cosine = _law("cosine", {})
    # density of log-SNR = 2 ln cot(pi t / 2) under uniform t
    t = (2 / math.pi) * torch.atan(torch.exp(-x / 2))
    torch.testing.assert_close(cosine.cdf(x), 1 - t, atol=1e-14, rtol=0)
    assert torch.equal(_law("cosine_shifted", {"mu": 0.0}).cdf(x), cosine.cdf(x))
    assert torch.equal(_law("cosine_scaled", {"s": 1.0}).cdf(x), cosine.cdf(x))
    scaled = _law("cosine_scaled", {"s": 2.0}).cdf(x)
    torch.testing.assert_close(scaled, cosine.cdf(2 * x), atol=1e-15, rtol=0)
    shifted = _law("cosine_shifted", {"mu": 1.5}).pdf(x)
    torch.testing.assert_close(shifted, cosine.pdf(x - 1.5), atol=1e-15, rtol=0)


def test_moving_the_law_and_shifting_the_schedule_are_the_same() -> None:
    shift = 2 * math.log(3)
    flow = DensityTimestepSampler(SCHEDULERS["flow"](), "laplace", {"b": 0.5}, floor=0.0)
    moved = DensityTimestepSampler(
        SCHEDULERS["flow_shift_3"](), "laplace", {"mu": -shift, "b": 0.5}, floor=0.0
    )
    torch.testing.assert_close(moved.probabilities(), flow.probabilities(), atol=1e-7, rtol=1e-3)


# -- the reference: uniform over timesteps ---------------------------------------------------------


@pytest.mark.parametrize("outer_edges", ["half", "clip", "inf"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
def test_uniform_is_exactly_uniform_over_timesteps(schedule: str, outer_edges: str) -> None:
    sampler = DensityTimestepSampler(
        SCHEDULERS[schedule](), "uniform", floor=0.0, outer_edges=outer_edges
    )
    mass = sampler.probabilities()
    assert torch.equal(mass, torch.full_like(mass, 1 / len(mass)))


@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
def test_the_uniform_law_as_a_law_of_log_snr(schedule: str) -> None:
    levels = levels_of(schedule)
    edges, count = levels.edges, len(levels)
    law = make_density("uniform", edges)
    share = torch.arange(count, -1, -1, dtype=torch.float64) / count
    finite = edges.isfinite()
    torch.testing.assert_close(law.cdf(edges)[finite], share[finite], atol=1e-12, rtol=0)
    torch.testing.assert_close(law.sf(edges)[finite], 1 - share[finite], atol=1e-12, rtol=0)
    assert law.cdf(_t([-math.inf, math.inf])).tolist() == [0.0, 1.0]
    inside = (edges[:-1] + edges[1:])[finite[1:]] / 2
    p = law.cdf(inside)
    torch.testing.assert_close(law.icdf(p), inside, atol=1e-8, rtol=0)
    widths = -edges.diff()[finite[1:]]
    torch.testing.assert_close(law.pdf(inside), 1 / (count * widths), atol=0, rtol=1e-12)
    assert law.pdf(edges[:1] + 1).tolist() == [0.0]


def test_the_uniform_law_holds_an_atom_at_the_terminal_level() -> None:
    levels = levels_of("sd_zero_terminal")
    law = make_density("uniform", levels.edges)
    lowest = float(levels.edges[-2])
    assert float(law.cdf(_t(lowest - 50.0))) == pytest.approx(1 / 1000, abs=1e-15)
    assert float(law.icdf(_t(0.0005))) == -math.inf
    assert float(law.icdf(_t(0.0015))) > lowest
    assert float(law.pdf(_t(lowest - 50.0))) == 0.0


def test_the_uniform_law_on_other_edges() -> None:
    law = make_density("uniform", NO_EDGES)
    masses = law.masses(_t([2.0, 1.5, 1.0, 0.25, 0.0]))
    torch.testing.assert_close(masses, _t([0.25, 0.25, 0.375, 0.125]), atol=1e-15, rtol=0)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("laplac", {}, r"'laplac' is unknown: choose from .*laplace"),
        ("laplace", {"scale": 1.0}, r"'laplace' has no parameter 'scale': it takes mu, b"),
        ("cosine", {"mu": 1.0}, r"'cosine' has no parameter 'mu': it takes none"),
        ("uniform", {"edges": 1.0}, r"'uniform' has no parameter 'edges'"),
        ("laplace", {"b": 0.0}, r"b=0.0 must be greater than 0"),
        ("cauchy", {"gamma": -1}, r"gamma=-1 must be greater than 0"),
        ("cosine_scaled", {"s": -2.0}, r"s=-2.0 must be greater than 0"),
        ("normal", {"std": 0}, r"std=0 must be greater than 0"),
        ("laplace", {"mu": math.nan}, r"mu=nan is not a finite number"),
        ("laplace", {"b": math.inf}, r"b=inf is not a finite number"),
        ("laplace", {"mu": "1"}, r"mu='1' is not a finite number"),
        ("laplace", {"mu": True}, r"mu=True is not a finite number"),
    ],
)
def test_wrong_names_and_numbers_are_refused(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_density(name, NO_EDGES, **parameters)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'laplace' exists already"):
        register("laplace")(Density)
    assert DENSITIES["laplace"] is not Density


def test_the_base_class_has_no_law() -> None:
    law = Density()
    for method in (law.pdf, law.cdf, law.sf, law.icdf):
        with pytest.raises(NotImplementedError):
            method(NO_EDGES)
