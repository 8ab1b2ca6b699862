"""Every kind of sampler, and a learned weighting, trains, and goes on bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.scripts.small_runs import Bench, finite, hashes, status, train

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
    "uncertainty": (
        "laplace",
        "--loss_weighting",
        "uncertainty",
        "--loss_weighting_args",
        "warm_up=2",
        "learning_rate=0.1",
    ),
    "two phases": (
        "two_phase",
        "--timestep_sampler_args",
        "switch_step=4",
        "mix=linear",
        "mix_steps=2",
    ),
    "moving": (
        "moving",
        "--timestep_sampler_args",
        "pacing=patience",
        'pacing_args={"patience": 1}',
        "positions=3",
        "widen_steps=2",
    ),
    "mixture": ("mixture", "--timestep_sampler_args", PARTS),
    "curriculum of one that learns": (
        "loss_proportional",
        "--timestep_sampler_args",
        *QUICK,
        *CURRICULUM,
    ),
}


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
    if name == "uncertainty":
        assert len(set(record.last.levels.weights.tolist())) > 10
    if "learn" in name or name in ("second moment", "proportional", "information", "gradient"):
        base = getattr(sampler, "base", sampler)
        assert bool(base.metrics()["law_is_learned"])


def test_the_learned_weights_reach_the_loss(bench: Bench, tmp_path: Path) -> None:
    flags = ("--max_train_steps", 6, "--seed", 1)
    plain = train(bench.argv(tmp_path / "plain", *flags))
    more = ("--loss_weighting", "uncertainty", "--loss_weighting_args", "learning_rate=0.3")
    learned = train(bench.argv(tmp_path / "learned", *flags, *more))
    first, without = learned.steps[0], plain.steps[0]
    assert first.losses == without.losses
    # z starts at 0; without weights the mean is taken over all pixels at once, in another order
    assert float.fromhex(first.loss) == pytest.approx(float.fromhex(without.loss), rel=1e-6)
    apart = [
        abs(float.fromhex(a) / float.fromhex(b) - 1)
        for a, b in zip(learned.losses, plain.losses, strict=True)
    ]
    assert min(apart[2:]) > 1e-4
    assert learned.steps[1].indices == plain.steps[1].indices


def test_the_weighting_may_change_between_sessions(bench: Bench, tmp_path: Path) -> None:
    uncertain = ("--loss_weighting", "uncertainty")
    flags = ("--max_train_steps", 4, "--checkpointing_steps", 2)
    train(bench.argv(tmp_path, *flags, *uncertain))
    shutil.rmtree(tmp_path / "checkpoint-4")
    latest = (*flags, "--resume_from_checkpoint", "latest")
    changed = ("--allow_config_change", "loss_weighting")
    assert train(bench.argv(tmp_path, *latest, *changed)).numbers == [2, 3]
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert status(bench.argv(tmp_path, *latest)) == 2
