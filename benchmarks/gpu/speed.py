"""Part 5: images per second and memory of the training step at the size of Stable Diffusion 1.5."""

from __future__ import annotations

import itertools
import statistics
import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import clock, subject
from benchmarks.gpu.findings import CheckError, Findings
from benchmarks.gpu.settings import Settings
from diffusers_curriculum import Slots
from diffusers_curriculum.training.levels.timesteps import build_sampler
from diffusers_curriculum.training.tasks.family import TextToImageRun

BATCHES = (4, 8, 16)
WINDOWS, WINDOW_SECONDS = 5, 1.0


def measure(findings: Findings, settings: Settings) -> None:
    """Uniform against curriculum with Laplace, with PyTorch's own attention and with xformers."""
    deadline = time.monotonic() + 0.9 * settings.seconds
    findings.attempt("sampler alone", partial(_sampler, settings))
    run = sd15_run(settings)
    batches = (2,) if settings.smoke else BATCHES
    for attention in ("sdpa", "xformers"):
        if attention == "xformers" and not findings.attempt(
            "xformers processors", partial(_use_xformers, run)
        ):
            return
        for batch in batches:
            name = f"{attention}, batch {batch}"
            findings.attempt(name, partial(_compare, run, settings, batch, deadline))
            free(run, settings)


def sd15_run(settings: Settings) -> TextToImageRun:
    """Random models of the real size (or minuscule ones) with the script's own optimizer."""
    torch.manual_seed(0)
    accelerator = subject.new_accelerator(settings.device, "bf16")
    sizes = sizes_of(settings)
    models = subject.build_models(sizes, settings.device, torch.bfloat16)
    return subject.build_run(accelerator, models)


def sizes_of(settings: Settings) -> subject.Sizes:
    """The real sizes, or minuscule ones."""
    return subject.SMALL if settings.smoke else subject.SD15


def free(run: TextToImageRun, settings: Settings) -> None:
    """Give back what a batch size took, also after it did not fit."""
    run.optimizer.optimizer.zero_grad(set_to_none=True)
    if settings.cuda:
        torch.cuda.empty_cache()


def window_seconds(settings: Settings) -> float:
    """Length of a window; 0 is a single step."""
    return 0.0 if settings.smoke else WINDOW_SECONDS


def _use_xformers(run: TextToImageRun) -> dict[str, Any]:
    unet = run.averages.network
    subject.use_xformers(unet)
    return {"processors": subject.processors(unet)}


def _compare(
    run: TextToImageRun, settings: Settings, batch: int, deadline: float
) -> dict[str, Any]:
    if time.monotonic() > deadline:
        raise CheckError("no time was left for this row")
    plan = subject.batch_plan(batch)
    batches = subject.host_batches(sizes_of(settings), batch, pinned=settings.cuda)

    def stepper(*flags: str) -> clock.Step:
        variant, steps = subject.with_sampler(run, *flags), itertools.count()
        return lambda: subject.update(variant, next(steps), plan, batches)

    variants = {"uniform": stepper(), "curriculum": stepper(*subject.CURRICULUM)}
    return clock.paired_windows(settings.device, variants, batch, WINDOWS, window_seconds(settings))


def _sampler(settings: Settings) -> dict[str, Any]:
    """Microseconds of one draw and one observation: until the host goes on, and until all is done.

    For comparison: the draw that the official script makes.
    """
    count, result = (10 if settings.smoke else 200), {}
    for name, flags in {"laplace": subject.LAPLACE, "curriculum": subject.CURRICULUM}.items():
        result[name] = _sampler_times(settings, flags, count)
    draw = partial(torch.randint, 1000, (16,), device=settings.device)
    result["torch.randint"] = _microseconds(settings, lambda step: draw(), count)
    return result


def _sampler_times(settings: Settings, flags: tuple[str, ...], count: int) -> dict[str, Any]:
    args = subject.arguments(*flags)
    sampler = build_sampler(args, subject.stable_diffusion_scheduler(), 0)
    losses = torch.rand(16, generator=torch.Generator().manual_seed(0)).to(settings.device)

    def work(step: int) -> None:
        drawn = sampler.sample(Slots(0, 16, 16), step=step, device=settings.device)
        sampler.observe(drawn.indices, losses, step)

    return _microseconds(settings, work, count)


def _microseconds(settings: Settings, work: Any, count: int) -> dict[str, float]:
    host, total = [], []
    for step in range(2 * count):  # the first half warms up
        clock.wait(settings.device)
        start = time.perf_counter()
        work(step)
        host.append(time.perf_counter() - start)
        clock.wait(settings.device)
        total.append(time.perf_counter() - start)
    middle = {"host": host, "total": total}
    return {k: round(1e6 * statistics.median(v[count:]), 1) for k, v in middle.items()}
