"""Every kind of sampler trains through the script, and goes on bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.scripts.small_runs import Bench, finite, hashes, train

STEPS, STOPPED = 8, 3
QUICK = ("bins=4", "refresh_every=2", "warm_up=2", "min_observations=1")
PARTS = 'components=[{"density": "laplace", "weight": 3}, {"density": "beta", "weight": 1}]'
CURRICULUM = (
    *("--curriculum", "difficulty", "--curriculum_clusters", 2, "--curriculum_pacing", "fixed"),
    *("--curriculum_stage_steps", 2, "--curriculum_max_share", 1),
)
SAMPLERS = {
    "second moment": ("loss_second_moment", "--timestep_sampler_args", *QUICK),
    "proportional": ("loss_proportional", "--timestep_sampler_args", *QUICK),
    "information": ("information_rate", "--timestep_sampler_args", *QUICK),
    "gradient": ("gradient_norm", "--timestep_sampler_args", *QUICK, "--loss_weighting", "min_snr"),
    "two phases": ("two_phase", "--timestep_sampler_args", "switch_step=4", "mix=linear",
                   "mix_steps=2"),
    "mixture": ("mixture", "--timestep_sampler_args", PARTS),
    "curriculum of one that learns": ("loss_proportional", "--timestep_sampler_args", *QUICK,
                                      *CURRICULUM),
}  # fmt: skip


@pytest.mark.reliability
@pytest.mark.parametrize("name", SAMPLERS)
def test_it_trains_and_goes_on_bit_for_bit(bench: Bench, tmp_path: Path, name: str) -> None:
    flags = ("--timestep_sampler", *SAMPLERS[name], "--max_train_steps", STEPS)
    whole, part = tmp_path / "whole", tmp_path / "part"
    reference = train(bench.argv(whole, *flags, "--checkpointing_steps", 1, batch=6))
    assert finite(reference)
    shutil.copytree(whole / f"checkpoint-{STOPPED}", part / f"checkpoint-{STOPPED}")
    more = ("--checkpointing_steps", STEPS, "--resume_from_checkpoint", "latest")
    record = train(bench.argv(part, *flags, *more, batch=6))
    assert record.steps == reference.steps[STOPPED:]
    last = f"checkpoint-{STEPS}"
    assert hashes(part / last) == hashes(whole / last)
    sampler = record.last.sampler
    if "learn" in name or name in ("second moment", "proportional", "information", "gradient"):
        base = getattr(sampler, "base", sampler)
        assert bool(base.metrics()["law_is_learned"])
