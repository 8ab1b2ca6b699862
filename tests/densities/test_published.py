"""Worked numbers of the published laws, their clocks and their shifts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.densities import (
    Density,
    make_density,
    published,
    shift_from_pixels,
    shift_from_tokens,
)
from tests.floors_fixtures import SCHEDULERS

EDGES = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
SURVIVAL = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95, 0.99]


def _t(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _law(name: str, **args: Any) -> Density:
    return make_density(name, EDGES, **args)


def _noise_fraction_density(law: Density, t: Tensor) -> Tensor:
    """p(t) of a law of log-SNR: p(l) |dl/dt|, l = 2 ln((1 - t) / t)."""
    return law.pdf(2 * torch.log((1 - t) / t)) * 2 / (t * (1 - t))


@pytest.mark.parametrize(
    ("name", "log_snr"),
    [
        ("flow_uniform", "9.1902 5.8889 4.3944 2.1972 0 -2.1972 -5.8889 -9.1902"),
        ("edm", "7.9832 6.3476 5.4757 4.0188 2.4 0.7812 -1.5476 -3.1832"),
        ("logit_normal", "4.6527 3.2897 2.5631 1.3490 0 -1.3490 -3.2897 -4.6527"),
        ("cosmap", "8.3070 5.0842 3.6855 1.7627 0 -1.7627 -5.0842 -8.3070"),
    ],
)
def test_log_snr_at_given_survival(name: str, log_snr: str) -> None:
    expected = _t([float(v) for v in log_snr.split()])
    torch.testing.assert_close(_law(name).icdf(1 - _t(SURVIVAL)), expected, atol=6e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "args", "t", "density"),
    [
        ("logit_normal", {}, [0.1, 0.25, 0.5], [0.39657, 1.16365, 1.59577]),
        ("mode", {"scale": 1.29}, [1e-9, 0.5, 1 - 1e-9], [0.43668, 3.79258, 0.43668]),
        ("mode", {"scale": 0.81}, [1e-9, 0.5, 1 - 1e-9], [0.55249, 1.85993, 0.55249]),
        ("cosmap", {}, [1e-9, 0.25, 0.5], [0.63662, 1.01859, 1.27324]),
        ("u_shaped", {}, [1e-12, 0.5, 1 - 1e-12], [2.07463, 0.551441, 2.07463]),
        ("flow_uniform", {}, [1e-9, 0.3, 0.9], [1.0, 1.0, 1.0]),
    ],
)
def test_density_of_the_noise_fraction(
    name: str, args: dict[str, float], t: list[float], density: list[float]
) -> None:
    found = _noise_fraction_density(_law(name, **args), _t(t))
    torch.testing.assert_close(found, _t(density), atol=6e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "u", "t"),
    [
        ("mode", [0.1, 0.25, 0.5, 0.75, 0.9], [0.802569, 0.616416, 0.5, 0.383584, 0.197431]),
        # its inverse is printed the other way round: t rises with u
        ("cosmap", [0.9, 0.75, 0.5, 0.25, 0.1], [0.136729, 0.292893, 0.5, 0.707107, 0.863271]),
    ],
)
def test_maps_of_sd3_are_the_quantiles(name: str, u: list[float], t: list[float]) -> None:
    found = torch.sigmoid(-_law(name).icdf(_t(u)) / 2)
    torch.testing.assert_close(found, _t(t), atol=6e-7, rtol=0)


def test_u_shaped_has_a_third_of_its_mass_in_the_outer_fifth() -> None:
    clean, noisy = 2 * math.log(0.9 / 0.1), 2 * math.log(0.1 / 0.9)
    law = _law("u_shaped")
    found = law.sf(_t(clean)) + law.cdf(_t(noisy))
    assert float(found) == pytest.approx(0.345007, abs=6e-7)


def test_u_shaped_follows_the_published_recipe() -> None:
    """Draw ln(1 + u (e^a - 1)) / a and flip half of them, as the code of arXiv 2405.20320 does."""
    rng, a = np.random.default_rng(0), 4.0
    t = np.log1p(rng.random(200_000) * (math.exp(a) - 1)) / a
    t = np.where(rng.random(200_000) < 0.5, t, 1 - t)
    law = _law("u_shaped")
    log_snr = 2 * np.log((1 - t) / t)
    assert stats.kstest(log_snr, lambda x: law.cdf(_t(x)).numpy()).pvalue > 1e-4


def test_split_normal_follows_the_recipe_of_k_diffusion() -> None:
    """ln sigma = loc - scale_1 |n| with probability scale_1 / (scale_1 + scale_2), else
    loc + scale_2 |n|."""
    rng, loc, low, high = np.random.default_rng(1), -0.5, 0.6, 1.4
    n = np.abs(rng.standard_normal(200_000))
    left = rng.random(200_000) < low / (low + high)
    log_sigma = np.where(left, loc - low * n, loc + high * n)
    law = _law("split_normal", mu=-2 * loc, std_clean=2 * low, std_noisy=2 * high)
    assert stats.kstest(-2 * log_sigma, lambda x: law.cdf(_t(x)).numpy()).pvalue > 1e-4
    mirrored = _law("split_normal", mu=-2 * loc, std_clean=2 * high, std_noisy=2 * low)
    assert stats.kstest(-2 * log_sigma, lambda x: mirrored.cdf(_t(x)).numpy()).pvalue < 1e-9


# -- orientation -----------------------------------------------------------------------------------


def test_a_positive_mean_favours_noise_and_diffusers_counts_the_other_way() -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    generator = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.8, logit_std=1.0, generator=generator
    )
    t = 1 - u.double()  # position in the descending timesteps: sigma = 1 - u
    log_snr = (2 * torch.log((1 - t) / t)).numpy()
    ours, mirrored = _law("logit_normal", mean=-0.8), _law("logit_normal", mean=0.8)
    assert stats.kstest(log_snr, lambda x: ours.cdf(_t(x)).numpy()).pvalue > 1e-4
    assert stats.kstest(log_snr, lambda x: mirrored.cdf(_t(x)).numpy()).pvalue < 1e-9
    assert float(mirrored.cdf(_t(0.0))) > 0.75  # most of it noisier than signal and noise alike


@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
@pytest.mark.parametrize(
    ("name", "noisier", "cleaner"),
    [
        ("logit_normal", {"mean": 1.0}, {"mean": -1.0}),
        ("logit_normal", {"shift": 3.0}, {"shift": 1.0}),
        ("flow_uniform", {"tokens": 4096}, {}),
        ("edm", {"p_mean": 0.0}, {"p_mean": -1.2}),
        ("logistic", {"mu": -1.0}, {"mu": 1.0}),
        ("split_normal", {"std_noisy": 4.0}, {"std_clean": 4.0}),
        ("beta", {"alpha": 3.0}, {"beta": 3.0}),
        ("speed", {"k": 0.2}, {"k": 5.0}),
        ("timestep_bias", {"strategy": "later"}, {"strategy": "earlier"}),
        ("spline", {"points": [[-9, 1], [4, 0]]}, {"points": [[-4, 0], [9, 1]]}),
        (
            "tabulated",
            {"log_snr": [-9, 4], "density": [1, 0]},
            {"log_snr": [-4, 9], "density": [0, 1]},
        ),
        ("truncated", {"density": "normal", "high": 0}, {"density": "normal", "low": 0}),
        (
            "truncated",
            {"density": "uniform", "min_timestep": 500},
            {"density": "uniform", "max_timestep": 500},
        ),
    ],
)
def test_which_way_a_parameter_pushes(
    name: str, noisier: dict[str, Any], cleaner: dict[str, Any], schedule: str
) -> None:
    """The mean index, 0 = cleanest, on every family of schedules."""

    def mean(args: dict[str, Any]) -> float:
        sampler = DensityTimestepSampler(SCHEDULERS[schedule](), name, args, floor=0.0)
        mass = sampler.probabilities()
        return float((mass * torch.arange(len(mass))).sum())

    assert mean(noisier) > mean(cleaner) + 1


# -- shift -----------------------------------------------------------------------------------------


def test_shift_from_pixels_and_tokens() -> None:
    assert shift_from_pixels(1024 * 1024, 512 * 512) == 2.0
    mu = [math.log(shift_from_tokens(n)) for n in (256, 1024, 4096, 16384)]
    assert mu == pytest.approx([0.5, 0.63, 1.15, 3.23], abs=1e-12)
    assert shift_from_tokens(256) == pytest.approx(1.6487, abs=5e-5)
    assert shift_from_tokens(4096) == pytest.approx(3.1582, abs=5e-5)


@pytest.mark.parametrize("name", ["logit_normal", "flow_uniform", "cosmap", "mode", "heavy_tail"])
def test_a_shift_moves_the_law_as_it_moves_the_noise_fraction(name: str) -> None:
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    plain = torch.sigmoid(-_law(name).icdf(p) / 2)
    for s, args in [
        (3.0, {"shift": 3.0}),
        (0.5, {"shift": 0.5}),
        (math.exp(1.15), {"tokens": 4096}),
        (2.0, {"pixels": 1024**2, "base_pixels": 512**2}),
    ]:
        shifted = torch.sigmoid(-_law(name, **args).icdf(p) / 2)
        expected = s * plain / (1 + (s - 1) * plain)
        torch.testing.assert_close(shifted, expected, atol=1e-13, rtol=0)
    assert torch.equal(_law(name, shift=1.0).icdf(p), _law(name).icdf(p))


def test_a_shifted_schedule_does_not_move_the_law() -> None:
    """The law is of log-SNR: it must be told the shift, and then follows the schedule's index."""
    plain = DensityTimestepSampler(SCHEDULERS["flow"](), "logit_normal", floor=0.0)
    shifted = DensityTimestepSampler(
        SCHEDULERS["flow_shift_3"](), "logit_normal", {"shift": 3.0}, floor=0.0
    )
    torch.testing.assert_close(shifted.probabilities(), plain.probabilities(), atol=1e-7, rtol=1e-3)


# -- relations -------------------------------------------------------------------------------------


def test_laws_that_are_the_same() -> None:
    x = torch.linspace(-20, 20, 401, dtype=torch.float64)
    for first, second in [
        (_law("cosmap"), _law("cosine")),
        (_law("logit_normal"), _law("normal")),
        (_law("flow_uniform"), _law("logistic")),
        (_law("heavy_tail"), _law("mode")),
        (_law("edm"), _law("logit_normal", mean=-1.2, std=1.2)),
        (_law("edm2"), _law("edm", p_mean=-0.4, p_std=1.0)),
        (_law("split_normal"), _law("normal")),
    ]:
        torch.testing.assert_close(first.cdf(x), second.cdf(x), atol=0, rtol=1e-14)
        torch.testing.assert_close(first.pdf(x), second.pdf(x), atol=0, rtol=1e-14)
    flow, mode, u_shaped = _law("flow_uniform"), _law("mode", scale=0.0), _law("u_shaped", a=1e-6)
    torch.testing.assert_close(mode.cdf(x), flow.cdf(x), atol=0, rtol=1e-14)
    torch.testing.assert_close(u_shaped.cdf(x), flow.cdf(x), atol=0, rtol=1e-11)


@pytest.mark.parametrize("scale", [-1.0, 2 / (math.pi - 2)])
def test_mode_at_the_ends_of_its_range(scale: float) -> None:
    law = _law("mode", scale=scale)
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    cdf = law.cdf(x)
    assert bool((cdf.diff() > 0).all())
    u = torch.linspace(0.001, 0.499, 99, dtype=torch.float64)
    torch.testing.assert_close(law.cdf(law.icdf(u)), u, atol=1e-9, rtol=0)
    assert bool((law.pdf(x[x != 0]) > 0).all())
    assert law.pdf(_t([-math.inf, math.inf])).tolist() == [0.0, 0.0]


def test_mode_without_its_middle_is_the_square_of_a_sine() -> None:
    law = _law("mode", scale=-1.0)
    u = _t([1e-200, 1e-9, 0.01, 0.3])
    clean = torch.sin(math.pi * u / 2).square()
    log_snr = 2 * (clean.log() - torch.log1p(-clean))[1:]
    torch.testing.assert_close(law.icdf(u)[1:], log_snr, atol=1e-13, rtol=0)
    torch.testing.assert_close(law.cdf(log_snr), u[1:], atol=0, rtol=1e-12)


@pytest.mark.parametrize("scale", [-1, 0, 1.29, 1.7519])
def test_mode_accepts_the_whole_range(scale: float) -> None:
    assert isinstance(_law("mode", scale=scale), published.Mode)


def test_tails_of_the_published_laws_down_to_1e_300() -> None:
    # a flow's tails fall as density-at-the-end * e^(-|l| / 2)
    ends = {"mode": 1 / 2.29, "flow_uniform": 1.0, "cosmap": 2 / math.pi, "u_shaped": 2.0746295}
    x = _t([1380.0])
    for name, end in ends.items():
        for tail in (_law(name).cdf(-x), _law(name).sf(x)):
            torch.testing.assert_close(
                tail.log(), _t([-690.0 + math.log(end)]), atol=1e-7, rtol=0, msg=name
            )
