"""What samplers tell of themselves, and how they say that they change over a run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_curriculum import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    GradientNormTimestepSampler,
    LossProportionalTimestepSampler,
    SequenceTimestepSampler,
    TimestepSampler,
)
from diffusers_curriculum.samplers import AutoTimestepSampler, describe_config
from diffusers_curriculum.samplers.description import plain_config
from tests.floors_fixtures import SCHEDULERS, table


def laplace(**settings: Any) -> DensityTimestepSampler:
    args = {"mu": 1, "b": 2}
    return DensityTimestepSampler(SCHEDULERS["sd"](), "laplace", args, **settings)


def curriculum(base: TimestepSampler | None = None, **settings: Any) -> CurriculumTimestepSampler:
    paced = {"pacing": "fixed", "pacing_args": {"stage_steps": 30}} | settings
    return CurriculumTimestepSampler(base or laplace(), clusters=4, **paced)


def sequence(*phases: TimestepSampler, ends: tuple[int, ...] = (40,), **mix: Any) -> Any:
    given = [
        {"until": end, "sampler": phase} for phase, end in zip(phases, [*ends, None], strict=True)
    ]
    return SequenceTimestepSampler(given, **mix)


class Custom(TimestepSampler):
    """It has no config."""

    def law(self, step: int, device: torch.device) -> Tensor:
        return torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, device=device)


def custom() -> Custom:
    return Custom(table([1, 0, -1]))


# -- words -----------------------------------------------------------------------------------------

CLUSTERS = "4 clusters by quantile, easy_to_hard, fixed(stage_steps=30)"
LEARNING = "loss_proportional, floor=0.1"
WORDS: dict[str, Any] = {
    "laplace(mu=1, b=2), floor=0.1": laplace,
    "laplace(mu=1, b=2)": lambda: laplace(floor=0.0, seed=7),
    "laplace(mu=1, b=2), draw=sobol, floor=0.1, importance_correction=0.5": lambda: laplace(
        draw="sobol", importance_correction=0.5
    ),
    LEARNING: lambda: LossProportionalTimestepSampler(SCHEDULERS["sd"]()),
    "loss_proportional, warm_up=7, floor=0.1, measure=log_snr": lambda: (
        LossProportionalTimestepSampler(SCHEDULERS["sd"](), measure="log_snr", warm_up=7)
    ),
    "gradient_norm, floor=0.1, mode=loss": lambda: GradientNormTimestepSampler.from_losses(
        SCHEDULERS["sd"]()
    ),
    f"laplace(mu=1, b=2), floor=0.1; {CLUSTERS}": curriculum,
    "laplace(mu=1, b=2), floor=0.1; 4 clusters by snr(center=ant), random, patience, balanced": (
        lambda: curriculum(
            clustering="snr",
            clustering_args={"center": "ant"},
            order="random",
            pacing="patience",
            pacing_args=None,
            within="balanced",
        )
    ),
    f"{LEARNING}; clusters by explicit(boundaries=[0, 500]), easy_to_hard, fixed(stage_steps=30)": (
        lambda: curriculum(
            LossProportionalTimestepSampler(SCHEDULERS["sd"]()),
            clustering="explicit",
            clustering_args={"boundaries": [0, 500]},
        )
    ),
    "normal(mean=-1.6, std=2.0), floor=0.1 until step 5, then uniform, floor=0.1": lambda: (
        SequenceTimestepSampler.two_phase(SCHEDULERS["sd"](), 5)
    ),
    # a curriculum inside a sequence shows its base
    f"laplace(mu=1, b=2), floor=0.1; {CLUSTERS} until step 40, "
    "then laplace(mu=1, b=2), floor=0.1, mixed over 3 steps": lambda: sequence(
        curriculum(), laplace(), mix="linear", mix_steps=3
    ),
    "Custom": custom,
}


@pytest.mark.parametrize("words", WORDS)
def test_a_sampler_says_what_it_is(words: str) -> None:
    assert WORDS[words]().describe() == words


@pytest.mark.parametrize("words", [words for words in WORDS if words != "Custom"])
def test_a_config_says_the_same_as_the_sampler(words: str) -> None:
    """As it stands in a manifest."""
    config = json.loads(json.dumps(plain_config(WORDS[words]())))
    assert describe_config(config) == words


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "-"),
        ("laplace", "-"),
        ({}, "-"),
        ({"_class_name": "MySampler"}, "MySampler"),
        ({"density": "uniform", "density_args": {}}, "uniform"),
        ({"_class_name": "X", "density": "laplace", "density_args": {"b": 0.5}}, "laplace(b=0.5)"),
        ({"_class_name": "DensityTimestepSampler", "density": "a", "density_args": 3}, "a"),
        ({"_class_name": "SequenceTimestepSampler", "phases": 3}, "SequenceTimestepSampler"),
        ({"_class_name": "SequenceTimestepSampler", "phases": [3]}, "SequenceTimestepSampler"),
        (
            {"_class_name": "CurriculumTimestepSampler", "base": 3, "clusters": 5},
            "-; 5 clusters by None, None, None",
        ),
        (
            {"density": "mixture", "density_args": {"components": "x" * 24}},
            "mixture(components=...)",
        ),
    ],
)
def test_a_config_that_is_not_understood_is_told_as_far_as_it_goes(config: Any, words: str) -> None:
    assert describe_config(config) == words


def test_rows_of_a_model_card() -> None:
    law = {"Timestep density": "laplace(mu=1, b=2), floor=0.1", "Timestep draw": "stratified"}
    assert laplace().rows() == law
    fixed = CLUSTERS
    assert curriculum().rows() == law | {"Curriculum": fixed}
    twice = curriculum(curriculum(), pacing_args={"stage_steps": 9}).rows()
    assert twice == law | {"Curriculum": f"{fixed.replace('30', '9')}; inside it {fixed}"}
    phases = sequence(curriculum(), laplace()).rows()
    assert phases["Timestep density"].startswith(f"laplace(mu=1, b=2), floor=0.1; {fixed} until")


# -- progress --------------------------------------------------------------------------------------


def test_a_report_without_a_curriculum_tells_the_metrics() -> None:
    assert laplace().report(3) == ({}, {}, 1)
    learning = LossProportionalTimestepSampler(SCHEDULERS["sd"](), refresh_every=1)
    learning.observe(torch.arange(1000), torch.ones(1000), 0)
    told = learning.report(1)
    assert told.metrics == {"sampler/law_is_learned": 0.0, "sampler/least_observations": 15.0}
    assert all(type(value) is float for value in told.metrics.values())
    assert (told.shown, told.stage) == ({}, 1)


def test_the_median_of_auto_is_told_and_so_it_is_under_a_curriculum() -> None:
    soon: dict[str, Any] = {"refresh_every": 1, "warm_up": 0, "min_observations": 1}
    learning = AutoTimestepSampler(SCHEDULERS["sd"](), prediction_type="v_prediction", **soon)
    over = CurriculumTimestepSampler(learning, 4, pacing="fixed", pacing_args={"stage_steps": 9})
    before = learning.report(0).metrics["sampler/law_median_log_snr"]
    assert before == pytest.approx(-0.5, abs=0.1)  # of the warm-up
    over.observe(torch.arange(1000), torch.linspace(0.1, 1, 1000), 40)
    own = learning.report(41).metrics
    assert own["sampler/law_is_learned"] == 1
    assert own["sampler/law_median_log_snr"] < -1
    told = over.report(41).metrics
    assert told["curriculum/stage"] == 4
    assert own.items() <= told.items()


def test_a_report_of_a_curriculum_tells_stage_range_and_pacing() -> None:
    sampler = curriculum(pacing="patience", pacing_args={"patience": 2})
    for step in range(4):
        sampler.observe(torch.tensor([999]), torch.tensor([1.0]), step)
    low, high = sampler.open_range(2)
    told = sampler.report(4)
    assert told.metrics == {
        "curriculum/stage": 2,
        "curriculum/log_snr_low": low,
        "curriculum/log_snr_high": high,
        "curriculum/patience_counter": 0,
        "curriculum/best_loss": 1.0,
    }
    assert told.shown == {"stage": "2/4", "log_snr": f"[{low:.1f}, {high:.1f}]"}
    assert told.stage == 2
    opened = f"stage 2 of 4 since step 3: log-SNR {low:.2f} to {high:.2f}, new cluster 2"
    assert sampler.opening(2) == opened
    assert laplace().opening(1) == "stage 1 of 1"


# -- over a run ------------------------------------------------------------------------------------


def test_what_has_one_stage() -> None:
    for sampler in (laplace(), custom(), sequence(curriculum(), laplace())):
        assert (sampler.stage(99), sampler.stages, sampler.pacing) == (1, 1, None)
        assert sampler.opened is sampler
        assert sampler.stage_starts(100) == ([0.0], "")
        mass, importance = sampler.at_stage(step=7)
        assert torch.equal(mass, sampler.probabilities(7))
        assert torch.equal(importance, sampler.importance(7))
    assert laplace().groups() == ("tenth", list(range(0, 1000, 100)))
    assert custom().groups() == ("tenth", [0, 1, 2])


def test_a_curriculum_says_where_its_stages_begin() -> None:
    sampler = curriculum()
    assert sampler.groups() == ("cluster", sampler.starts)
    assert sampler.stage_starts(100) == ([0.0, 30.0, 60.0, 90.0], "stages as planned")
    assert sampler.stage_starts(50)[0][:2] == [0.0, 30.0]
    assert min(sampler.stage_starts(50)[0][2:]) > 50
    patient = curriculum(pacing="patience", pacing_args={"patience": 10})
    starts, how = patient.stage_starts(100)
    assert how == "stages as on a loss plateau"
    assert starts == pytest.approx([0.0, 17.8, 35.6, 53.4], abs=0.1)
    patient.observe(torch.tensor([999]), torch.tensor([1.0]), 0)
    assert patient.stage_starts(100) == (
        [0.0, math.inf, math.inf, math.inf],
        "stages as they opened",
    )


def test_the_law_of_each_stage_is_that_of_its_steps() -> None:
    sampler = curriculum(laplace(importance_correction="full"))
    before = sampler.state_dict()
    for stage, step in ((1, 0), (2, 30), (4, 90), (None, 90)):
        mass, importance = sampler.at_stage(stage, step)
        assert torch.equal(mass, sampler.probabilities(step))
        assert torch.equal(importance, sampler.importance(step))
    assert torch.equal(sampler.at_stage(0)[0], sampler.probabilities(0))
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(before[k])) for k, v in before.items()
    )
    assert sampler.opened is sampler.base
    assert curriculum(sampler).opened is sampler.base


def test_when_to_look_at_a_law() -> None:
    assert laplace().moments(500) == curriculum().moments(500) == [0]
    assert LossProportionalTimestepSampler(SCHEDULERS["sd"]()).moments(500) == [0]
    two = sequence(laplace(), laplace())
    assert two.moments(10) == list(range(10))
    moments = two.moments(6400)
    assert len(moments) == 65  # every hundredth step, and where the second phase begins
    assert {0, 40, 100, 6300} <= set(moments)
    assert curriculum(two).moments(6400) == moments
    assert 40 not in two.moments(40)


def test_who_learns_and_who_is_inside() -> None:
    learning = LossProportionalTimestepSampler(SCHEDULERS["sd"](), importance_correction="none")
    inner = curriculum(learning)
    outer = sequence(laplace(), inner)
    assert [s.learns for s in (laplace(), curriculum(), learning, inner, outer)] == [
        *(False, False, True, True, True)
    ]
    assert list(outer.walk()) == [outer, outer.samplers[0], inner, learning]
    assert outer.stage_starts(9) == ([0.0], "as learned so far")
