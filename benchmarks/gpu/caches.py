"""What a step saves where latents and captions were encoded before, and how fast that goes."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import clock, speed, subject
from benchmarks.gpu.findings import Findings, Measure
from benchmarks.gpu.settings import Settings
from diffusers_curriculum.training.tasks.family import TextToImageRun

BATCHES, CAPTION = (8, 32, 1), "a caption"


def measure(findings: Findings, settings: Settings) -> None:
    """Encoding alone; then the step with encoders against the step with caches."""
    run = speed.sd15_run(settings)
    batches = (2,) if settings.smoke else BATCHES
    rows: dict[str, Measure] = {
        f"encoding, batch {batches[0]}": partial(_encoding, run, settings, batches[0])
    }
    for batch in batches:
        compared = partial(_compare, run, settings, batch)
        rows[f"latents and captions, batch {batch}"] = speed.freed(run, settings, compared)
    findings.attempt_all(rows)


def cached_batches(
    batch: int,
    *,
    latents: tuple[int, ...],
    told: dict[str, Any],
    captions: tuple[str, ...] = (CAPTION,),
    pinned: bool,
) -> speed.Batches:
    """The same batch again and again, as the loader reads it from caches: mean and deviation of
    latents of a shape, captions by name, and what is ``told`` besides of each sample."""
    numbers: dict[str, Any] = {
        "mean": torch.randn(batch, *latents),
        "std": torch.ones(batch, *latents),
    }
    numbers |= {name: value.expand(batch, *value.shape) for name, value in told.items()}
    if pinned:
        numbers = {name: value.contiguous().pin_memory() for name, value in numbers.items()}
    named = {"caption": [*captions] * batch} if captions else {}
    return itertools.repeat(numbers | named)


def _encoding(run: TextToImageRun, settings: Settings, batch: int) -> dict[str, Any]:
    sizes = speed.sizes_of(settings)
    batches = subject.host_batches(sizes, batch, pinned=settings.cuda)

    def encode() -> None:
        pixels = next(batches)["pixel_values"].to(settings.device, non_blocking=True)
        with torch.no_grad():
            run.family.posterior(run.models.vae, pixels)

    return speed.rate(settings, encode, batch)


def _compare(run: TextToImageRun, settings: Settings, batch: int) -> dict[str, Any]:
    sizes = speed.sizes_of(settings)
    length, side = (sizes.text_length, sizes.text_width), sizes.resolution // 8
    known = subject.knowing(run, {CAPTION: {"encoder_hidden_states": torch.randn(1, *length)}})
    batches = cached_batches(batch, latents=(4, side, side), told={}, pinned=settings.cuda)
    variants = {
        "encoders": speed.stepper(run, settings, batch),
        "caches": speed.stepper(known, settings, batch, batches=batches),
    }
    length_of_window = speed.window_seconds(settings)
    return clock.paired_windows(
        settings.device, variants, batch, speed.SWEEP_WINDOWS, length_of_window
    )
