"""The training script on a tiny pipeline, in every precision, with and without xformers."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import subject
from benchmarks.gpu.findings import NOT_APPLICABLE, Findings, Unavailable, check
from benchmarks.gpu.script_runs import pipeline_and_images, run_script
from benchmarks.gpu.settings import Settings

ROOT = Path(__file__).parents[2]
XFORMERS = "--enable_xformers_memory_efficient_attention"


def measure(findings: Findings, settings: Settings) -> None:
    """Each precision with each attention; then the command as a user types it."""
    flags, kind = pipeline_and_images(settings)
    steps = 2 if settings.smoke else 6
    flags += ["--max_train_steps", str(steps)]
    rows = {
        f"{'fp32' if precision == 'no' else precision}{', xformers' if extra else ''}": partial(
            _trains, settings, flags, precision, extra, kind
        )
        for precision in ("bf16", "fp16", "no")
        for extra in ((), (XFORMERS,))
    }
    findings.attempt_all(rows | {"the command, bf16": partial(_command, settings, flags, steps)})


def _trains(
    settings: Settings, flags: list[str], precision: str, extra: tuple[str, ...], kind: str
) -> dict[str, Any]:
    if extra:
        subject.require("xformers")
    if precision == "fp16" and not settings.cuda:
        raise Unavailable(NOT_APPLICABLE)
    folder = settings.work_dir / f"out-{precision}{len(extra)}"
    argv = [*flags, "--output_dir", str(folder), "--mixed_precision", precision, *extra]
    watched = run_script(argv)
    losses = [float.fromhex(loss) for loss in watched.losses]
    check(bool(losses) and all(map(math.isfinite, losses)), f"losses are {losses}")
    subject.check_processors(watched.processors, xformers=bool(extra))
    return {"losses": losses, "processors": watched.processors, "data": kind}


def _command(settings: Settings, flags: list[str], steps: int) -> dict[str, Any]:
    """A process of its own, with validation images and a checkpoint."""
    folder = settings.work_dir / "out-command"
    command = [
        sys.executable,
        str(ROOT / "train_text_to_image_curriculum.py"),
        *flags,
        "--output_dir",
        str(folder),
        "--mixed_precision",
        "bf16",
        "--validation_prompts",
        "a handwritten seven",
        "--validation_steps",
        str(steps),
        "--checkpointing_steps",
        str(steps),
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    check(told.returncode == 0, f"exit status {told.returncode}: {told.stderr[-1500:]}")
    for name in ("model_index.json", f"checkpoint-{steps}/manifest.json"):
        check((folder / name).is_file(), f"the command left no {name}")
    return {"exit_status": told.returncode}
