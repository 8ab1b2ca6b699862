"""Laws of the time fraction: beta, SpeeD, timestep bias, and one of one's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mpmath
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import special, stats
from torch import Tensor

from diffusers_curriculum.densities import TimeDensity, make_density
from diffusers_curriculum.densities.time_laws import incomplete_beta
from tests.densities.oracles import bias_weights, speed_weights
from tests.floors_fixtures import SCHEDULERS, levels_of

each_schedule = pytest.mark.parametrize("schedule", sorted(SCHEDULERS))


def _t(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _edges(count: int) -> Tensor:
    return torch.linspace(8.0, -6.0, count + 1, dtype=torch.float64)


def _masses(name: str, count: int = 1000, **args: Any) -> Tensor:
    edges = _edges(count)
    return make_density(name, edges, **args).masses(edges)


@each_schedule
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 1), (0.5, 1), (1, 3), (2.5, 2.5), (60, 40)])
def test_beta_masses(alpha: float, beta: float, schedule: str) -> None:
    edges = levels_of(schedule).edges
    masses = make_density("beta", edges, alpha=alpha, beta=beta).masses(edges)
    tau = torch.arange(len(edges), dtype=torch.float64).numpy() / (len(edges) - 1)
    law = stats.beta(alpha, beta)
    below, above = law.cdf(tau[1:]) - law.cdf(tau[:-1]), law.sf(tau[:-1]) - law.sf(tau[1:])
    expected = torch.where(_t(law.cdf(tau[:-1])) < 0.5, _t(below), _t(above))
    # neighbouring values of the cdf share most of their digits
    torch.testing.assert_close(masses, expected, atol=0, rtol=1e-11)


@pytest.mark.parametrize(
    ("args", "quantiles"),
    [
        ({}, "0.02364 0.17678 0.42045 0.69795 0.93790"),
        ({"alpha": 0.5}, "0.0025 0.0625 0.25 0.5625 0.9025"),
        ({"alpha": 1, "beta": 3}, "0.01695 0.09144 0.20630 0.37004 0.63160"),
    ],
)
def test_beta_quantiles(args: dict[str, float], quantiles: str) -> None:
    law = make_density("beta", _edges(1000), **args)
    assert isinstance(law, TimeDensity)
    found = law.time_icdf(_t([0.05, 0.25, 0.5, 0.75, 0.95]))
    expected = _t([float(q) for q in quantiles.split()])
    torch.testing.assert_close(found, expected, atol=6e-6, rtol=0)


@pytest.mark.parametrize("a", [0.01, 0.5, 1.0, 3.7, 80.0, 1000.0])
@pytest.mark.parametrize("b", [0.01, 0.5, 1.0, 3.7, 80.0, 1000.0])
def test_incomplete_beta(a: float, b: float) -> None:
    # scipy is good to 4e-11 only where x is all but 1, hence mpmath for the ends
    x = torch.linspace(0, 1, 201, dtype=torch.float64)
    found = incomplete_beta(a, b, x)
    for ours, function in zip(found, (special.betainc, special.betaincc), strict=True):
        expected = _t(function(a, b, x.numpy()))
        torch.testing.assert_close(ours, expected, atol=1e-300, rtol=3e-11)


@pytest.mark.parametrize(("a", "b"), [(0.01, 0.5), (0.5, 0.5), (0.8, 1.0), (3.7, 0.5), (2.0, 80.0)])
def test_incomplete_beta_at_its_ends(a: float, b: float) -> None:
    x = [1e-300, 1e-12, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-12]
    lower, upper = incomplete_beta(a, b, _t(x))
    with mpmath.workdps(60):
        whole = [mpmath.betainc(a, b, 0, mpmath.mpf(v), regularized=True) for v in x]
        expected, rest = _t([float(w) for w in whole]), _t([float(1 - w) for w in whole])
    torch.testing.assert_close(lower, expected, atol=1e-300, rtol=1e-11)
    torch.testing.assert_close(upper, rest, atol=1e-16, rtol=1e-11)


def test_speed_in_the_numbers_of_its_paper() -> None:
    masses = _masses("speed")
    assert float(masses[0]) == pytest.approx(1.315789e-3, rel=1e-6)
    assert float(masses[999]) == pytest.approx(2.631579e-4, rel=1e-6)
    assert float(masses[:700].sum()) == pytest.approx(0.921053, abs=5e-7)
    expected = _t(speed_weights(1000, 700, 5.0))
    torch.testing.assert_close(masses, expected / expected.sum(), atol=0, rtol=1e-12)


@pytest.mark.parametrize(("tau", "steps"), [(0.7, 700), (700, 700), (250.0, 250), (0.25, 250)])
def test_speed_takes_a_fraction_or_a_number_of_timesteps(tau: float, steps: int) -> None:
    expected = _t(speed_weights(1000, steps, 2.0))
    found = _masses("speed", tau=tau, k=2.0)
    torch.testing.assert_close(found, expected / expected.sum(), atol=0, rtol=1e-12)


def test_a_timestep_that_straddles_the_end_of_speed_gets_both_parts() -> None:
    masses = _masses("speed", count=10, tau=0.75, k=3.0)
    expected = _t([3] * 7 + [2] + [1] * 2)
    torch.testing.assert_close(masses, expected / expected.sum(), atol=1e-15, rtol=0)


def _diffusers_weights(strategy: str, count: int, portion: float, multiplier: float) -> Tensor:
    """What the SDXL script makes of its flags, by brute force."""
    size = int(portion * count)
    chosen = range(size) if strategy == "earlier" else range(count - size, count)
    return _t(bias_weights(count, chosen, multiplier))


@pytest.mark.parametrize("count", [10, 37, 1000])
@pytest.mark.parametrize("strategy", ["earlier", "later"])
@pytest.mark.parametrize("multiplier", [0.3, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("portion", [0.1, 0.25, 0.999, 1.0])
def test_bias_to_one_end(strategy: str, multiplier: float, portion: float, count: int) -> None:
    weights = _diffusers_weights(strategy, count, portion, multiplier)
    found = _masses(
        "timestep_bias", count, strategy=strategy, multiplier=multiplier, portion=portion
    )
    torch.testing.assert_close(found, weights / weights.sum(), atol=0, rtol=1e-12)


@pytest.mark.parametrize(
    ("begin", "end"), [(0, 1000), (0, 1), (200, 500), (999, 1000), (None, 300), (700, None)]
)
def test_bias_to_a_range_without_its_end(begin: int | None, end: int | None) -> None:
    chosen = range(begin or 0, 1000 if end is None else end)
    weights = _t(bias_weights(1000, chosen, 4.0))
    found = _masses("timestep_bias", strategy="range", begin=begin, end=end, multiplier=4.0)
    torch.testing.assert_close(found, weights / weights.sum(), atol=0, rtol=1e-12)


def test_the_last_quarter_four_times_as_likely_is_four_sevenths() -> None:
    masses = _masses("timestep_bias", strategy="later", multiplier=4.0)
    assert float(masses[750:].sum()) == pytest.approx(4 / 7, abs=1e-14)


@dataclass(frozen=True, eq=False)
class Ramp(TimeDensity):
    """p(tau) = 2 tau, with nothing but the two methods that a law of time must have."""

    def time_pdf(self, tau: Tensor) -> Tensor:
        return 2 * tau

    def time_cdf(self, tau: Tensor) -> Tensor:
        return tau.square()


@each_schedule
def test_a_law_of_time_of_ones_own(schedule: str) -> None:
    edges = levels_of(schedule).edges
    law, count = Ramp(edges), len(edges) - 1
    expected = (2 * torch.arange(count, dtype=torch.float64) + 1) / count**2
    torch.testing.assert_close(law.masses(edges), expected, atol=1e-15, rtol=0)
    p = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(law.time_icdf(p), p.sqrt(), atol=1e-14, rtol=0)
    finite = law.icdf(p).isfinite()
    torch.testing.assert_close(law.cdf(law.icdf(p))[finite], p[finite], atol=1e-12, rtol=0)
    # other cells than the schedule's own
    halves = torch.stack([edges[0], edges[count // 2], edges[-1]])
    share = (count // 2 / count) ** 2
    torch.testing.assert_close(law.masses(halves), _t([share, 1 - share]), atol=1e-14, rtol=0)


def test_quantiles_of_time_in_the_noisy_tail() -> None:
    law = make_density("beta", _edges(1000), alpha=0.5, beta=4.0)
    assert isinstance(law, TimeDensity)
    for rest in (2.0**-30, 2.0**-50):
        tau = law.time_icdf(_t([1 - rest]))
        torch.testing.assert_close(law.time_sf(tau), _t([rest]), atol=0, rtol=1e-9)


def test_a_law_of_time_without_its_two_methods_has_none() -> None:
    law = TimeDensity(_edges(4))
    for method in (law.time_pdf, law.time_cdf):
        with pytest.raises(NotImplementedError):
            method(_t([0.5]))


def test_the_terminal_level_holds_its_share_as_an_atom() -> None:
    edges = levels_of("sd_zero_terminal").edges
    law = make_density("beta", edges, alpha=1.0, beta=0.5)  # most of it at the noisy end
    atom = float(law.masses(edges)[-1])
    assert atom == pytest.approx(math.sqrt(1 / 1000), rel=1e-12)
    assert float(law.cdf(_t(float(edges[-2]) - 50.0))) == pytest.approx(atom, rel=1e-12)
    assert float(law.icdf(_t(atom / 2))) == -math.inf
    assert float(law.icdf(_t(atom * 1.01))) >= float(edges[-2])
    assert float(law.pdf(_t(float(edges[-2]) - 50.0))) == 0.0


# -- diffusers' flow-matching scripts --------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "official", "own"),
    [
        ("logit_normal", {"logit_mean": 0.7, "logit_std": 0.6}, {"mean": 0.7, "std": 0.6}),
        ("logit_normal", {"logit_mean": -1.0, "logit_std": 1.5}, {"mean": -1.0, "std": 1.5}),
        ("mode", {"mode_scale": 1.29}, {"scale": 1.29}),
        ("mode", {"mode_scale": -0.8}, {"scale": -0.8}),
    ],
)
def test_schemes_are_those_of_diffusers(
    scheme: str, official: dict[str, Any], own: dict[str, float]
) -> None:
    # what the scripts index their descending timesteps with, here of ten levels
    draw = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(scheme, 400_000, **official, generator=draw)
    counts = torch.bincount((u * 10).long(), minlength=10).flip(0)
    masses = _masses(f"scheme_{scheme}", count=10, **own)
    assert stats.chisquare(counts, masses / masses.sum() * counts.sum()).pvalue > 1e-4
    wrong = masses.flip(0)
    if scheme == "mode":  # which is symmetric
        wrong = _masses(f"scheme_{scheme}", count=10, scale=0.0)
    assert stats.chisquare(counts, wrong / wrong.sum() * counts.sum()).pvalue < 1e-9


def test_a_mode_that_is_no_quantile_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale=1\.8 must lie in \[-1, 1\.75"):
        make_density("scheme_mode", _edges(10), scale=1.8)
