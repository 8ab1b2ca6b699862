"""The training step against the one that diffusers' script writes inline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import clock, speed, subject
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.settings import Settings
from diffusers_curriculum.training.tasks.family import TextToImageRun

# (batch, accumulation): large steps, and small ones in which the host's share shows
SETTINGS = ((32, 1), (8, 1), (1, 4))
SAMPLERS = {"curriculum": subject.CURRICULUM, "uniform": subject.UNIFORM}


def measure(findings: Findings, settings: Settings) -> None:
    """Official inline step against uniform, and against curriculum with Laplace; same models."""
    run = speed.sd15_run(settings)
    rows = {
        f"{name}, batch {batch} x {accumulation}": speed.freed(
            run, settings, partial(_compare, run, settings, flags, batch, accumulation)
        )
        for name, flags in SAMPLERS.items()
        for batch, accumulation in (((2, 1), (1, 2)) if settings.smoke else SETTINGS)
    }
    findings.attempt_all(rows)


def _compare(
    run: TextToImageRun, settings: Settings, flags: tuple[str, ...], batch: int, accumulation: int
) -> dict[str, Any]:
    run.accelerator.gradient_accumulation_steps = accumulation
    variant, steps = subject.with_sampler(run, *flags), itertools.count()
    plan, sizes = subject.batch_plan(batch, accumulation), speed.sizes_of(settings)
    pinned = subject.host_batches(sizes, batch, pinned=settings.cuda)
    pageable = subject.host_batches(sizes, batch, pinned=False)
    variants = {
        "official": partial(_official_step, run, pageable, batch, accumulation),
        "ours": lambda: subject.update(variant, next(steps), plan, pinned),
    }
    return clock.paired_windows(
        settings.device,
        variants,
        batch * accumulation,
        speed.WINDOWS,
        speed.window_seconds(settings),
    )


def _official_step(
    run: TextToImageRun, batches: Iterator[dict[str, Tensor]], batch: int, accumulation: int
) -> float:
    """One update after the formulas of diffusers' script: epsilon, uniform timesteps, no EMA.

    As there, batches come from pageable memory, and every micro-step gathers its loss and reads it
    back twice, once for the tracker and once for the progress bar.
    """
    accelerator, device, train_loss = run.accelerator, run.accelerator.device, 0.0
    for _ in range(accumulation):
        with accelerator.accumulate(run.network):
            loss = _official_loss(run, next(batches), device)
            gathered = accelerator.gather(loss.detach().repeat(batch)).mean()
            train_loss += gathered.item() / accumulation
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.network.parameters(), 1.0)
            run.optimizer.step()
            run.lr_scheduler.step()
            run.optimizer.zero_grad()
        _shown = {"step_loss": loss.detach().item(), "lr": run.lr_scheduler.get_last_lr()[0]}
    return train_loss


def _official_loss(run: TextToImageRun, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    models, scheduler = run.models, run.levels.scheduler
    pixels, tokens = batch["pixel_values"].to(device), batch["input_ids"].to(device)
    posterior = models.vae.encode(pixels.to(models.vae.dtype)).latent_dist
    latents = posterior.sample() * models.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    levels = scheduler.config.num_train_timesteps
    drawn = torch.randint(0, levels, (len(latents),), device=device).long()
    noisy = scheduler.add_noise(latents, noise, drawn)
    embeddings = models.encoders["text_encoder"](tokens, return_dict=False)[0]
    prediction = run.network(noisy, drawn, embeddings, return_dict=False)[0]
    return F.mse_loss(prediction.float(), noise.float(), reduction="mean")
