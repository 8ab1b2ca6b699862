"""Each source draws by its own law, and each law learns from its own samples and no others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, Slots
from diffusers_curriculum.samplers import (
    LossSecondMomentTimestepSampler,
    PerSourceTimestepSampler,
    TimestepSampler,
    describe_config,
)
from diffusers_curriculum.samplers.description import plain_config
from tests.floors_fixtures import SCHEDULERS

SOURCES = np.array([0, 1, 2, 1, -1, 2, 0, 1])
EACH = {0: [0, 4, 6], 1: [1, 3, 7], 2: [2, 5]}  # slots of the laws


def curriculum(scheduler: Any) -> TimestepSampler:
    base = DensityTimestepSampler(scheduler, "uniform", draw="stratified", floor=0.0)
    return CurriculumTimestepSampler(
        base, clusters=4, pacing="patience", pacing_args={"patience": 2}
    )


def learned(scheduler: Any) -> TimestepSampler:
    pace: dict[str, Any] = {
        "warm_up": 2,
        "refresh_every": 2,
        "min_observations": 1,
        "bins": 4,
        "neighbours": 0,
    }
    return LossSecondMomentTimestepSampler(scheduler, **pace)


def laplace(scheduler: Any, **more: Any) -> TimestepSampler:
    options = {"draw": "stratified", "importance_correction": 0.5} | more
    return DensityTimestepSampler(scheduler, "laplace", {"mu": 3, "b": 0.5}, **options)


def three(schedule: str = "sd") -> tuple[PerSourceTimestepSampler, list[TimestepSampler]]:
    """A sampler for three sources, and its laws once more."""
    twice = [
        [make(SCHEDULERS[schedule]()) for make in (curriculum, learned, laplace)] for _ in "ab"
    ]
    return PerSourceTimestepSampler(twice[0], (0, 1, 2)), twice[1]


def losses_of(step: int, count: int = len(SOURCES)) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(step)) + 0.5


def step_of(sampler: PerSourceTimestepSampler, step: int) -> Any:
    drawn = sampler.sample(Slots(0, 8, 8), step=step, sources=SOURCES)
    sampler.observe(drawn.indices, losses_of(step), step, sources=SOURCES)
    return drawn


def test_each_slot_is_drawn_and_observed_as_its_law_alone_would() -> None:
    sampler, alone = three()
    for step in range(40):
        drawn, losses = step_of(sampler, step), losses_of(step)
        for law, slots in EACH.items():
            plain = alone[law].sample(Slots(0, 8, 8), step=step)
            assert drawn.indices[slots].equal(plain.indices[slots])
            assert drawn.timesteps[slots].equal(plain.timesteps[slots])
            assert drawn.importance[slots].equal(plain.importance[slots])
            alone[law].observe(drawn.indices[slots], losses[slots], step)
    assert sampler.stage(40) == 4
    assert not sampler.parts[1].probabilities(40).equal(learned(SCHEDULERS["sd"]()).probabilities())
    assert (drawn.importance[EACH[2]] != 1).all()
    assert sampler.exponent == 1


def test_places_are_those_of_the_laws_where_draws_are_continuous() -> None:
    laws = [laplace(SCHEDULERS["edm"](), continuous=True, floor=floor) for floor in (0.9, 0.1)]
    drawn = PerSourceTimestepSampler(laws, (0, 1)).sample(8, step=3, sources=SOURCES % 2)
    for law, odd in zip(laws, (False, True), strict=True):
        own = odd == SOURCES % 2
        assert drawn.at[own].equal(law.sample(8, step=3).at[own])


def test_a_saved_state_goes_on(tmp_path: Any) -> None:
    whole, parts = three()[0], three()[0]
    for step in range(9):
        for each in (whole, parts):
            step_of(each, step)
    parts.save_pretrained(str(tmp_path))
    again = TimestepSampler.from_pretrained(str(tmp_path))
    assert isinstance(again, PerSourceTimestepSampler)
    again.load_state_dict(again.upgraded(parts.state_dict()))
    for step in range(9, 20):
        assert step_of(again, step).indices.equal(step_of(whole, step).indices)
    of_one_law = parts.state_dict() | {"law1.state.learned": torch.tensor(True)}  # as once
    assert again.upgraded(of_one_law)["law1.state.learned"].shape == (4,)
    state = {k: v for k, v in parts.state_dict().items() if not k.startswith("law1.")}
    with pytest.raises(ValueError, match="does not belong to PerSourceTimestepSampler"):
        again.load_state_dict(state)


class Order:
    """Half of all is of the first source, a quarter of the second, the rest of none."""

    shares_of_sources = (0.5, 0.25)

    def sources_at(self, step: int, slots: Slots) -> np.ndarray:
        return self.sources_observed(step)[slots.start : slots.start + slots.count]

    def sources_observed(self, step: int) -> np.ndarray:
        return np.array([0, 1, 0, -1, 0, 1, 0, -1])


def test_an_order_tells_the_sources() -> None:
    scheduler = SCHEDULERS["sd"]()
    laws = [DensityTimestepSampler(scheduler, "uniform", draw="stratified"), laplace(scheduler)]
    sampler = PerSourceTimestepSampler(laws, (0, 1))
    mean = sum(law.probabilities() for law in laws) / 2
    torch.testing.assert_close(sampler.probabilities(), mean)
    sampler.take_order(Order())
    mean = 0.75 * laws[0].probabilities() + 0.25 * laws[1].probabilities()
    torch.testing.assert_close(sampler.probabilities(), mean)
    assert (sampler.probabilities() * sampler.importance()).sum() == pytest.approx(1)
    told = sampler.sample(Slots(2, 4, 8), step=5, sources=(0, -1, 0, 1))
    assert sampler.sample(Slots(2, 4, 8), step=5).indices.equal(told.indices)


def test_it_says_what_it_is() -> None:
    sampler, laws = three()
    words = "; ".join(
        [laws[0].describe(), *(f"of source{n}: {laws[n - 1].describe()}" for n in (2, 3))]
    )
    assert sampler.describe() == words
    assert describe_config(json.loads(json.dumps(plain_config(sampler)))) == words
    assert [*sampler.laws] == ["", "source2", "source3"]
    assert sampler.rows()["Timesteps of source3"] == laws[2].describe()
    assert {"curriculum/stage", "source2/sampler/law_is_learned"} <= sampler.report(
        0
    ).metrics.keys()
    assert "source2_law_is_learned" in sampler.metrics()
    assert list(sampler.walk())[1:] == [
        sampler.parts[0],
        sampler.parts[0].inner[0],
        *sampler.parts[1:],
    ]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda s: PerSourceTimestepSampler([], ()), "draws from nothing"),
        (lambda s: PerSourceTimestepSampler([laplace(s)], (0, 1)), "must name each of 1 laws"),
        (lambda s: PerSourceTimestepSampler([laplace(s)] * 3, (0, 2)), "must name each of 3 laws"),
        (lambda s: PerSourceTimestepSampler([s], (0,)), "is no sampler: give one, or its config"),
        (
            lambda s: PerSourceTimestepSampler([laplace(s), laplace(s, seed=1)], (0, 1)),
            "law 2 has seed=1 and law 1 0: give all the same draw, seed and continuous",
        ),
        (
            lambda s: PerSourceTimestepSampler([laplace(s), laplace(SCHEDULERS["edm"]())], (0, 1)),
            "law 2 is of another schedule than law 1",
        ),
        (lambda s: three()[0].sample(8, step=0), "of which source each sample is"),
        (lambda s: three()[0].sample(8, step=0, sources=[0]), "must be 8 numbers from -1"),
        (lambda s: three()[0].sample(1, step=0, sources=[3]), "to 2, one for each sample"),
        (lambda s: three()[0].sample(step=0, sources=[0]), "give one"),
        (
            lambda s: three()[0].observe(torch.zeros(1).long(), torch.ones(1), 0),
            "of which source each loss is",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(SCHEDULERS["sd"]())
