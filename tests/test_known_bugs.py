"""Bugs of other training code: each check passes the library and rejects the wrong version, which
stands beside it in a few lines.

Those of single weightings and of diffusers' scripts are in tests/weighting/test_known_bugs.py and
tests/drop_in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler, NoiseLevels
from diffusers_curriculum.samplers import CurriculumTimestepSampler, SequenceTimestepSampler
from tests.floors_fixtures import SCHEDULERS, levels_of
from tests.statistics import checks
from tests.weighting.test_known_bugs import (
    check_terminal_level_is_trained,
    ours,
    with_terminal_weight,
)

LATER = {"strategy": "later", "multiplier": 4.0}  # the noisiest quarter, four times as likely
Draw = Callable[[int], Tensor]  # indices of a batch of the given size, 0 = cleanest


def rejected(check: Callable[..., None], *wrong: object) -> None:
    with pytest.raises(AssertionError):
        check(*wrong)


def uniform_sampler(scheduler: str = "sd", **settings: object) -> DensityTimestepSampler:
    return DensityTimestepSampler(SCHEDULERS[scheduler](), "uniform", floor=0.0, **settings)  # type: ignore[arg-type]


# -- segmented selection cancelling bias -----------------------------------------------------------


def check_share_of_last_quarter(draw: Draw, batch: int) -> None:
    """4 / (4 + 3): 57.1 % of the draws, whatever the size of the batch they are made in."""
    drawn = torch.cat([draw(batch) for _ in range(20_000 // batch)])
    share, exact = float((drawn >= 750).double().mean()), 4 / 7
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / len(drawn))


def segmented(generator: torch.Generator) -> Draw:
    """One draw from each of as many equal runs of timesteps as there are samples."""
    weights = torch.ones(1000, dtype=torch.float64)
    weights[750:] = 4.0

    def draw(batch: int) -> Tensor:
        runs = torch.arange(1000).tensor_split(batch)
        picked = [torch.multinomial(weights[run], 1, generator=generator) for run in runs]
        return torch.cat([run[index] for run, index in zip(runs, picked, strict=True)])

    return draw


@pytest.mark.parametrize("batch", [2, 4, 8, 3])
def test_segmented_selection_cancelling_bias(batch: int) -> None:
    """Strata of equal runs of timesteps leave 39.9 % at batch 2 and 25 % at 4 and 8; strata must
    be of equal probability."""
    sampler = DensityTimestepSampler(SCHEDULERS["sd"](), "timestep_bias", LATER, floor=0.0)
    assert sampler.draw == "stratified"
    assert float(sampler.probabilities()[750:].sum()) == pytest.approx(0.571, abs=5e-4)
    check_share_of_last_quarter(lambda size: sampler.sample(size).indices, batch)
    wrong = segmented(torch.Generator().manual_seed(0))
    rejected(check_share_of_last_quarter, wrong, batch)
    share = torch.cat([wrong(batch) for _ in range(2000)]).ge(750).double().mean()
    seen = {2: 0.399, 4: 0.25, 8: 0.25}.get(batch)
    assert seen is None or float(share) == pytest.approx(seen, abs=0.03)


# -- missing Jacobian ------------------------------------------------------------------------------


def quantiles(mass: Tensor, log_snr: Tensor, *probabilities: float) -> np.ndarray:
    """Log-SNR of the levels at which the cdf of ``mass`` passes, noisiest first."""
    cdf = mass.flip(0).cumsum(0)
    at = torch.searchsorted(cdf, torch.tensor(probabilities, dtype=torch.float64))
    return log_snr.flip(0)[at].numpy()


def check_laplace_quantiles(mass: Tensor, mu: float, b: float) -> None:
    """5, 50 and 95 % of log-SNR are those of scipy's law, cut to the schedule."""
    levels, law = levels_of("sd"), stats.laplace(mu, b)
    low, high = law.cdf([float(levels.edges[-1]), float(levels.edges[0])])
    p = np.array([0.05, 0.5, 0.95])
    exact = law.ppf(low + p * (high - low))
    # the widest cell where these quantiles lie is 0.13
    np.testing.assert_allclose(quantiles(mass, levels.log_snr, *p), exact, atol=0.07)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.0, 2.0)])
def test_missing_jacobian(mu: float, b: float) -> None:
    """The density at each level taken for its mass, whatever the width of its cell."""
    sampler = DensityTimestepSampler(SCHEDULERS["sd"](), "laplace", {"mu": mu, "b": b}, floor=0.0)
    check_laplace_quantiles(sampler.probabilities(), mu, b)
    at_levels = sampler.density.pdf(sampler.levels.log_snr)
    rejected(check_laplace_quantiles, at_levels / at_levels.sum(), mu, b)


# -- spikes and negative probabilities -------------------------------------------------------------


def check_probabilities(mass_at: Callable[[float], Tensor]) -> None:
    """At progress 0, 1/2, 1 and 2: no negative mass, a sum of 1, and no level with half of it."""
    for progress in (0.0, 0.5, 1.0, 2.0):
        mass = mass_at(progress)
        assert bool((mass >= 0).all()), f"negative at {progress}"
        assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
        assert float(mass.max()) < 0.5, f"a spike at {progress}"


def slipping(progress: float, mean: float = 500.0, std: float = 200.0) -> Tensor:
    """From a Gaussian to uniform timesteps; the division by 2 std^2 became one by 2, times std^2,
    and the progress is not held at 1."""
    t = torch.arange(1000, dtype=torch.float64)
    gauss = torch.exp(-((t - mean) ** 2) / 2 * std**2)
    return (1 - progress) * gauss / gauss.sum() + progress / 1000


def gaussian_to_uniform(progress: float) -> Tensor:
    """The same transition as phases: a narrow law, then uniform timesteps, mixed over 98 steps."""
    phases = [
        {"until": 1, "sampler": {"density": "normal", "density_args": {"std": 1.5}}},
        {"until": None, "sampler": {"density": "uniform"}},
    ]
    sampler = SequenceTimestepSampler.from_scheduler(
        SCHEDULERS["sd"](), phases, mix="linear", mix_steps=98
    )
    return sampler.probabilities(round(100 * progress))


def opening(progress: float) -> Tensor:
    """A curriculum over a law, in the middle of its stages and long after them."""
    base = DensityTimestepSampler(SCHEDULERS["sd"](), "laplace", floor=0.0)
    pacing = {"pacing": "linear", "pacing_args": {"total_steps": 100}}
    return CurriculumTimestepSampler(base, 20, "quantile", **pacing).probabilities(  # type: ignore[arg-type]
        round(100 * progress)
    )


@pytest.mark.parametrize("mass_at", [gaussian_to_uniform, opening])
def test_spikes_and_negative_probabilities(mass_at: Callable[[float], Tensor]) -> None:
    """SpeeD's curriculum: a precedence slip leaves one timestep, and progress beyond 1 negative
    probabilities."""
    check_probabilities(mass_at)
    rejected(check_probabilities, slipping)
    assert float(slipping(0.0).max()) == pytest.approx(1, abs=1e-12)
    assert float(slipping(2.0).min()) < 0
    # either mistake alone is seen as well
    rejected(check_probabilities, lambda progress: slipping(min(progress, 1.0)))
    rejected(check_probabilities, lambda p: (1 - p) * opening(0.5) + p / 1000)


# -- mirrored convention for flow schedulers -------------------------------------------------------


def check_noisiest_opens_first(scheduler: str, opened: Tensor) -> None:
    """The first stage of easy-to-hard trains the levels with the most noise for their data."""
    levels = levels_of(scheduler)
    noise = levels.sigma / (levels.alpha + levels.sigma)
    assert float(noise[opened].min()) > float(noise[~opened].max())


def check_timesteps_have_their_noise(scheduler: str, levels: NoiseLevels) -> None:
    """diffusers' own add_noise (or scale_noise) at a level's timestep leaves its alpha and sigma
    of data and noise."""
    theirs = SCHEDULERS[scheduler]()
    one, none, at = torch.ones(1, 1), torch.zeros(1, 1), [0, len(levels) // 3, len(levels) - 1]
    for index in at:
        timestep = levels.timesteps[index].reshape(1)
        if levels.family == "flow":
            data = float(theirs.scale_noise(one, timestep, none))
            noise = float(theirs.scale_noise(none, timestep, one))
        else:
            data = float(theirs.add_noise(one, none, timestep))
            noise = float(theirs.add_noise(none, one, timestep))
        assert data == pytest.approx(float(levels.alpha[index]), abs=1e-6)
        assert noise == pytest.approx(float(levels.sigma[index]), rel=1e-6)


def mirrored(levels: NoiseLevels) -> NoiseLevels:
    """The table of a scheduler that counts from the noisiest, read as if it counted from the
    cleanest."""
    flipped = levels.timesteps.flip(0)
    return NoiseLevels(
        levels.log_snr, levels.alpha, levels.sigma, flipped, levels.edges, "flow", levels.family
    )


@pytest.mark.parametrize("scheduler", ["flow", "flow_shift_3", "edm"])
def test_mirrored_convention_for_flow_schedulers(scheduler: str) -> None:
    """Flow matching counts noise, diffusers' flow schedulers list the noisiest timestep first."""
    levels = levels_of(scheduler)
    check_timesteps_have_their_noise(scheduler, levels)
    rejected(check_timesteps_have_their_noise, scheduler, mirrored(levels))
    sampler = CurriculumTimestepSampler(
        uniform_sampler(scheduler), 10, pacing="fixed", pacing_args={"stage_steps": 5}
    )
    opened = sampler.probabilities(0) > 0
    assert 0 < int(opened.sum()) < 500
    check_noisiest_opens_first(scheduler, opened)
    rejected(check_noisiest_opens_first, scheduler, opened.flip(0))
    drawn = sampler.sample(64, step=0)
    assert torch.equal(drawn.timesteps, levels.timesteps[drawn.indices])


# -- clipped last timestep -------------------------------------------------------------------------


def check_every_level_is_drawn(draw: Draw, levels: int) -> None:
    """Of as many strata of equal probability as there are levels, each holds one level."""
    assert torch.equal(draw(levels).sort().values, torch.arange(levels))


@pytest.mark.parametrize("scheduler", ["sd", "sd_zero_terminal", "flow", "edm"])
def test_clipped_last_timestep(scheduler: str) -> None:
    """An exclusive upper bound where an inclusive one is meant, or an index cut to T - 2."""
    sampler = uniform_sampler(scheduler)
    count = len(sampler.levels)
    check_every_level_is_drawn(lambda size: sampler.sample(size).indices, count)
    rejected(
        check_every_level_is_drawn,
        lambda size: sampler.sample(size).indices.clamp_max(size - 2),
        count,
    )
    rejected(
        check_every_level_is_drawn,
        lambda size: (torch.arange(size) / size * (size - 1)).long(),
        count,
    )
    ends = sampler.sample(u=torch.tensor([0.0, 1.0], dtype=torch.float64)).indices
    assert ends.tolist() == [0, count - 1]


# -- per-batch without replacement -----------------------------------------------------------------


def repeats(draw: Draw, batch: int, batches: int) -> float:
    """Mean number of pairs of equal levels in a batch."""
    counts = [torch.bincount(draw(batch)) for _ in range(batches)]
    return float(np.mean([float((c * (c - 1) / 2).sum()) for c in counts]))


def check_repeats(draw: Draw, mass: Tensor) -> None:
    """Independent draws repeat: n (n - 1) / 2 sum p^2 pairs in a batch of n."""
    batch, batches = 64, 1500
    pairs = batch * (batch - 1) / 2
    exact = pairs * float(mass.square().sum())
    # pairs of one batch share samples: var <= exact + 2 pairs (n - 2) sum p^3
    variance = exact + 2 * pairs * (batch - 2) * float(mass.pow(3).sum())
    assert abs(repeats(draw, batch, batches) - exact) < 4 * math.sqrt(variance / batches)


def test_per_batch_without_replacement() -> None:
    """A batch whose timesteps all differ follows no narrow law."""
    sampler = DensityTimestepSampler(SCHEDULERS["sd"](), "laplace", draw="iid")
    mass, generator = sampler.probabilities(), torch.Generator().manual_seed(0)
    check_repeats(lambda size: sampler.sample(size).indices, mass)

    def wrong(size: int) -> Tensor:
        return torch.multinomial(mass, size, replacement=False, generator=generator)

    rejected(check_repeats, wrong, mass)
    drawn = torch.cat([wrong(512) for _ in range(200)])
    counts = checks.counts_of(drawn, 1000)
    assert checks.chi_square(counts, mass.numpy()) < checks.SIGNIFICANCE
    honest = torch.cat([sampler.sample(512).indices for _ in range(200)])
    counts = checks.counts_of(honest, 1000)
    assert checks.chi_square(counts, mass.numpy()) > checks.SIGNIFICANCE


# -- all-zero weight at zero terminal SNR ----------------------------------------------------------


def test_all_zero_weight_at_zero_terminal_snr() -> None:
    """min-SNR on v leaves a batch of terminal levels without gradient; there are two remedies."""
    check_terminal_level_is_trained(with_terminal_weight)
    check_terminal_level_is_trained(ours("min_snr_plus_one", "v_prediction"))
    rejected(check_terminal_level_is_trained, ours("min_snr", "v_prediction"))
    rejected(check_terminal_level_is_trained, lambda snr: snr.clamp_max(5) / (snr + 1))
    rejected(check_terminal_level_is_trained, lambda snr: snr.clamp_max(5) / snr)  # 0 / 0
