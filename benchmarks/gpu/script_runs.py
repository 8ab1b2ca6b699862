"""Running the training script's own `main`, and looking at what happens inside.

    python -m benchmarks.gpu.script_runs RESULT.json ARGUMENTS...

runs it under deterministic algorithms and writes down the losses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import train_text_to_image_curriculum as script
from benchmarks.gpu.findings import write_json
from benchmarks.gpu.images import write_images
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.subject import processors, reset_accelerate
from diffusers_curriculum.models.tiny import MINUSCULE, TinySizes, make_tiny_pipeline
from diffusers_curriculum.training.loop import job
from diffusers_curriculum.training.loop.run import Run


@dataclass
class Watched:
    """What a run showed: losses as exact hexadecimal floats, attention processors."""

    losses: list[str] = field(default_factory=list)
    processors: list[str] = field(default_factory=list)


class Interruption(Exception):
    """Stands for whatever stops a training run."""


def run_script(argv: Sequence[str], stop_before: int | None = None) -> Watched:
    """The script's `main` in this process, cut off at optimizer step ``stop_before``."""
    losses: list[torch.Tensor] = []
    watched, make_update = Watched(), job.make_update

    def watching(run: Run, step: int, *rest: Any) -> Any:
        if step == stop_before:
            raise Interruption
        result = make_update(run, step, *rest)
        losses.append(result[0].loss.double().mean())
        watched.processors = processors(run.averages.network)
        return result

    reset_accelerate()
    with mock.patch.object(job, "make_update", watching), suppress(Interruption):
        script.main(argv)
    watched.losses = [float(loss).hex() for loss in losses]
    return watched


def pipeline_and_images(settings: Settings) -> tuple[list[str], str]:
    """Flags of a run on a tiny pipeline, with its images; and the kind of images."""
    images, pipeline = settings.work_dir / "images", settings.work_dir / "pipeline"
    side, sizes = (16, MINUSCULE) if settings.smoke else (32, TinySizes())
    kind = write_images(images, 16 if settings.smoke else 64, side)
    make_tiny_pipeline(images, pipeline, resolution=side, vae_steps=2, sizes=sizes)
    flags = [
        "--pretrained_model_name_or_path",
        str(pipeline),
        "--train_data_dir",
        str(images),
        "--resolution",
        str(side),
        "--cache_dir",
        str(settings.work_dir / "cache"),
        "--train_batch_size",
        "4",
        "--seed",
        "1",
        "--log_every",
        "2",
        "--use_ema",
        "--timestep_sampler",
        "laplace",
        "--curriculum",
        "difficulty",
        "--curriculum_clusters",
        "3",
        "--curriculum_patience",
        "1",
        "--curriculum_max_share",
        "9",
    ]
    return flags, kind


def main(argv: Sequence[str]) -> None:
    """Run under deterministic algorithms and write the losses to the file named first."""
    torch.use_deterministic_algorithms(True)
    write_json(Path(argv[0]), asdict(run_script(argv[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
