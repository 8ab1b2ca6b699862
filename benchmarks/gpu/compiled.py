"""Graphs of the scripts' --compile: the time to the first step, and what they bring afterwards."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import clock, speed, subject
from benchmarks.gpu.findings import NOT_APPLICABLE, Findings, Unavailable
from benchmarks.gpu.settings import Settings
from diffusers_curriculum.training.process.compilation import check_gradients, compile_network

BATCH, GRAPHS = 16, "reduce-overhead"


def measure(findings: Findings, settings: Settings) -> None:
    """The network as it is, each of its repeated blocks compiled, all of it, and that replayed as
    CUDA graphs."""
    rows = {what: partial(_rate, settings, what) for what in ("none", "blocks", "full")}
    findings.attempt_all(rows | {f"full, {GRAPHS}": partial(_rate, settings, "full", GRAPHS)})


def _rate(settings: Settings, what: str, mode: str | None = None) -> dict[str, Any]:
    if mode is not None and not settings.cuda:
        raise Unavailable(NOT_APPLICABLE)
    run, args = speed.sd15_run(settings), subject.arguments("--compile", what)
    args.compile_mode = mode
    network, batch = run.averages.network, 2 if settings.smoke else BATCH
    torch._dynamo.reset()
    compile_network(args, network)
    step = speed.stepper(run, settings, batch)
    # a compiler takes minutes on a processor
    with torch.compiler.set_stance("force_eager" if settings.smoke else "default"):
        start = time.perf_counter()
        if what != "none":
            check_gradients(args, network, step)
        clock.seconds(settings.device, step)
        first = round(time.perf_counter() - start, 2)
        found = speed.rate(settings, step, batch)
    del run
    if settings.cuda:
        torch.cuda.empty_cache()
    return {"first_step_seconds": first, "compiled": what, "mode": mode} | found
