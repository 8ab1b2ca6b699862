"""Graphs of torch.compile: the time to the first step, and what they bring afterwards."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import clock, speed
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.settings import Settings

BATCH = 16
BLOCKS = "BasicTransformerBlock"  # which a UNet repeats


def measure(findings: Findings, settings: Settings) -> None:
    """The network as it is, each of its repeated blocks compiled, and all of it."""
    rows = {what: partial(_rate, settings, what) for what in ("none", "blocks", "full")}
    findings.attempt_all(rows)


def _rate(settings: Settings, what: str) -> dict[str, Any]:
    run = speed.sd15_run(settings)
    network, batch = run.averages.network, 2 if settings.smoke else BATCH
    blocks = [m for m in network.modules() if type(m).__name__ == BLOCKS]
    torch._dynamo.reset()
    backend = "eager" if settings.smoke else "inductor"
    for module in {"none": [], "blocks": blocks, "full": [network]}[what]:
        module.compile(backend=backend)
    step, start = speed.stepper(run, settings, batch), time.perf_counter()
    clock.seconds(settings.device, step)
    first = round(time.perf_counter() - start, 2)
    found = speed.rate(settings, step, batch)
    del run
    if settings.cuda:
        torch.cuda.empty_cache()
    return {"first_step_seconds": first, "compiled": what} | found
