"""Distances against closed forms and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from diffusers_curriculum.metrics.distances import (
    PrecisionRecall,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


def normal(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double()


def with_moments(mean: Tensor, deviations: Tensor, seed: int) -> Tensor:
    """Samples whose mean and covariance (of n - 1) are exactly these, the latter diagonal."""
    raw = normal(200, len(mean), seed)
    raw = raw - raw.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(raw.T @ raw / 199), raw.T, upper=False
    ).T
    return white * deviations + mean


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """For diagonal covariances it is |m - m'|^2 + |s - s'|^2 with standard deviations s."""
    means = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 3.0]]).double()
    deviations = torch.tensor([[1.0, 0.2, 3.0], [2.0, 0.7, 0.0]]).double()
    real, made = (
        with_moments(*moments, seed=i)
        for i, moments in enumerate(zip(means, deviations, strict=True))
    )
    expected = float((means[0] - means[1]).square().sum())
    expected += float((deviations[0] - deviations[1]).square().sum())
    # the zero deviation: square roots of eigenvalues of about 1e-16
    assert frechet_distance(real, made) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_frechet_distance_equals_the_matrix_square_root(shift: float) -> None:
    mix = normal(6, 6, 3)
    real, made = normal(100, 6, 1) + shift, normal(80, 6, 2) @ mix + 0.3 + shift
    first, second = (np.cov(x.numpy().T) for x in (real, made))
    root = scipy.linalg.sqrtm(first @ second)
    gap = (real.mean(0) - made.mean(0)).numpy()
    expected = gap @ gap + np.trace(first + second - 2 * np.real(root))
    assert frechet_distance(real, made) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    features = normal(50, 8, 0)
    assert 0 <= frechet_distance(features, features) < 1e-6


def mmd_by_hand(real: Tensor, made: Tensor) -> float:
    """The unbiased estimate, one pair at a time."""

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def within(points: Tensor) -> float:
        n = len(points)
        pairs = ((i, j) for i in range(n) for j in range(n) if i != j)
        return sum(kernel(points[i], points[j]) for i, j in pairs) / (n * (n - 1))

    across = sum(kernel(x, y) for x in real for y in made) / (len(real) * len(made))
    return within(real) + within(made) - 2 * across


def test_kernel_distance_of_all_samples_equals_brute_force() -> None:
    real, made = normal(25, 4, 1), normal(25, 4, 2) * 1.5 + 0.3
    assert kernel_distance(real, made) == pytest.approx(mmd_by_hand(real, made), rel=1e-10)


def test_kernel_distance_of_unequal_numbers_is_a_mean_over_subsets() -> None:
    real, made = normal(40, 3, 1), normal(20, 3, 2) + 1.0
    found = [kernel_distance(real, made, seed) for seed in range(3)]
    assert len(set(found)) == 3  # other subsets
    assert kernel_distance(real, made, 0) == found[0]
    assert float(np.mean(found)) == pytest.approx(mmd_by_hand(real, made), rel=0.1)


def test_the_global_generator_is_left_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        kernel_distance(normal(40, 3, 1), normal(20, 3, 2))
        frechet_distance(normal(40, 3, 1), normal(20, 3, 2))
        assert torch.equal(torch.get_rng_state(), before)


def shares_by_hand(real: np.ndarray, made: np.ndarray, k: int) -> PrecisionRecall:
    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [
            sorted(math.dist(c, other) for j, other in enumerate(centres) if j != i)[k - 1]
            for i, c in enumerate(centres)
        ]
        hits = [
            any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points
        ]
        return sum(hits) / len(hits)

    return PrecisionRecall(inside(made, real), inside(real, made))


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_precision_and_recall_equal_brute_force(neighbours: int, offset: float) -> None:
    real, made = normal(60, 2, 1) + offset, normal(45, 2, 2) * 0.8 + 2.0 + offset
    expected = shares_by_hand(real.numpy(), made.numpy(), neighbours)
    assert 0 < expected.precision < 1
    assert 0 < expected.recall < 1
    assert precision_recall(real, made, neighbours) == pytest.approx(expected, abs=1e-12)


def test_chunks_do_not_change_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = normal(60, 2, 1), normal(45, 2, 2) * 0.6 + 0.5
    whole = precision_recall(real, made)
    monkeypatch.setattr("diffusers_curriculum.metrics.distances._ROWS", 7)
    assert precision_recall(real, made) == whole


def test_precision_and_recall_of_known_cases() -> None:
    cloud = normal(50, 3, 0)
    assert precision_recall(cloud, cloud) == (1, 1)
    assert precision_recall(cloud, cloud + 100) == (0, 0)
    # One mode of two: whatever is made is realistic, half of the real ones are never made.
    two_modes = torch.cat([cloud, cloud + 100])
    assert precision_recall(two_modes, cloud) == (1, 0.5)
    assert precision_recall(cloud, two_modes) == (0.5, 1)


def test_real_samples_are_nearer_than_noise_in_every_metric() -> None:
    real, same, other = normal(100, 5, 1), normal(100, 5, 2), normal(100, 5, 3) * 3 + 1
    assert frechet_distance(real, same) < frechet_distance(real, other) / 5
    assert kernel_distance(real, same) < kernel_distance(real, other) / 5
    assert precision_recall(real, same).precision > precision_recall(real, other).precision + 0.3


@pytest.mark.parametrize(
    ("distance", "fewest"), [(frechet_distance, 2), (kernel_distance, 2), (precision_recall, 4)]
)
def test_what_cannot_be_compared_is_refused(
    distance: Callable[[Tensor, Tensor], object], fewest: int
) -> None:
    few, enough = normal(fewest - 1, 3, 0), normal(fewest, 3, 1)
    with pytest.raises(ValueError, match=rf"{fewest - 1} generated samples .* at least {fewest}"):
        distance(enough, few)
    with pytest.raises(ValueError, match=rf"{fewest - 1} real samples .* at least {fewest}"):
        distance(few, enough)
    distance(enough, enough + 1)
    with pytest.raises(ValueError, match="same network"):
        distance(enough, normal(fewest, 4, 0))
    enough[0, 0] = math.nan
    with pytest.raises(ValueError, match="real samples are not all finite"):
        distance(enough, normal(fewest, 3, 0))
