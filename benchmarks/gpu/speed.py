"""Images per second, memory and share of the device's peak, at the size of Stable Diffusion 1.5."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import clock, flops, subject
from benchmarks.gpu.findings import Findings, Measure
from benchmarks.gpu.settings import Settings
from diffusers_curriculum import Slots
from diffusers_curriculum.training.levels.timesteps import build_sampler
from diffusers_curriculum.training.tasks.family import TextToImageRun

BATCHES = (8, 32, 16, 4, 64)
WINDOWS, SWEEP_WINDOWS, WINDOW_SECONDS = 5, 3, 0.6
Batches = Iterator[dict[str, Any]]


def measure(findings: Findings, settings: Settings) -> None:
    """The peak; uniform against curriculum with Laplace; then each attention at several batches."""
    run = sd15_run(settings)
    peak = flops.matrix_peak(settings)
    per_image = flops.counted(stepper(run, settings, 2)) / 2  # xformers' kernels are not counted
    free(run, settings)
    batches = (2,) if settings.smoke else BATCHES
    rows: dict[str, Measure] = {
        "bf16 matrix product": lambda: {"teraflops_per_second": round(peak / 1e12, 3)},
        "sampler alone": partial(_sampler, settings),
        f"curriculum against uniform, batch {batches[0]}": partial(
            _compare, run, settings, batches[0]
        ),
    }
    for batch, attention in itertools.product(batches, ("sdpa", "flash")):
        rate = partial(_rate, run, settings, batch, attention, per_image, peak)
        rows[f"{attention}, batch {batch}"] = freed(run, settings, rate)
    for batch in batches:  # at last, as there is no way back
        rate = partial(_rate, run, settings, batch, "xformers", per_image, peak)
        rows[f"xformers, batch {batch}"] = freed(run, settings, rate)
    findings.attempt_all(rows)


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


def freed(run: Any, settings: Settings, work: Measure) -> Measure:
    """``work``, after which what a batch size took is given back."""

    def row() -> dict[str, Any]:
        try:
            return work()
        finally:
            free(run, settings)

    return row


def free(run: Any, settings: Settings) -> None:
    """Give back what a batch size took, also after it did not fit."""
    run.optimizer.optimizer.zero_grad(set_to_none=True)
    if settings.cuda:
        torch.cuda.empty_cache()


def window_seconds(settings: Settings) -> float:
    """Length of a window; 0 is a single step."""
    return 0.0 if settings.smoke else WINDOW_SECONDS


def stepper(
    run: TextToImageRun,
    settings: Settings,
    batch: int,
    flags: tuple[str, ...] = subject.CURRICULUM,
    batches: Batches | None = None,
) -> clock.Step:
    """One optimizer step of a batch after the other, with the law of ``flags``."""
    variant, steps = subject.with_sampler(run, *flags), itertools.count()
    plan = subject.batch_plan(batch)
    if batches is None:
        batches = subject.host_batches(sizes_of(settings), batch, pinned=settings.cuda)
    return lambda: subject.update(variant, next(steps), plan, batches)


def rate(settings: Settings, step: clock.Step, batch: int) -> dict[str, Any]:
    """Images per second and memory of one kind of step."""
    length = window_seconds(settings)
    return clock.paired_windows(settings.device, {"step": step}, batch, SWEEP_WINDOWS, length)


def _rate(
    run: TextToImageRun,
    settings: Settings,
    batch: int,
    attention: str,
    per_image: float,
    peak: float,
) -> dict[str, Any]:
    """The step with one attention: PyTorch's choice of its kernels, its flash kernel alone, or
    xformers."""
    if attention == "xformers":
        subject.use_xformers(run.averages.network)
    alone = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if attention == "flash" else nullcontext()
    with alone:
        found = rate(settings, stepper(run, settings, batch), batch)
    return found | flops.share(found["step"]["images_per_second"], per_image, peak)


def _compare(run: TextToImageRun, settings: Settings, batch: int) -> dict[str, Any]:
    flags = {"uniform": subject.UNIFORM, "curriculum": subject.CURRICULUM}
    variants = {name: stepper(run, settings, batch, own) for name, own in flags.items()}
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
