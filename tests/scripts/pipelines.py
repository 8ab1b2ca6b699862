"""The minuscule pipeline with other schedulers, and whether one that was saved still draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from tests.scripts.small_runs import RESOLUTION, Bench

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def with_scheduler(bench: Bench, folder: Path, scheduler: Any) -> Bench:
    """The same pipeline with another scheduler."""
    shutil.copytree(bench.pipeline, folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return Bench(folder, bench.images, bench.cache)


def draws_a_picture(folder: Path) -> bool:
    """Whether the saved pipeline loads and gives a picture of finite numbers."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("picture number 3", num_inference_steps=2, output_type="pt").images
    return image.shape == (1, 3, RESOLUTION, RESOLUTION) and bool(image.isfinite().all())
