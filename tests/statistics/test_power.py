"""Deliberately broken samplers, each of which the tests must reject at their own thresholds.

Every breakage is one that was seen in public training code. A goodness-of-fit test that passes a
broken sampler is itself a failing test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler, TimestepSample
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.randomness import Slots
from diffusers_curriculum.samplers import TimestepSampler
from tests.floors_fixtures import SCHEDULERS
from tests.statistics import checks

pytestmark = pytest.mark.statistics


class OffByOne(DensityTimestepSampler):
    """Returns the level after the one drawn."""

    def sample(self, *args: Any, **kwargs: Any) -> TimestepSample:
        drawn = super().sample(*args, **kwargs)
        return drawn._replace(indices=(drawn.indices + 1) % len(self.levels))


class ClippedLast(DensityTimestepSampler):
    """Never draws the last timestep: an exclusive upper bound taken for an inclusive one."""

    def sample(self, *args: Any, **kwargs: Any) -> TimestepSample:
        drawn = super().sample(*args, **kwargs)
        return drawn._replace(indices=drawn.indices.clamp_max(len(self.levels) - 2))


class DriftingSum(DensityTimestepSampler):
    """Sums its masses one after the other in low precision."""

    def _tables(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        _, importance = super()._tables(step, device)
        masses = self.probabilities(step).numpy().astype(self.precision)
        cdf = np.cumsum(masses, dtype=self.precision).astype(float)
        cdf[-1] = 1.0
        return torch.from_numpy(cdf), importance

    precision: Any = np.float32


class HalfPrecisionSum(DriftingSum):
    precision = np.float16


class MissingJacobian(DensityTimestepSampler):
    """Takes the density at each level for its mass, whatever the width of the level's cell."""

    def sample(self, *args: Any, **kwargs: Any) -> TimestepSample:
        points = self.density.pdf(self.levels.log_snr)
        uniform = torch.full_like(points, 1 / len(points))
        mass = (1 - self.floor) * points / points.sum() + self.floor * uniform
        self._cache[torch.device("cpu")] = (0, (mass.cumsum(0), torch.ones_like(mass)))
        return super().sample(*args, **kwargs)


class StrataInIndexSpace(DensityTimestepSampler):
    """Gives each sample of a batch of 8 its own eighth of the timesteps."""

    def sample(self, *args: Any, **kwargs: Any) -> TimestepSample:
        drawn = super().sample(*args, **kwargs)
        generator = torch.Generator().manual_seed(kwargs.get("step", 0))
        segments = self.probabilities().view(8, -1)
        each = len(drawn.indices) // 8
        inside = torch.multinomial(segments, each, replacement=True, generator=generator)
        offsets = torch.arange(8)[:, None] * segments.shape[1]
        return drawn._replace(indices=(inside + offsets).flatten())


class WithoutReplacement(DensityTimestepSampler):
    """Draws no timestep twice within a batch of 128."""

    def sample(self, *args: Any, **kwargs: Any) -> TimestepSample:
        drawn = super().sample(*args, **kwargs)
        rng = np.random.default_rng(kwargs.get("step", 0))
        keys = self.probabilities().log().numpy() + rng.gumbel(
            size=(len(drawn.indices) // 128, len(self.levels))
        )
        largest = np.argpartition(-keys, 128, axis=1)[:, :128]
        return drawn._replace(indices=torch.from_numpy(largest).flatten())


class SwappedImportance(DensityTimestepSampler):
    """Divides where it should multiply."""

    def sample(self, *args: Any, **kwargs: Any) -> TimestepSample:
        drawn = super().sample(*args, **kwargs)
        return drawn._replace(importance=1 / drawn.importance)


class ShuffledImportance(DensityTimestepSampler):
    """Hands each sample the weight of its neighbour in the batch."""

    def sample(self, *args: Any, **kwargs: Any) -> TimestepSample:
        drawn = super().sample(*args, **kwargs)
        return drawn._replace(importance=drawn.importance.roll(1))


class Moving(TimestepSampler):
    """A law that leans to one end, and to the other from step 5 on."""

    static_law = False

    def __init__(self, scheduler: Any) -> None:
        super().__init__(NoiseLevels.from_scheduler(scheduler))

    def law(self, step: int, device: torch.device) -> Tensor:
        ramp = torch.linspace(1.0, 1.1, len(self.levels), dtype=torch.float64)
        ramp = ramp if step < 5 else ramp.flip(0)
        return (ramp / ramp.sum()).to(device)


class StaleTables(Moving):
    """The same, claiming that its tables may be kept."""

    static_law = True


def _sampler(kind: type[DensityTimestepSampler], density: str, draw: str, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {"floor": 0.1} | kwargs
    return kind(SCHEDULERS["sd"](), density, checks.LAWS[density][0], draw=draw, **settings)


def _rejections(kind: type[DensityTimestepSampler], density: str, draw: str) -> list[str]:
    sampler = _sampler(kind, density, draw)
    counts = checks.draw_counts(sampler)
    honest = _sampler(DensityTimestepSampler, density, draw)
    edges = honest.levels.edges
    law, uniform = checks.exact_cdf(density, edges), checks.exact_cdf("uniform", edges)
    mass = honest.probabilities().numpy()
    return checks.rejections(counts, mass, 0.9 * law + 0.1 * uniform, draw)


# broken sampler, where it must be caught, and by which tests
CAUGHT: list[tuple[type[DensityTimestepSampler], str, str, set[str]]] = [
    (OffByOne, "laplace", "iid", {"kolmogorov"}),
    (OffByOne, "laplace", "stratified", {"kolmogorov", "evenness"}),
    (ClippedLast, "uniform", "iid", {"chi-square"}),
    (ClippedLast, "laplace", "stratified", {"evenness"}),
    (ClippedLast, "laplace", "sobol", {"evenness"}),
    # Half precision is caught by any test. The drift of a float32 sum is a few in a million: below
    # what a million independent draws can show (they resolve 3e-3), not below what strata show.
    (HalfPrecisionSum, "laplace", "iid", {"kolmogorov"}),
    (DriftingSum, "uniform", "stratified", {"evenness"}),
    (DriftingSum, "uniform", "systematic", {"evenness"}),
    (MissingJacobian, "laplace", "iid", {"chi-square", "kolmogorov"}),
    (MissingJacobian, "laplace", "stratified", {"chi-square", "kolmogorov", "evenness"}),
    (MissingJacobian, "normal", "antithetic", {"chi-square", "kolmogorov"}),
    (StrataInIndexSpace, "laplace", "iid", {"chi-square", "kolmogorov"}),
    (WithoutReplacement, "laplace", "iid", {"chi-square", "kolmogorov"}),
]


@pytest.mark.parametrize(("kind", "density", "draw", "tests"), CAUGHT)
def test_broken_samplers_are_rejected(
    kind: type[DensityTimestepSampler], density: str, draw: str, tests: set[str]
) -> None:
    assert tests <= set(_rejections(kind, density, draw))


@pytest.mark.parametrize(("density", "draw"), sorted({(d, w) for _, d, w, _ in CAUGHT}))
def test_the_sampler_they_were_made_from_is_not(density: str, draw: str) -> None:
    assert _rejections(DensityTimestepSampler, density, draw) == []


def test_a_float32_sum_is_beyond_independent_draws() -> None:
    """Said openly: this is what the sharper test of stratified draws is for."""
    assert _rejections(DriftingSum, "uniform", "iid") == []


# -- the other properties --------------------------------------------------------------------------


def _biased(kind: type[DensityTimestepSampler]) -> list[str]:
    sampler = _sampler(kind, "laplace", "iid", importance_correction="full")
    sample, mass = sampler.sample(200_000), sampler.probabilities()
    reference, log_snr = torch.full_like(mass, 1 / 1000), sampler.levels.log_snr
    return checks.biased(sample.indices, sample.importance, log_snr, mass, reference)


def test_wrong_importance_is_rejected() -> None:
    assert _biased(DensityTimestepSampler) == []
    assert len(_biased(SwappedImportance)) > 5
    # the mean weight is right, its place is not: only a test with f(t) sees that
    shuffled = _biased(ShuffledImportance)
    assert "1" not in shuffled
    assert {"t", "bin 3"} <= set(shuffled)


def _stale(kind: type[Moving]) -> float:
    sampler = kind(SCHEDULERS["sd"]())
    sampler.sample(10, step=0)
    counts = checks.counts_of(sampler.sample(1_000_000, step=7).indices, 1000)
    return checks.chi_square(counts, sampler.probabilities(7).numpy())


def test_a_stale_density_is_rejected() -> None:
    assert _stale(Moving) > checks.SIGNIFICANCE
    assert _stale(StaleTables) < checks.SIGNIFICANCE


def _ranks(shared: bool, draw: str) -> tuple[list[np.ndarray], list[Tensor]]:
    """Series of the first sample of two ranks, and the global batches."""
    sampler = _sampler(DensityTimestepSampler, "uniform", draw)
    series: list[list[int]] = [[], []]
    batches = []
    for step in range(2000):
        parts = [
            sampler.sample(Slots(0, 4, 4) if shared else Slots(4 * rank, 4, 8), step=step).indices
            for rank in range(2)
        ]
        for values, part in zip(series, parts, strict=True):
            values.append(int(part[0]))
        batches.append(torch.cat(parts))
    return [np.array(values) for values in series], batches


@pytest.mark.parametrize("draw", ["iid", "stratified"])
def test_a_seed_shared_by_ranks_is_rejected(draw: str) -> None:
    mass = _sampler(DensityTimestepSampler, "uniform", draw).probabilities()
    apart, batches = _ranks(shared=False, draw=draw)
    if draw == "iid":  # the strata of one batch are dealt without replacement: -1/7
        assert not checks.correlated(*apart)
    else:
        assert [checks.strata_missed(batch, mass) for batch in batches] == [0] * 2000
    together, batches = _ranks(shared=True, draw=draw)
    assert checks.correlated(*together)
    assert all(checks.strata_missed(batch, mass) > 0 for batch in batches)


# -- the tests themselves --------------------------------------------------------------------------


def test_p_values_are_those_of_scipy_where_both_apply() -> None:
    rng = np.random.default_rng(0)
    mass = np.array([0.1, 0.2, 0.3, 0.4])
    counts = rng.multinomial(1000, mass)
    expected = stats.chisquare(counts, 1000 * mass).pvalue
    assert checks.chi_square(counts, mass) == pytest.approx(expected, rel=1e-9)


def test_cells_are_pooled_to_five() -> None:
    expected = np.array([0.1, 0.1, 30.0, 2.0, 2.0, 4.0, 100.0, 0.5])
    counts = np.arange(8)
    pooled, wanted = checks.pool(counts, expected)
    assert wanted.min() >= 5
    assert wanted.sum() == pytest.approx(expected.sum())
    assert pooled.sum() == counts.sum()
    assert wanted.tolist() == pytest.approx([30.2, 8.0, 100.5])


def test_draws_where_there_is_no_mass_are_rejected_at_once() -> None:
    assert checks.chi_square(np.array([1, 999]), np.array([0.0, 1.0])) == 0.0


@pytest.mark.parametrize("draw", ["iid", "antithetic"])
def test_honest_draws_are_rarely_rejected(draw: str) -> None:
    """The tests keep their level: of 400 honest data sets, p < 0.05 in about 20, or in fewer where
    the bound is conservative."""
    sampler = _sampler(DensityTimestepSampler, "cosine", draw)
    mass = sampler.probabilities().numpy()
    cdf = np.concatenate([[0.0], mass.cumsum()])
    chi, ks = [], []
    for step in range(400):
        counts = checks.counts_of(sampler.sample(20_000, step=step).indices, 1000)
        chi.append(checks.chi_square(counts, mass, draw))
        ks.append(checks.kolmogorov(counts, cdf, draw))
    limit = 20 + 4 * np.sqrt(400 * 0.05 * 0.95)
    assert sum(p < 0.05 for p in chi) < limit
    assert sum(p < 0.05 for p in ks) < limit
    if draw == "iid":  # and it is no formality: p-values spread over (0, 1)
        assert stats.kstest(chi, "uniform").pvalue > 1e-4
