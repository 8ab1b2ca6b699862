"""A run that was stopped goes on bit for bit, under deterministic algorithms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.findings import Findings, check
from benchmarks.gpu.script_runs import pipeline_and_images, run_script
from benchmarks.gpu.settings import Settings
from diffusers_curriculum.training.storage.manifest import read_manifest

STEPS, STOP = 8, 4
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # must be set before CUDA starts


def measure(findings: Findings, settings: Settings) -> None:
    """8 steps against 4 + 4 through a checkpoint, the second half in a fresh process.

    This process must have been started with ENVIRONMENT, as it is by `python -m benchmarks.gpu`.
    """
    flags, kind = pipeline_and_images(settings)
    flags += ["--max_train_steps", str(STEPS), "--checkpointing_steps", str(STOP)]
    flags += ["--gradient_accumulation_steps", "2"]
    precisions = {"fp32": "no"} if settings.smoke else {"bf16": "bf16", "fp32": "no"}
    rows = {
        name: partial(
            _compare, settings.work_dir / name, [*flags, "--mixed_precision", precision], kind
        )
        for name, precision in precisions.items()
    }
    findings.attempt_all(rows)


def _compare(folder: Path, argv: list[str], kind: str) -> dict[str, Any]:
    torch.use_deterministic_algorithms(True)
    whole, halves = folder / "whole", folder / "halves"
    try:
        straight = run_script([*argv, "--output_dir", str(whole)])
        first = run_script([*argv, "--output_dir", str(halves)], stop_before=STOP).losses
    finally:
        torch.use_deterministic_algorithms(False)
    second = _resumed([*argv, "--output_dir", str(halves)], folder / "resumed.json")
    check(first + second == straight.losses, f"losses {first + second}, not {straight.losses}")
    expected, found = (_hashes(path / f"checkpoint-{STEPS}") for path in (whole, halves))
    different = sorted(k for k in expected | found if expected.get(k) != found.get(k))
    check(not different, f"these files of checkpoint-{STEPS} differ: {', '.join(different)}")
    return {"equal_files": len(expected), "equal_losses": len(straight.losses), "data": kind}


def _resumed(argv: list[str], result: Path) -> list[str]:
    """The losses of a fresh process that goes on from the newest checkpoint."""
    module = [sys.executable, "-m", "benchmarks.gpu.script_runs", str(result)]
    command = [*module, *argv, "--resume_from_checkpoint", "latest"]
    environment = {**os.environ, **ENVIRONMENT}
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    check(told.returncode == 0, f"exit status {told.returncode}: {told.stderr[-1500:]}")
    return json.loads(result.read_text("utf-8"))["losses"]


def _hashes(checkpoint: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint: weights, average, optimizer, sampler, reports."""
    files = read_manifest(checkpoint)["files"]
    return {name: entry["sha256"] for name, entry in files.items()}
