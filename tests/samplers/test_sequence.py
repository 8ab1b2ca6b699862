"""One sampler after the other: when, how mixed, and who learns meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.randomness import Slots
from diffusers_curriculum.samplers import (
    SAMPLERS,
    LossSecondMomentTimestepSampler,
    SequenceTimestepSampler,
)
from tests.floors_fixtures import SCHEDULERS, untouched_global_generators
from tests.samplers.adaptive_fixtures import build, loss_profile, random_losses, state_hash
from tests.samplers.draws import parts

CPU = torch.device("cpu")
FIXED = {"clusters": 4, "pacing": "fixed", "pacing_args": {"stage_steps": 3}}


def _density(density: str = "laplace", schedule: str = "sd", **kwargs: Any) -> TimestepSampler:
    return DensityTimestepSampler(SCHEDULERS[schedule](), density, **kwargs)


def _sequence(
    *phases: tuple[int | None, TimestepSampler], **kwargs: Any
) -> SequenceTimestepSampler:
    return SequenceTimestepSampler(
        [{"until": until, "sampler": sampler} for until, sampler in phases], **kwargs
    )


def _three(**kwargs: Any) -> SequenceTimestepSampler:
    names = ("normal", "laplace", "uniform")
    return _sequence(*zip((10, 25, None), map(_density, names), strict=True), **kwargs)


def _run(sampler: TimestepSampler, steps: range, batch: int = 32) -> Tensor:
    drawn = []
    for step in steps:
        drawn.append(sampler.sample(batch, step=step).indices)
        sampler.observe(drawn[-1], random_losses(step, batch), step)
    return torch.cat(drawn)


class Witness(DensityTimestepSampler):
    """Writes down the steps it is shown."""

    def __init__(self, scheduler: Any, density: str = "uniform", **kwargs: Any) -> None:
        super().__init__(scheduler, density, **kwargs)
        self.seen: list[int] = []

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        self.seen.append(step)


class Learner(Witness):
    learns_from_any_law = True


# -- hard switches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "full", 0.5])
def test_each_step_is_drawn_from_its_phase(correction: str | float) -> None:
    alone = [
        _density(n, importance_correction=correction, seed=2)
        for n in ("normal", "laplace", "uniform")
    ]
    sequence = _sequence((10, alone[0]), (25, alone[1]), (None, alone[2]))
    for step in (0, 1, 9, 10, 24, 25, 26, 10_000):
        phase = alone[0 if step < 10 else 1 if step < 25 else 2]
        assert torch.equal(sequence.probabilities(step), phase.probabilities())
        assert torch.equal(sequence.importance(step), phase.importance())
        drawn, alone_drawn = (s.sample(200, step=step) for s in (sequence, phase))
        for ours, theirs in zip(parts(drawn), parts(alone_drawn), strict=True):
            assert torch.equal(ours, theirs)


def test_calls_are_counted_where_no_step_is_given() -> None:
    counted, told = _three(), _three()
    for step in range(30):
        assert torch.equal(counted.sample(8).indices, told.sample(8, step=step).indices)


def test_a_single_phase_is_its_sampler() -> None:
    base = _density()
    sequence = _sequence((None, base))
    assert torch.equal(sequence.sample(500, step=7).indices, base.sample(500, step=7).indices)


# -- linear mixing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "full"])
@pytest.mark.parametrize("mix_steps", [1, 4, 15])
def test_laws_are_mixed_linearly_from_the_switch_on(mix_steps: int, correction: str) -> None:
    laws = [_density(n, importance_correction=correction) for n in ("normal", "laplace", "uniform")]
    sequence = _sequence(
        (10, laws[0]), (25, laws[1]), (None, laws[2]), mix="linear", mix_steps=mix_steps
    )
    mass = [sampler.probabilities() for sampler in laws]
    shares = np.arange(1, mix_steps + 1) / (mix_steps + 1)
    for step in range(50):
        expected = mass[0 if step < 10 else 1 if step < 25 else 2]
        for number, switch in ((1, 10), (2, 25)):
            if 0 <= step - switch < mix_steps:
                share = shares[step - switch]
                expected = (1 - share) * mass[number - 1] + share * mass[number]
        torch.testing.assert_close(sequence.probabilities(step), expected, rtol=1e-12, atol=1e-18)
        ratio = 1e-3 / expected if correction == "full" else torch.ones_like(expected)
        torch.testing.assert_close(sequence.importance(step), ratio, rtol=1e-9, atol=0)


def test_draws_of_a_mixture_pass_a_chi_square_test() -> None:
    sequence = SequenceTimestepSampler.two_phase(
        SCHEDULERS["sd"](), 1, mix="linear", mix_steps=1, draw="iid", floor=0.0
    )
    drawn = sequence.sample(100_000, step=1).indices
    edges = sequence.levels.edges.numpy()
    normal = scipy.stats.norm(-1.6, 2.0)
    first = normal.cdf(edges[:-1]) - normal.cdf(edges[1:])
    expected = 0.5 * first / first.sum() + 0.5 / 1000
    counts = np.bincount(drawn.numpy() // 20, minlength=50)
    assert scipy.stats.chisquare(counts, expected.reshape(50, 20).sum(1) * 1e5).pvalue > 1e-4


# -- two phases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["flow", "sd", "edm"])
def test_two_phases_are_logit_normal_then_uniform(schedule: str) -> None:
    sequence = SequenceTimestepSampler.two_phase(SCHEDULERS[schedule](), 60, seed=4, floor=0.0)
    edges, levels = sequence.levels.edges.numpy(), len(sequence.levels)
    if schedule == "flow":  # logit of the noise fraction t is N(0.8, 1)
        noise = 1 / (1 + np.exp(edges / 2))
        law = scipy.stats.norm(0.8, 1.0)
        with np.errstate(divide="ignore"):
            mass = np.diff(law.cdf(np.log(noise / (1 - noise))))
    else:
        mass = -np.diff(scipy.stats.norm(-1.6, 2.0).cdf(edges))
    np.testing.assert_allclose(sequence.probabilities(59), mass / mass.sum(), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(sequence.probabilities(60), 1 / levels, rtol=1e-12)
    assert sequence.seed == 4
    assert {p["sampler"]["seed"] for p in sequence.config["phases"]} == {4}


def test_two_phases_of_other_laws() -> None:
    sequence = SequenceTimestepSampler.two_phase(
        SCHEDULERS["sd"](),
        5,
        {"density": "cauchy", "density_args": {"gamma": 2.0}},
        {"density": "laplace"},
        mix="linear",
        mix_steps=3,
    )
    cauchy = _density("cauchy", density_args={"gamma": 2.0})
    assert torch.equal(sequence.probabilities(4), cauchy.probabilities())
    assert torch.equal(sequence.probabilities(8), _density("laplace").probabilities())


# -- who learns ------------------------------------------------------------------------------------


def test_losses_go_to_phases_in_force_and_to_learners_to_come() -> None:
    scheduler = SCHEDULERS["sd"]()
    phases = [Learner(scheduler), Witness(scheduler), Learner(scheduler), Witness(scheduler)]
    sequence = _sequence(*zip((4, 8, 12, None), phases, strict=True))
    _run(sequence, range(15))
    assert phases[0].seen == list(range(4))  # over is over
    assert phases[1].seen == list(range(4))  # its own steps
    assert phases[2].seen == list(range(12))  # from the start of the run
    assert phases[3].seen == list(range(3))
    assert sequence.phases_at(13) == [(3, 1, 1.0)]


def test_both_phases_learn_while_they_are_mixed() -> None:
    scheduler = SCHEDULERS["sd"]()
    phases = [Witness(scheduler), Witness(scheduler)]
    sequence = _sequence((4, phases[0]), (None, phases[1]), mix="linear", mix_steps=2)
    _run(sequence, range(9))
    assert phases[0].seen == [0, 1, 2, 3, 4, 5]
    assert phases[1].seen == [0, 1, 2, 3, 4]


def test_an_adaptive_phase_has_its_law_ready_when_its_turn_comes() -> None:
    adaptive = build("second_moment", importance_correction="none")
    sequence = _sequence((20, _density()), (None, adaptive))
    for step in range(20):
        sequence.observe(torch.arange(1000), loss_profile(1000), step)
        assert torch.equal(sequence.probabilities(step), _density().probabilities())
    alone = build("second_moment", importance_correction="none")
    for step in range(20):
        alone.observe(torch.arange(1000), loss_profile(1000), step)
    assert torch.equal(sequence.probabilities(20), alone.probabilities())
    assert not torch.allclose(alone.probabilities(), torch.full((1000,), 1e-3).double())
    assert sequence.metrics().keys() == {"phase2_law_is_learned", "phase2_least_observations"}


# -- with curricula --------------------------------------------------------------------------------


def test_a_curriculum_as_a_phase_begins_at_its_first_stage() -> None:
    curriculum = CurriculumTimestepSampler(_density("uniform"), **FIXED)
    sequence = _sequence((50, _density()), (None, curriculum))
    for step, stage in ((50, 1), (52, 1), (53, 2), (59, 4), (100, 4)):
        expected = curriculum.probabilities(3 * (stage - 1))
        assert torch.equal(sequence.probabilities(step), expected)
        drawn = sequence.sample(300, step=step).indices
        assert bool(curriculum.open_levels(stage)[drawn].all())


def test_the_patience_of_a_curriculum_to_come_is_not_spent() -> None:
    curriculum = CurriculumTimestepSampler(_density("uniform"), 4, pacing_args={"patience": 2})
    sequence = _sequence((30, _density()), (None, curriculum))
    _run(sequence, range(30))
    assert curriculum.stage() == 1
    _run(sequence, range(30, 60))
    assert curriculum.stage() == 4


@pytest.mark.parametrize("schedule", ["sd", "flow_shift_3"])
def test_a_curriculum_restricts_a_sequence(schedule: str) -> None:
    phases = [_density("normal", schedule), _density("uniform", schedule)]
    sequence = _sequence((5, phases[0]), (None, phases[1]))
    curriculum = CurriculumTimestepSampler(sequence, **FIXED)
    for step in range(15):
        alone = CurriculumTimestepSampler(
            phases[step >= 5],
            clustering="explicit",
            clustering_args={"boundaries": list(curriculum.starts)},
            **FIXED,
        )
        assert torch.equal(curriculum.probabilities(step), alone.probabilities(step))
        assert torch.equal(
            curriculum.sample(100, step=step).indices, alone.sample(100, step=step).indices
        )
    assert torch.equal(curriculum.probabilities(20), sequence.probabilities(20))


def test_a_sequence_is_a_phase_of_a_sequence() -> None:
    inner = _sequence((5, _density("normal")), (None, _density("laplace")))
    outer = _sequence((10, _density("uniform")), (None, inner))
    for step, name in ((9, "uniform"), (10, "normal"), (14, "normal"), (15, "laplace")):
        assert torch.equal(outer.probabilities(step), _density(name).probabilities())


# -- state and config ------------------------------------------------------------------------------


def _everything(mix_steps: int = 4) -> SequenceTimestepSampler:
    curriculum = CurriculumTimestepSampler(
        _density("uniform", importance_correction="full"), 3, pacing_args={"patience": 3}
    )
    adaptive = build("second_moment", bins=8)
    last = CurriculumTimestepSampler(
        build("information", bins=8, importance_correction="full"), **FIXED
    )
    return _sequence(
        (20, curriculum), (45, adaptive), (None, last), mix="linear", mix_steps=mix_steps
    )


@pytest.mark.parametrize("after", [1, 7, 22, 47, 60])
def test_a_resumed_sequence_goes_on_as_an_uninterrupted_one(after: int) -> None:
    first, second = _everything(), _everything()
    _run(first, range(after))
    state = first.state_dict()
    assert all(isinstance(v, int | float | Tensor) for v in state.values())
    second.load_state_dict(state)
    steps = range(after, after + 60)
    assert torch.equal(_run(first, steps), _run(second, steps))
    assert state_hash(first) == state_hash(second)
    assert state_hash(first) != state_hash(_everything())


def test_two_processes_keep_equal_states() -> None:
    alone, *ranks = (_everything() for _ in range(3))
    for step in range(60):
        drawn = [
            r.sample(Slots.of(16, rank=n, world_size=2), step=step).indices
            for n, r in enumerate(ranks)
        ]
        gathered, losses = torch.cat(drawn), random_losses(step, 32)
        assert torch.equal(gathered, alone.sample(Slots(0, 32, 32), step=step).indices)
        for sampler in (alone, *ranks):
            sampler.observe(gathered, losses, step)
    assert len({state_hash(s) for s in (alone, *ranks)}) == 1


def test_states_of_other_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"missing \['phase3.calls'\]"):
        _three().load_state_dict(_sequence((3, _density()), (None, _density())).state_dict())
    other = _sequence((20, _density()), (None, build("second_moment", importance_correction=0.0)))
    small = _sequence(
        (20, _density()), (None, build("second_moment", importance_correction=0.0, bins=8))
    )
    with pytest.raises(ValueError, match="the state has 8 bins"):
        other.load_state_dict(small.state_dict())


@pytest.mark.parametrize("build_sequence", [_three, _everything])
def test_configs_round_trip_to_equal_draws(build_sequence: Any, tmp_path: Path) -> None:
    sequence = build_sequence()
    sequence.save_pretrained(str(tmp_path))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    assert isinstance(loaded, SequenceTimestepSampler)
    assert [type(s) for s in loaded.samplers] == [type(s) for s in sequence.samplers]
    assert torch.equal(_run(sequence, range(60)), _run(loaded, range(60)))
    assert state_hash(sequence) == state_hash(loaded)


def test_from_scheduler_gives_every_phase_the_scheduler() -> None:
    phases = [
        {"until": 5, "sampler": {"density": "laplace", "importance_correction": "full"}},
        {
            "until": 9,
            "sampler": {
                "_class_name": "CurriculumTimestepSampler",
                "base": {"importance_correction": "full"},
                **FIXED,
            },
        },
        {"until": None, "sampler": {"_class_name": "LossSecondMomentTimestepSampler"}},
    ]
    sequence = SequenceTimestepSampler.from_scheduler(SCHEDULERS["edm"](), phases)
    names = ["Density", "Curriculum", "LossSecondMoment"]
    assert [type(s).__name__ for s in sequence.samplers] == [n + "TimestepSampler" for n in names]
    assert {s.levels.family for s in sequence.samplers} == {"edm"}
    given = LossSecondMomentTimestepSampler(SCHEDULERS["sd"]())
    again = SequenceTimestepSampler.from_scheduler(
        SCHEDULERS["sd"](), [{"until": None, "sampler": given}]
    )
    assert again.samplers == (given,)
    wrong = [{"until": None, "sampler": {"_class_name": "Elsewhere"}}]
    with pytest.raises(ValueError, match="_class_name='Elsewhere' is no TimestepSampler"):
        SequenceTimestepSampler.from_scheduler(SCHEDULERS["sd"](), wrong)


def test_global_generators_are_left_alone() -> None:
    with untouched_global_generators():
        _run(_everything(), range(60))


@pytest.mark.parametrize(
    ("untils", "kwargs", "message"),
    [
        ((), {}, r"phases=\[\] draws from nothing"),
        ((5,), {}, r"until=5 of the last phase must be None"),
        ((None, None), {}, r"until \(of phase 1\)=None must be a whole number of at least 1"),
        ((0, None), {}, r"until \(of phase 1\)=0 must be a whole number of at least 1"),
        ((5, 5, None), {}, r"until \(of phase 2\)=5 must be a whole number of at least 6"),
        ((5.5, None), {}, r"until \(of phase 1\)=5.5"),
        ((5, None), {"mix": "cosine"}, r"mix='cosine' is unknown: choose from hard, linear"),
        ((5, None), {"mix_steps": 3}, r"mix_steps=3 has no effect with mix='hard'"),
        ((5, None), {"mix": "linear"}, r"mix_steps=0 must be a whole number of at least 1"),
        (
            (5, 8, None),
            {"mix": "linear", "mix_steps": 4},
            r"mix_steps=4 is longer than the phase of steps 5 to 7: .* at most 3",
        ),
    ],
)
def test_wrong_phases_are_refused(
    untils: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _sequence(*((until, _density()) for until in untils), **kwargs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"floor": 0.2}, r"phase 2 has floor=0.2 and phase 1 0.1"),
        ({"draw": "iid"}, r"phase 2 has draw='iid'"),
        ({"seed": 3}, r"phase 2 has seed=3 and phase 1 0"),
        ({"importance_correction": "full"}, r"phase 2 has importance_correction=1.0 and phase 1 0"),
        ({"schedule": "linear"}, r"phase 2 is of another schedule"),
        ({"schedule": "edm"}, r"phase 2 is of another schedule"),
    ],
)
def test_phases_that_disagree_are_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sequence((5, _density()), (None, _density(**other)))


def test_phases_with_other_keys_are_refused() -> None:
    for phase in ({"until": None}, {"sampler": _density(), "from": 0}):
        with pytest.raises(ValueError, match=r"phase 1 has .*: it takes 'sampler' and 'until'"):
            SequenceTimestepSampler([phase])
    # `until` may be left out of the last one
    assert len(SequenceTimestepSampler([{"sampler": _density()}]).samplers) == 1


def test_the_entry_of_the_catalogue() -> None:
    assert SAMPLERS["sequence"] is SequenceTimestepSampler
