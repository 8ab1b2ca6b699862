"""Tables of a law that changes are used until it is another, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from diffusers_curriculum import CurriculumTimestepSampler, TimestepSampler
from diffusers_curriculum.samplers.composition import CPU, tables

STEPS, BATCH = 40, 64
SCHEDULER = diffusers.DDPMScheduler(beta_schedule="scaled_linear")


def learning(**more: Any) -> TimestepSampler:
    kind = TimestepSampler.kinds()["LossSecondMomentTimestepSampler"]
    settings = {"refresh_every": 4, "warm_up": 2, "min_observations": 1, "bins": 4}
    return kind.from_scheduler(SCHEDULER, **settings | more)


def moving(**more: Any) -> TimestepSampler:
    kind = TimestepSampler.kinds()["MovingTimestepSampler"]
    return kind.from_scheduler(SCHEDULER, move_steps=20, positions=4, **more)


def curriculum(base: TimestepSampler) -> TimestepSampler:
    return CurriculumTimestepSampler(
        base, clusters=3, pacing="fixed", pacing_args={"stage_steps": 9}
    )


def sequence(*samplers: TimestepSampler) -> TimestepSampler:
    phases = [{"until": 15, "sampler": samplers[0]}, {"until": None, "sampler": samplers[1]}]
    kind = TimestepSampler.kinds()["SequenceTimestepSampler"]
    return kind.from_scheduler(SCHEDULER, phases=phases)


MADE = {
    "learning": (learning, 12),
    "curriculum, learning": (lambda: curriculum(learning()), 14),
    "curriculum, moving": (lambda: curriculum(moving()), 8),
    "curriculum, sequence": (lambda: curriculum(sequence(learning(), learning(seed=0))), 15),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_drawn_is_the_law_of_the_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, most = MADE[name]
    sampler, made = build(), []
    compose: Callable[..., Any] = type(sampler)._mass_and_importance
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        u = torch.rand(BATCH, generator=generator, dtype=torch.float64)
        cdf, importance = tables(*compose(sampler, step, CPU))
        with monkeypatch.context() as patch:
            patch.setattr(
                sampler,
                "_mass_and_importance",
                lambda *at: made.append(at) or compose(sampler, *at),
            )
            drawn = sampler.sample(u=u, step=step)
        expected = torch.searchsorted(cdf, u, right=True)
        assert torch.equal(drawn.indices, expected)
        assert torch.equal(drawn.importance, importance[expected])
        sampler.observe(drawn.indices, torch.rand(BATCH, generator=generator), step)
    assert 2 <= len(made) <= most
    state = sampler.state_dict()  # a state that is taken over is another law, too
    for other in (build(), sampler):
        other.load_state_dict(state)
        assert torch.equal(
            other.sample(u=u, step=STEPS).indices, sampler.sample(u=u, step=STEPS).indices
        )
