"""Writes the checkpoint that later versions must be able to go on from; run once per release.

    python -m tests.reliability.make_fixture

It refuses to overwrite one: a released version's checkpoints do not change any more.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import diffusers_curriculum
from tests.scripts.small_runs import make_bench, train

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "checkpoints"
STOPPED, STEPS = 6, 10
EVERYTHING = (
    *("--max_train_steps", STEPS, "--gradient_accumulation_steps", 2, "--use_ema"),
    *("--ema_decay", 0.9, "--lr_scheduler", "cosine", "--lr_warmup_steps", 3, "--log_every", 5),
    *("--timestep_sampler", "laplace", "--timestep_sampler_args", "mu=1", "b=2"),
    *("--importance_correction", 0.5, "--curriculum", "difficulty", "--curriculum_clusters", 3),
    *("--curriculum_patience", 1, "--curriculum_max_share", 1, "--random_flip"),
    *("--caption_dropout", 0.2, "--max_grad_norm", 0.5),
)


def main() -> None:
    """Train, and keep pipeline, images, one checkpoint, and what the next steps computed."""
    folder = FIXTURES / diffusers_curriculum.__version__
    if folder.exists():
        raise SystemExit(f"{folder} exists: raise the version first.")
    with tempfile.TemporaryDirectory() as temporary:
        bench = make_bench(Path(temporary))
        run = Path(temporary) / "run"
        record = train(bench.argv(run, *EVERYTHING, "--checkpointing_steps", STOPPED))
        shutil.copytree(bench.pipeline, folder / "pipeline")
        shutil.copytree(bench.images, folder / "images")
        shutil.copytree(run / f"checkpoint-{STOPPED}", folder / f"checkpoint-{STOPPED}")
    steps = [
        {"loss": float.fromhex(step.loss), "indices": step.indices, "lr": step.lr}
        for step in record.steps[STOPPED:]
    ]
    (folder / "expected.json").write_text(json.dumps(steps, indent=1) + "\n")


if __name__ == "__main__":
    main()
