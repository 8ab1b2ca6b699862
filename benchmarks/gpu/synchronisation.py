"""Does a training step ever make the host wait for the device?"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import subject
from benchmarks.gpu.findings import NOT_APPLICABLE, CheckError, Findings, Unavailable
from benchmarks.gpu.settings import Settings
from diffusers_curriculum.training.loop.monitor import LevelMonitor
from diffusers_curriculum.training.process.transfers import on_device

SAMPLERS = {
    "uniform": subject.UNIFORM,
    "laplace": subject.LAPLACE,
    "curriculum": subject.CURRICULUM,
}
WARM_UP, STEPS = 2, 4


def measure(findings: Findings, settings: Settings) -> None:
    """Steps with the synchronisation debug mode set to error, for each sampler and precision."""
    rows = {
        f"{name}, {'fp32' if precision == 'no' else precision}": partial(
            _forbidden, settings, precision, flags
        )
        for precision in ("bf16", "no")
        for name, flags in reversed(SAMPLERS.items())
    }
    findings.attempt_all(rows | {"gradient scaler, fp16": partial(_counted, settings)})


def _forbidden(settings: Settings, precision: str, flags: tuple[str, ...]) -> dict[str, Any]:
    """Two steps to fill the caches, then none may wait."""
    step = _stepper(settings, precision, flags)
    for number in range(WARM_UP):
        step(number)
    if not settings.cuda:
        step(WARM_UP)
        return {"synchronisations": NOT_APPLICABLE}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(WARM_UP, WARM_UP + STEPS):
            step(number)
    except RuntimeError as error:
        stack = "".join(traceback.format_exception(error)[-12:])
        raise CheckError(f"a step waited for the device or failed: {error}\n{stack}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"synchronisations": "none", "steps": STEPS}


def _counted(settings: Settings) -> dict[str, Any]:
    """How often fp16 waits: torch's gradient scaler reads back whether gradients overflowed."""
    if not settings.cuda:
        raise Unavailable(NOT_APPLICABLE)
    step = _stepper(settings, "fp16", subject.CURRICULUM)
    for number in range(WARM_UP):
        step(number)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number in range(WARM_UP, WARM_UP + STEPS):
                step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    places = sorted({f"{w.filename}:{w.lineno}" for w in found})
    return {"synchronisations_per_step": len(found) / STEPS, "places": places}


def _stepper(settings: Settings, precision: str, flags: tuple[str, ...]) -> Callable[[int], None]:
    """One optimizer step of two micro-batches, with the average and the reports' sums."""
    torch.manual_seed(0)
    accelerator = subject.new_accelerator(settings.device, precision, 2)
    dtype = subject.DTYPES[precision]
    models = subject.build_models(subject.SMALL, settings.device, dtype)
    run = subject.build_run(accelerator, models, "--use_ema", *flags)
    plan = subject.batch_plan(4, 2)
    monitor = LevelMonitor(
        run.levels,
        1000,
        accelerator=accelerator,
        guard=run.guard,
        max_train_steps=100,
        log_every=10,
        plan=plan,
    )
    batches = on_device(
        subject.host_batches(subject.SMALL, 4, pinned=settings.cuda), accelerator.device
    )

    def step(number: int) -> None:
        monitor.add(number, *subject.update(run, number, plan, batches))

    return step
