"""Relative entropy between consecutive marginals against integrals, closed forms and known values.

Numbers of whole schedules are those of exact computations in float64, done apart.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate

from diffusers_curriculum.analysis.mixtures import Mixture, mixture_entropy, mixture_rate
from diffusers_curriculum.analysis.relative_entropy import (
    entropy_bound,
    entropy_of_rate,
    gaussian_entropy,
    gaussian_rate,
    principal_variances,
    rate_bound,
    spectrum,
)
from diffusers_curriculum.noise_levels import NoiseLevels
from tests.floors_fixtures import levels_of, table

TWO_POINTS = Mixture.of_samples(torch.tensor([[-1.0], [1.0]]))
FAMILIES = ("linear", "sd", "cosine", "sd_zero_terminal", "flow", "edm")


def normals(weights: list[float], means: list[float], variance: float) -> Mixture:
    """A mixture in one dimension."""
    table = torch.tensor(weights).double(), torch.tensor(means).double()[:, None]
    return Mixture(*table, torch.full((len(means),), variance).double())


def log_density(mixture: Mixture, x: float, alpha: float, sigma: float) -> float:
    """Of a one-dimensional mixture, term by term."""
    terms = []
    for w, (m,), c in zip(
        mixture.weights.tolist(), mixture.means.tolist(), mixture.variances.tolist(), strict=True
    ):
        v = alpha**2 * c + sigma**2
        terms.append(math.log(w) - (x - alpha * m) ** 2 / (2 * v) - math.log(2 * math.pi * v) / 2)
    return float(np.logaddexp.reduce(terms))


def integral(mixture: Mixture, levels: NoiseLevels, step: int) -> float:
    """K by an adaptive rule of scipy, in pieces around each noised component."""
    one, two = ((float(levels.alpha[i]), float(levels.sigma[i])) for i in (step - 1, step))

    def integrand(x: float) -> float:
        here = log_density(mixture, x, *one)
        return math.exp(here) * (here - log_density(mixture, x, *two))

    deviation = math.sqrt(one[0] ** 2 * float(mixture.variances.max()) + one[1] ** 2)
    knots = {
        m * one[0] + k * deviation for (m,) in mixture.means.tolist() for k in range(-12, 13, 2)
    }
    pieces = sorted(knots)
    parts = (
        integrate.quad(integrand, a, b, epsabs=1e-14, epsrel=1e-10, limit=200)[0]
        for a, b in pairwise(pieces)
    )
    return sum(parts)


# -- known values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("linear", [1.213954e-1, 5.108058e-3, 8.422753e-5, 2.607716e-6, 1.341538e-9]),
        ("sd", [9.721130e-2, 2.316269e-3, 3.593237e-5, 3.914039e-6, 7.299087e-8]),
        ("cosine", [1.112629e-1, 4.235225e-3, 8.495131e-5, 1.327746e-5, 6.921789e-7]),
    ],
)
def test_two_points(name: str, values: list[float]) -> None:
    steps = torch.tensor([1, 10, 100, 250, 500])
    found = mixture_entropy(levels_of(name), TWO_POINTS, steps)
    # the float32 table of a schedule limits the steps themselves
    np.testing.assert_allclose(found.value, values, rtol=2e-3)
    assert found.error.tolist() == [0] * 5


def test_two_points_stay_below_their_bound() -> None:
    bound = entropy_bound(levels_of("linear"), 1, 1.0)
    known = [1.213954e-1, 5.108058e-3, 8.572042e-5, 1.130719e-5, 1.267316e-6]
    np.testing.assert_allclose(bound[torch.tensor([0, 9, 99, 249, 499])], known, rtol=2e-3)


def test_rates_of_two_points() -> None:
    levels = levels_of("linear")
    middles = [(levels.log_snr[t - 1] + levels.log_snr[t]) / 2 for t in (1, 10, 100, 250, 500)]
    at = table(torch.stack(middles))
    rate = mixture_rate(at, TWO_POINTS, torch.arange(5)).value
    np.testing.assert_allclose(rate[:4], [0.49989, 0.49847, 0.41715, 0.04583], atol=2e-5)
    assert float(rate[4]) == pytest.approx(2.2e-5, rel=0.03)
    bound = rate_bound(levels, 1, 1.0)[[1, 100, 250]]
    np.testing.assert_allclose(bound, [0.49984, 0.42411, 0.19832], atol=2e-5)


@pytest.mark.parametrize(
    ("variance", "values"),
    [
        (0.25, [3.23154e-8, 4.59808e-6, 9.91654e-8]),
        (4.0, [2.02244e-9, 5.82758e-7, 9.23256e-7]),
        (1.0, [0, 0, 0]),
    ],
)
def test_gaussian_data(variance: float, values: list[float]) -> None:
    found = gaussian_entropy(levels_of("linear"), torch.tensor([variance]))
    np.testing.assert_allclose(found[[0, 99, 499]], values, rtol=2e-3, atol=1e-16)


@pytest.mark.parametrize(
    ("variance", "values"),
    [(0.05, [1.21569e-6, 2.18386e-5, 2.12646e-8]), (0.0, [0.121396, 5.78439e-5, 1.98352e-8])],
)
def test_three_components(variance: float, values: list[float]) -> None:
    mixture = normals([0.2, 0.5, 0.3], [-2.0, 0.0, 1.0], variance)
    found = mixture_entropy(levels_of("linear"), mixture, torch.tensor([1, 100, 500]))
    np.testing.assert_allclose(found.value, values, rtol=2e-3)


# -- brute force -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_finite_data_set_is_integrated_to_a_thousandth(name: str) -> None:
    levels, points = levels_of(name), torch.tensor([[-1.3], [-0.2], [0.1], [0.9], [2.0]])
    mixture, steps = Mixture.of_samples(points), [1, 30, 200, 400]
    found = mixture_entropy(levels, mixture, torch.tensor(steps)).value
    exact = [integral(mixture, levels, step) for step in steps]
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-12)


def test_two_dimensions_are_integrated_to_a_thousandth() -> None:
    levels = levels_of("linear")
    mixture = Mixture.of_samples(torch.tensor([[-1.0, 0.5], [0.3, 1.2], [1.0, -1.0]]))
    for step in (60, 250):
        fine = torch.linspace(-6, 6, 1201, dtype=torch.float64)
        grid = torch.cartesian_prod(fine, fine)
        one, two = (
            mixture.log_terms(grid, levels.alpha[i], levels.sigma[i]).logsumexp(1)
            for i in (step - 1, step)
        )
        brute = float((one.exp() * (one - two)).sum()) * float(fine[1] - fine[0]) ** 2
        found = mixture_entropy(levels, mixture, torch.tensor([step]))
        assert float(found.value) == pytest.approx(brute, rel=1e-3)


@pytest.mark.parametrize("name", ["linear", "flow", "edm"])
def test_estimates_in_many_dimensions_lie_within_their_errors(name: str) -> None:
    """Two points of six dimensions differ along one line only, where K is integrated."""
    levels, steps = levels_of(name), torch.tensor([1, 20, 150, 300, 450])
    far = torch.tensor([[2.0, 1, 0, -1, 0, 1], [0.0, 0, 0, 0, 0, 0]])
    middle, half = far.mean(0), (far[0] - far[1]).norm() / 2
    estimated = mixture_entropy(levels, Mixture.of_samples(far), steps, samples=3000)
    assert float(estimated.error[-1]) > 0
    line = mixture_entropy(levels, Mixture.of_samples(torch.stack([half, -half])[:, None]), steps)
    direction = (far[0] - far[1]) / (far[0] - far[1]).norm()
    across = middle - (middle @ direction) * direction
    # the rest of the dimensions is one point: Gaussian, without variance
    rest = gaussian_entropy(
        levels, torch.zeros(5), torch.tensor([float(across @ across), 0, 0, 0, 0])
    )
    if abs(float(middle @ direction)) > 1e-6:  # the line's own mean moves as well
        shifted = torch.stack([middle @ direction + half, middle @ direction - half])[:, None]
        line = mixture_entropy(levels, Mixture.of_samples(shifted), steps)
    exact = line.value + rest[steps - 1]
    assert bool(((estimated.value - exact).abs() <= 4 * estimated.error + 1e-6 * exact).all())
    assert bool((estimated.error <= 0.2 * exact).all())


def test_estimates_of_small_steps_have_small_errors() -> None:
    """The mean of the log ratio alone would have an error of sqrt(2 K / samples), far above."""
    levels, step = levels_of("linear"), torch.tensor([700])
    points = torch.zeros(2, 6)
    points[:, 0] = torch.tensor([-2.0, 2.0])
    value, error = mixture_entropy(levels, Mixture.of_samples(points), step, samples=3000)
    assert float(value) < 1e-7
    assert 0 < float(error / value) < 0.1
    assert float(error) < 0.01 * float((2 * value / 3000).sqrt())


def test_rates_in_many_dimensions_lie_within_their_errors() -> None:
    levels, at = levels_of("linear"), torch.tensor([0, 50, 250, 400])
    points = torch.zeros(2, 5)
    points[:, 0] = torch.tensor([-1.0, 1.0])
    estimated = mixture_rate(levels, Mixture.of_samples(points), at, samples=4000)
    exact = mixture_rate(levels, TWO_POINTS, at).value
    exact = exact + gaussian_rate(levels, torch.zeros(4))[at]
    assert bool(((estimated.value - exact).abs() <= 4 * estimated.error + 1e-7).all())


# -- how they belong together ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rate_is_the_entropy_of_a_small_step(name: str) -> None:
    levels = levels_of(name)
    mixture, steps = normals([0.4, 0.6], [-1.0, 0.7], 0.1), torch.tensor([300, 400, 500])
    rate = mixture_rate(levels, mixture, torch.arange(len(levels))[295:505]).value
    whole = torch.zeros(len(levels), dtype=torch.float64)
    whole[295:505] = rate
    small = entropy_of_rate(levels, whole)[steps - 1]
    exact = mixture_entropy(levels, mixture, steps).value
    np.testing.assert_allclose(small, exact, rtol=1e-2)


@pytest.mark.parametrize("name", ["linear", "flow", "edm"])
def test_one_round_component_is_gaussian_data(name: str) -> None:
    levels, steps = levels_of(name), torch.tensor([5, 100, 480])
    one = Mixture(
        torch.ones(1).double(), torch.full((1, 1), 0.5).double(), torch.ones(1).double() * 0.3
    )
    closed = gaussian_entropy(levels, torch.tensor([0.3]), torch.tensor([0.25]))[steps - 1]
    np.testing.assert_allclose(mixture_entropy(levels, one, steps).value, closed, rtol=1e-6)
    rate = gaussian_rate(levels, torch.tensor([0.3]), torch.tensor([0.25]))[steps]
    np.testing.assert_allclose(mixture_rate(levels, one, steps).value, rate, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 20, 100, 500])
def test_few_samples_tell_a_predictor_that_is_no_better_than_the_best(count: int) -> None:
    """Variances 1 / j in 128 directions: the error of x0 lies between that of the true ones and
    that of coordinates, near the first where there are many samples."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(128, 128, generator=generator))
    true = 1 / torch.arange(1, 129, dtype=torch.float64)
    true = true / true.mean()
    samples = torch.randn(count, 128, generator=generator) * true.sqrt().float() @ axes.T
    found, plain = principal_variances(samples), spectrum(samples)[0]
    assert found.shape == (128,)
    for snr in (0.1, 1.0, 10.0):
        best, ours, apart = (
            float((s / s.mean() / (1 + snr * s / s.mean())).mean()) for s in (true, found, plain)
        )
        if 20 <= count < 512:
            assert ours < apart
        if count == 500:
            assert best < ours < best + 0.6 * (apart - best)
    same = torch.ones(6, 5)
    assert torch.equal(principal_variances(same), torch.zeros(5, dtype=torch.float64))


def test_a_spectrum_is_that_of_the_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = (
        torch.randn(400, 3, generator=generator).double()
        @ torch.diag(torch.tensor([2.0, 1, 0.1])).double()
    )
    variances, means = spectrum(raw.reshape(400, 3, 1))
    np.testing.assert_allclose(variances, np.linalg.eigvalsh(np.cov(raw.T)))
    assert float(means.sum()) == pytest.approx(float(raw.mean(0).square().sum()))
    few, _ = spectrum(raw[:8])
    np.testing.assert_allclose(few, raw[:8].var(0))


def test_the_best_denoiser_is_the_slope_of_the_log_density() -> None:
    mixture = normals([0.3, 0.7], [-1.0, 1.5], 0.2)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None].requires_grad_()
    alpha, sigma = torch.tensor(0.8).double(), torch.tensor(0.6).double()
    (score,) = torch.autograd.grad(mixture.log_terms(x, alpha, sigma).logsumexp(1).sum(), x)
    tweedie = (x + sigma**2 * score) / alpha
    np.testing.assert_allclose(mixture.denoised(x, alpha, sigma).detach(), tweedie.detach())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture.of_samples(torch.zeros(3)[:0, None]), r"needs \(K,\), \(K, D\)"),
        (lambda: normals([0.5, 0.6], [0.0, 1.0], 0.1), "sum to 1.1"),
        (lambda: normals([0.5, 0.5], [0.0, 1.0], -0.1), "least variance is -0.1"),
        (lambda: principal_variances(torch.zeros(1, 3)), "1 sample has no variance"),
        (lambda: spectrum(torch.zeros(1, 3)), "1 sample has no variance"),
    ],
)
def test_what_is_no_data_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(("step", "samples"), [(0, 10), (1000, 10), (5, 1)])
def test_what_is_no_step_is_refused(step: int, samples: int) -> None:
    with pytest.raises(ValueError, match=r"do not lie in 1\.\.999|draw two or more"):
        mixture_entropy(levels_of("linear"), TWO_POINTS, torch.tensor([step]), samples=samples)
