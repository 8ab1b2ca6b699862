"""Pairs of times: the law of both, their opening, one process or two, state and config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, Slots
from diffusers_curriculum.samplers import (
    IntervalTimestepSampler,
    LossSecondMomentTimestepSampler,
    TimestepSampler,
)
from tests.floors_fixtures import SCHEDULERS

BATCH = 64


def law(continuous: bool = True, **more: Any) -> TimestepSampler:
    settings: dict[str, Any] = {"draw": "stratified", "floor": 0.0, "continuous": continuous} | more
    return DensityTimestepSampler(SCHEDULERS["flow"](), "logit_normal", **settings)


def times(sampler: TimestepSampler, batch: int | Slots = BATCH, **more: Any) -> tuple[Any, Any]:
    """t and t - r as fractions of noise."""
    later, length = sampler.sample(batch, **more).timesteps / 1000
    return later, length


@pytest.mark.parametrize("continuous", [True, False])
def test_they_are_two_draws_in_order(continuous: bool) -> None:
    sampler = IntervalTimestepSampler(law(continuous), share=0.25)
    drawn = sampler.sample(BATCH, step=3)
    later, length = drawn.timesteps / 1000
    assert drawn.timesteps.shape == (2, BATCH)
    assert (length >= 0).all()
    assert (length <= later).all()
    assert drawn.interval is not None
    # stratified: a quarter of the batch, exactly
    assert len(drawn.interval.longer) == BATCH / 4
    assert torch.equal(drawn.interval.longer, length.nonzero().flatten())
    assert torch.allclose(drawn.interval.length, length)
    noise = sampler.levels.coefficients(drawn.at)[1]
    assert torch.allclose(noise, later.double(), atol=1e-6)


def test_the_mass_is_that_of_the_noisier_time() -> None:
    sampler = IntervalTimestepSampler(law(False, draw="iid"), share=1.0)
    drawn = torch.cat([sampler.sample(20_000, step=step).indices for step in range(5)])
    found = torch.bincount(drawn, minlength=1000).cumsum(0) / len(drawn)
    assert (found - sampler.probabilities().cumsum(0)).abs().max() < 0.01
    single = law(False).probabilities().cumsum(0)
    assert torch.allclose(sampler.probabilities().cumsum(0), single.square())


def test_velocities_then_short_intervals_then_long_ones() -> None:
    sampler = IntervalTimestepSampler(law(), share=0.5, opening_steps=300)
    lengths = [times(sampler, step=step)[1] for step in (0, 99, 100, 200, 299, 300)]
    shares = [int((length > 0).sum()) / BATCH for length in lengths]
    assert shares == [0, 0, 0.5, 0.5, 0.5, 0.5]
    means = [float(length.mean()) for length in lengths]
    assert means[1] < means[2] < means[3] < means[4]
    whole = IntervalTimestepSampler(law(), share=0.5)
    for step, factor in ((100, 1 / 200), (200, 0.505), (299, 1.0), (300, 1.0)):
        expected = factor * times(whole, step=step)[1]
        assert torch.allclose(times(sampler, step=step)[1], expected, atol=1e-6)


def test_one_process_and_two_see_the_same_pairs() -> None:
    whole, part = (IntervalTimestepSampler(law()) for _ in "ab")
    for step in range(3):
        together = torch.stack(times(whole, Slots(0, 16, 16), step=step))
        apart = [torch.stack(times(part, Slots(start, 8, 16), step=step)) for start in (0, 8)]
        assert torch.equal(together, torch.cat(apart, 1))


def test_a_curriculum_goes_on_inside() -> None:
    base = CurriculumTimestepSampler(
        law(), clusters=4, pacing="patience", pacing_args={"patience": 2, "smoothing": 0.0}
    )
    sampler = IntervalTimestepSampler(base, share=1.0)
    high = base.open_range(1)[1]
    first = sampler.sample(BATCH, step=0)
    assert first.log_snr is not None
    assert float(first.log_snr.max()) <= high + 0.1  # up to the clean edge of a cell
    assert sampler.stages == 4
    losses: Tensor = torch.ones(BATCH)
    for step in range(12):
        drawn = sampler.sample(BATCH, step=step)
        sampler.observe(drawn.indices, losses, step)
    assert sampler.stage(12) == base.stage(12) > 1
    assert sampler.report(12).stage == base.stage(12)

    again = IntervalTimestepSampler.from_config(sampler.config)
    again.load_state_dict(sampler.state_dict())
    assert again.stage(12) == sampler.stage(12)
    for a, b in zip(times(sampler, step=12), times(again, step=12), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(sampler.at_stage(4)[0], IntervalTimestepSampler(law()).probabilities())


def test_the_default_law_is_the_papers() -> None:
    sampler = IntervalTimestepSampler.from_scheduler(SCHEDULERS["flow"]())
    assert sampler.describe() == (
        "logit_normal(mean=-0.4, std=1.0), continuous=True; two times for a share of 0.25"
    )
    assert "two times" in sampler.rows()["Two times"]


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (lambda: DensityTimestepSampler(SCHEDULERS["sd"](), "uniform"), {}, "family 'vp'"),
        (lambda: law(importance_correction="full"), {}, "corrects by importance"),
        (lambda: LossSecondMomentTimestepSampler(SCHEDULERS["flow"]()), {}, "follows the losses"),
        (law, {"share": 1.5}, "share=1.5"),
        (law, {"opening_steps": -1}, "opening_steps=-1"),
    ],
)
def test_what_is_no_law_of_pairs_is_refused(base: Any, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntervalTimestepSampler(base(), **settings)
