"""Statistics of noise levels against exact values of Gaussian mixtures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_curriculum.analysis.gradients import gradient_statistics
from diffusers_curriculum.analysis.mixtures import Mixture, mixture_rate
from diffusers_curriculum.analysis.probes import Grid, make_grid, probe
from diffusers_curriculum.analysis.score_rate import score_rate
from tests.analysis.known_denoisers import MODELS, best, drawn, objective_of, two_dimensional
from tests.floors_fixtures import levels_of

MIXTURE = two_dimensional()


def exact_mmse(mixture: Mixture, grid: Grid) -> Tensor:
    """(L,) mean squared error of the best estimate for each dimension, on a fine lattice."""
    line = torch.linspace(-7, 7, 141, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    weight = torch.exp(-z.square().sum(1) / 2)
    errors = []
    for index in grid.indices.tolist():
        alpha, sigma = grid.levels.alpha[index], grid.levels.sigma[index]
        total = 0.0
        for w, m, c in zip(mixture.weights, mixture.means, mixture.variances, strict=True):
            v = alpha**2 * c + sigma**2
            x = alpha * m + v.sqrt() * z
            found = mixture.denoised(x, alpha, sigma)
            own = m + alpha * c / v * (x - alpha * m)  # mean of x0 within the component
            inner = (found - own).square().sum(1) + 2 * c * sigma**2 / v
            total += float(w * (weight * inner).sum() / weight.sum())
        errors.append(total / 2)
    return torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize("kind", MODELS)
def test_errors_of_every_prediction_type_are_unbiased(kind: str) -> None:
    """The same network in other words has the same errors, those of the exact integral."""
    objective = objective_of(kind)
    grid = make_grid(objective.levels, 12, reach=6)
    found = probe(best(MIXTURE, objective), objective, drawn(MIXTURE, 3000), grid, batch_size=1000)
    exact = exact_mmse(MIXTURE, grid)
    for unit in ("x0", "epsilon", "v"):
        value, error = found.error(unit)
        assert bool(((value - exact * found.scale(unit)).abs() <= 4 * error).all())
        assert bool((error <= 0.12 * value).all())


def test_models_of_one_task_agree_within_their_intervals() -> None:
    """An x0, an epsilon, a v and a flow model that know the same, on other schedules too."""
    samples = drawn(MIXTURE, 2000)
    probes = {}
    for kind, schedule in (
        ("sample", "linear"),
        ("epsilon", "cosine"),
        ("v_prediction", "sd"),
        ("flow", ""),
    ):
        objective = objective_of(kind, schedule)
        grid = make_grid(objective.levels, 9, reach=5)
        probes[kind] = probe(best(MIXTURE, objective), objective, samples, grid, batch_size=1000)
    first = probes["sample"]
    for other in probes.values():
        at, wanted = other.grid.log_snr.numpy(), first.grid.log_snr.numpy()
        pairs = (
            (first.error(), other.error()),
            (first.relative, other.relative),
            (first.information_rate, other.information_rate),
        )
        for mine, theirs in pairs:
            # levels of two schedules are not quite the same ones
            moved = np.interp(wanted, at, theirs.value.numpy())
            spread = np.hypot(mine.error.numpy(), np.interp(wanted, at, theirs.error.numpy()))
            assert (np.abs(mine.value.numpy() - moved) <= 4 * spread).all()


def test_a_gaussian_is_what_the_best_linear_predictor_knows() -> None:
    one = Mixture(
        torch.ones(1).double(), torch.tensor([[0.7, 0.1]]).double(), torch.ones(1).double() / 4
    )
    objective = objective_of("v_prediction")
    grid, samples = make_grid(objective.levels, 60, reach=8), drawn(one, 2000)
    found = probe(best(one, objective), objective, samples, grid, batch_size=1000)
    value, error = found.relative
    assert bool(((value - 1).abs() <= 5 * error).all())
    assert float(found.beyond_linear.max()) < 0.05
    # information of a Gaussian channel: ln(1 + S s) / 2
    exact = torch.log1p(grid.log_snr.exp() / 4) / 2
    np.testing.assert_allclose(found.information, exact - exact[0], atol=0.06)


def test_two_points_hold_one_bit() -> None:
    two = Mixture.of_samples(torch.tensor([[-1.0], [1.0]]))
    objective = objective_of("epsilon")
    grid = make_grid(objective.levels, 60, reach=7)
    found = probe(best(two, objective), objective, drawn(two, 4000), grid, batch_size=4000)
    assert float(found.information[-1]) == pytest.approx(math.log(2), rel=0.03)


def test_progress_is_a_paired_difference() -> None:
    objective = objective_of("sample")
    grid, samples = make_grid(objective.levels, 6, reach=4), drawn(MIXTURE, 400)
    worse, better = (
        probe(best(MIXTURE, objective, shift), objective, samples, grid) for shift in (0.3, 0.1)
    )
    value, error = better.progress_since(worse, "x0")
    # by construction 0.3^2 - 0.1^2, but for the products with the residuals
    assert bool(((value - 0.08).abs() <= 4 * error + 1e-6).all())
    assert bool((error < better.error("x0").error.clamp_min(1e-3) * 2).all())
    other = probe(best(MIXTURE, objective), objective, samples[:100], grid)
    with pytest.raises(ValueError, match="are not of the same ones"):
        better.progress_since(other)


@pytest.mark.parametrize("kind", ["epsilon", "flow", "edm"])
def test_the_rate_of_a_network_is_that_of_its_data(kind: str) -> None:
    objective = objective_of(kind)
    grid = make_grid(objective.levels, 6, reach=4)
    found = score_rate(
        best(MIXTURE, objective), objective, drawn(MIXTURE, 3000), grid, batch_size=3000
    )
    exact = mixture_rate(objective.levels, MIXTURE, grid.indices).value
    assert bool(((found.rate.value - exact).abs() <= 4 * found.rate.error).all())
    assert bool((found.mean.value.abs() <= 4 * found.mean.error).all())
    assert bool((found.rate.error < 0.25 * exact).all())


# -- gradients -------------------------------------------------------------------------------------


class Scale(torch.nn.Module):
    """x0' = w x: one number, whose gradients are polynomials."""

    def __init__(self, w: float, more: int = 0) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.more = torch.nn.Parameter(torch.zeros(more, dtype=torch.float64))

    def forward(self, noisy: Tensor, at: Tensor, where: Tensor) -> Tensor:
        return self.w * noisy + self.more.sum()


def test_gradients_are_unbiased() -> None:
    """Data N(0, 1) under x0' = w x: g = 2 (w x - x0) x, with moments of a Gaussian pair."""
    objective, w = objective_of("sample"), 0.4
    grid = make_grid(objective.levels, 4, reach=4)
    one = Mixture(torch.ones(1).double(), torch.zeros(1, 1).double(), torch.ones(1).double())
    samples, network = drawn(one, 1200), Scale(w)
    found = gradient_statistics(network, network.parameters(), objective, samples, grid, clusters=2)
    alpha = objective.levels.alpha[grid.indices]
    mean = 2 * (w - alpha)  # E x^2 = 1, E x0 x = alpha
    # E[r^2 x^2] = E r^2 E x^2 + 2 (E r x)^2, r = w x - x0
    residual = w**2 - 2 * w * alpha + 1
    second = 4 * (residual + 2 * (w - alpha).square())
    assert bool(((found.second_moment.value - second).abs() <= 4 * found.second_moment.error).all())
    spread = (second - mean.square()).sqrt() / 1200**0.5
    assert bool(
        (
            (found.squared_norm - mean.square()).abs()
            <= 8 * mean.abs() * spread + 4 * spread**2 * 1200**0.5
        ).all()
    )
    np.testing.assert_allclose(found.variance, second - mean.square(), rtol=0.25)
    assert found.groups == (2, 2)


def test_noise_is_not_taken_for_a_mean_gradient() -> None:
    """At w = alpha the mean gradient is 0; a mean of few gradients is not."""
    objective = objective_of("sample")
    grid = make_grid(objective.levels, 2, reach=1)
    one = Mixture(torch.ones(1).double(), torch.zeros(1, 1).double(), torch.ones(1).double())
    network = Scale(float(objective.levels.alpha[grid.indices[0]]))
    found = [
        gradient_statistics(
            network, network.parameters(), objective, drawn(one, 8, seed), grid, seed=seed
        )
        for seed in range(60)
    ]
    norms = torch.stack([each.squared_norm[0] for each in found])
    assert abs(float(norms.mean())) < 4 * float(norms.std()) / 60**0.5
    biased = float(torch.stack([each.variance[0] for each in found]).mean()) / 8
    assert float(norms.mean()) < 0.5 * biased


def test_gradients_that_oppose_each_other_are_told() -> None:
    """Between w < alpha and w > alpha the only gradient there is changes its sign."""
    objective = objective_of("sample")
    grid = make_grid(objective.levels, 4, reach=4)
    one = Mixture(torch.ones(1).double(), torch.zeros(1, 1).double(), torch.ones(1).double())
    network = Scale(0.7)
    found = gradient_statistics(
        network, network.parameters(), objective, drawn(one, 400), grid, clusters=2
    )
    np.testing.assert_allclose(found.affinity, [[1, -1], [-1, 1]])


def test_long_gradients_are_folded_and_keep_their_products() -> None:
    objective = objective_of("sample")
    grid, samples = make_grid(objective.levels, 3, reach=3), drawn(two_dimensional(), 8)
    network = Scale(0.3, more=200_000)
    folded = gradient_statistics(network, network.parameters(), objective, samples, grid)
    short = Scale(0.3, more=2)
    exact = gradient_statistics(short, short.parameters(), objective, samples, grid)
    # E||g||^2 is not folded: the two hundred thousand equal numbers count as they are
    assert bool((folded.second_moment.value > exact.second_moment.value).all())
    assert folded.affinity.shape == (3, 3)
    assert bool(folded.variance.isfinite().all())


@pytest.mark.parametrize("count", [2, 7])
def test_gradients_of_too_few_samples_are_refused(count: int) -> None:
    objective, network = objective_of("sample"), Scale(0.5)
    grid = make_grid(objective.levels, 3)
    with pytest.raises(ValueError, match="even number of at least 4"):
        gradient_statistics(network, network.parameters(), objective, drawn(MIXTURE, count), grid)


# -- grids and faults ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "sd_zero_terminal", "flow_shift_3", "edm"])
def test_a_grid_is_spread_over_log_snr(name: str) -> None:
    grid = make_grid(levels_of(name), 20)
    assert bool((grid.log_snr.diff() > 0).all())
    assert float(grid.log_snr.abs().max()) <= 10
    assert bool((grid.edges.diff() > 0).all())
    assert bool(((grid.edges[:-1] <= grid.log_snr) & (grid.log_snr <= grid.edges[1:])).all())
    assert len(grid.indices) >= 16


def test_faults_are_refused() -> None:
    objective = objective_of("sample")
    grid, samples = make_grid(objective.levels, 3), drawn(MIXTURE, 4)
    with pytest.raises(ValueError, match="bins=1 must be"):
        make_grid(objective.levels, 1)
    with pytest.raises(ValueError, match="there is nothing to compare"):
        make_grid(objective.levels, 3, reach=0.001)
    with pytest.raises(ValueError, match="is not finite: it is broken"):
        probe(lambda x, at, where: x * torch.nan, objective, samples, grid)
    with pytest.raises(ValueError, match="1 sample has no variance"):
        probe(lambda x, at, where: x, objective, samples[:1], grid)
