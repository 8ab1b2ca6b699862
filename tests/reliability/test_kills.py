"""A run that is killed with SIGKILL again and again ends with the bits of one that never was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reliability.harness import (
    Kill,
    Life,
    differing_file_bits,
    differing_loss_bits,
    live,
    lost,
)
from tests.scripts.small_runs import Bench, checkpoint_names, hashes

pytestmark = pytest.mark.reliability

STEPS = 24
SHARED = (
    *("--max_train_steps", STEPS, "--checkpointing_steps", 2, "--checkpoints_total_limit", 1),
    *("--log_every", 5, "--lr_scheduler", "cosine", "--lr_warmup_steps", 3, "--random_flip"),
    *("--caption_dropout", 0.2),
)
VARIANTS = {
    "full": SHARED,
    "everything": (
        *SHARED,
        *("--gradient_accumulation_steps", 2, "--use_ema", "--ema_decay", 0.9),
        *("--timestep_sampler", "laplace", "--timestep_sampler_args", "mu=1", "b=2"),
        *("--curriculum", "difficulty", "--curriculum_clusters", 6, "--curriculum_patience", 1),
        *("--curriculum_max_share", 1),
    ),
}
STATES = {
    "full": {"optimizer", "tracker_by_level"},
    "everything": {"optimizer", "sampler", "tracker_by_level"},
}


@dataclass
class Campaign:
    """What many killed runs did, beside one that was left alone."""

    reference: Life
    bench: Bench
    lives: list[Life] = field(default_factory=list)

    @property
    def starts(self) -> list[Any]:
        return [start for life in self.lives for start in life.starts]

    @property
    def restarts(self) -> list[Any]:
        return [start for life in self.lives for start in life.starts[1:]]

    @property
    def kills(self) -> int:
        return sum(start.killed for start in self.starts)

    @property
    def inside(self) -> int:
        return sum(start.killed_inside_a_save for start in self.starts)

    def figures(self) -> dict[str, int]:
        """What is quoted from this test."""
        names = {"checkpoint bits": f"checkpoint-{STEPS}", "exported bits": self.bench.exported}
        made = [step["step"] for start in self.starts for step in start.steps]
        return {
            "runs": len(self.lives),
            "kills": self.kills,
            "inside a save": self.inside,
            "restarts": len(self.restarts),
            "from a checkpoint": sum(bool(start.resumed_at) for start in self.restarts),
            "steps": len(made),
            "of them repeated": len(made) - STEPS * len(self.lives),
            "lost checkpoints": sum(len(lost(life)) for life in self.lives),
            "differing loss bits": sum(
                differing_loss_bits(life, self.reference) for life in self.lives
            ),
            **{
                f"differing {what}": sum(
                    differing_file_bits(life, self.reference, name) for life in self.lives
                )
                for what, name in names.items()
            },
        }


# How often a kill comes after which event, and after how many of them at most.
MOMENTS = {
    "start": (0.05, 1),  # while the checkpoint is looked for and verified
    "resume": (0.10, 1),  # while data and models are loaded and the state is read
    "step": (0.35, 6),  # while the next step is made
    "save": (0.40, 4),  # inside a save
    "saved": (0.05, 3),
    "finish": (0.05, 1),  # while the pipeline is exported
}


def moments(seed: int) -> Iterator[Kill]:
    """Kills at random moments of all that a run does; many of them inside a save."""
    draw = np.random.default_rng(seed)
    shares = [share for share, _ in MOMENTS.values()]
    while True:
        what = str(draw.choice(list(MOMENTS), p=shares))
        yield Kill(what, int(draw.integers(1, MOMENTS[what][1] + 1)), float(draw.random()))


def campaign(bench: Bench, folder: Path, variant: str, kills: int, inside: int) -> Campaign:
    """Run and kill until there were so many kills, so many of them inside a save."""
    argv = bench.argv(folder, *VARIANTS[variant])
    done = Campaign(live(folder / "reference", argv, script=bench.script), bench)
    plan = moments(seed=kills)
    while done.kills < kills or done.inside < inside:
        # on a busy machine a save may be over sooner than in the reference, and a kill too late
        assert len(done.lives) < 2 * kills + 20, "the kills come too late"
        few = islice(plan, max(kills - done.kills, 1))
        run = folder / f"run-{len(done.lives)}"
        done.lives.append(live(run, argv, few, done.reference.pace, script=bench.script))
    return done


full_tier = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("kills", "inside"), [(4, 1), pytest.param(50, 15, marks=full_tier)], ids=["4", "50"]
)
def test_sigkill_resume_bits(
    bench: Bench,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    variant: str,
    kills: int,
    inside: int,
) -> None:
    done = campaign(bench, tmp_path, variant, kills, inside)
    figures = done.figures()
    with capsys.disabled():
        print(f"\nSIGKILL, {variant}: " + ", ".join(f"{v} {k}" for k, v in figures.items()))
    assert figures["kills"] >= kills
    assert figures["inside a save"] >= inside
    assert figures["from a checkpoint"] >= kills // 4
    assert [lost(life) for life in done.lives] == [[] for _ in done.lives]
    assert not {name: n for name, n in figures.items() if name.startswith("differing") and n}
    for life in done.lives:
        assert sorted(life.steps) == list(range(STEPS))
        assert checkpoint_names(life.folder) == {f"checkpoint-{STEPS}"}
        assert not [path for path in life.folder.iterdir() if path.name.startswith(".")]
    _has_something_to_lose(done.reference, variant, bench)


def _has_something_to_lose(reference: Life, variant: str, bench: Bench) -> None:
    """No state is trivial, and the curriculum is under way while runs are killed."""
    files = hashes(reference.folder / f"checkpoint-{STEPS}")
    weights = {f"{bench.trained}/{bench.weights}"}
    if variant == "everything":
        weights.add(f"{bench.trained}_ema/diffusion_pytorch_model.safetensors")
    assert weights | {f"{name}.safetensors" for name in STATES[variant]} <= files.keys()
    assert hashes(reference.folder / bench.exported)
    assert len({step["loss"] for step in reference.steps.values()}) == STEPS
    opened = [step["stage"] for step in reference.steps.values()]
    assert variant == "full" or len(set(opened[4:-4])) >= 3
