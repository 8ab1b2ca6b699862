"""Tells a tracker what a short curriculum tells it: ``python -m ... TRACKER FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.loop.monitor import LevelMonitor
from diffusers_curriculum.training.loop.run import LevelLosses
from diffusers_curriculum.training.process.runtime import make_accelerator
from diffusers_curriculum.training.publish.trackers import log_images, start_trackers
from tests.floors_fixtures import SCHEDULERS
from tests.training.command_lines import parse_args

STEPS, LOG_EVERY, STAGE = 6, 2, 3
PROJECT = "a_project"


def tell(tracker: str, folder: Path) -> list[str]:
    """Six steps of two stages, pictures of two prompts after the fourth, and the end; returns the
    names of what was counted, bins of log-SNR and others."""
    line = f"--pretrained_model_name_or_path a/b --train_data_dir c --report_to {tracker}"
    more = ["--tracker_project_name", PROJECT, "--output_dir", str(folder)]
    args = parse_args([*line.split(), *more], machine=False)
    accelerator: Any = make_accelerator(args)
    start_trackers(accelerator, args)
    base = DensityTimestepSampler.from_scheduler(SCHEDULERS["sd"](), density="uniform")
    sampler = CurriculumTimestepSampler(
        base, clusters=2, pacing="fixed", pacing_args={"stage_steps": STAGE}
    )
    objective = Objective(sampler.levels)
    weighting = ("none", {})
    levels = Levels(None, None, sampler, objective, weighting, weights=None, learned=None)
    guard = FiniteGuard(accelerator, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    plan = BatchPlan(10, 5, 1, 1, 0, 0)
    monitor = LevelMonitor(
        levels,
        100,
        accelerator=accelerator,
        guard=guard,
        max_train_steps=STEPS,
        log_every=LOG_EVERY,
        plan=plan,
    )
    names: set[str] = set()
    log = accelerator.log

    def noting(values: dict[str, float], step: int) -> None:
        names.update(values)
        log(values, step=step)

    accelerator.log = noting
    for step in range(STEPS):
        indices = sampler.sample(5, step=step).indices
        losses = torch.full((5,), float(step + 1))
        sampler.observe(indices, losses, step)
        monitor.add(step, LevelLosses(indices, losses, losses.mean().reshape(1)), torch.tensor(1.0))
        monitor.after_step(step + 1, 0.5)
        if step == 3:
            pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
            log_images(accelerator, "validation", pictures, ["a cat", "a dog"], step + 1)
            monitor.show_law(step + 1)
    monitor.finish(str(folder))
    accelerator.end_training()
    return sorted(names)


if __name__ == "__main__":
    Path(sys.argv[2], "names.json").write_text(json.dumps(tell(sys.argv[1], Path(sys.argv[2]))))
