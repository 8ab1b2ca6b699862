#!/usr/bin/env python
"""Fine-tune Stable Diffusion 3, Flux.1, Flux.2 klein, Qwen-Image or Z-Image on image and caption
pairs, spending the steps on the noise levels that teach the model most.

Flags are named as in diffusers' train_dreambooth_flux.py and its kin, --weighting_scheme among
them; --timestep_sampler, --curriculum and --loss_weighting come besides; --use_lora trains an
adapter. Which family is trained is
read from the pipeline.

    accelerate launch examples/text_to_image/train_text_to_image_flow_curriculum.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --train_data_dir my_images \
        --cache_text_embeddings --timestep_sampler laplace --curriculum difficulty
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from diffusers_curriculum import Slots
from diffusers_curriculum.randomness import gaussian
from diffusers_curriculum.samplers import TimestepSample
from diffusers_curriculum.training.loop.job import Job, run_script
from diffusers_curriculum.training.loop.run import Draw, LevelLosses
from diffusers_curriculum.training.parts.families.base import Conditioning
from diffusers_curriculum.training.tasks.flow import FlowRun
from diffusers_curriculum.training.tasks.flow_lora import flow_task


def encode(run: FlowRun, batch: dict[str, Any], draw: Draw) -> tuple[Tensor, Conditioning]:
    """Latents of images, or those of the cache, and what the network is told of their captions."""
    sent: Any = send_to_device(batch, run.accelerator.device, non_blocking=True)
    with torch.no_grad():
        mean, std = run.encoded(sent)
        encoded = mean + std * draw(mean.shape[1:], purpose="posterior")
        return run.family.latents(run.models.vae, encoded), run.captions(sent)


def predict(
    run: FlowRun, latents: Tensor, conditioning: Conditioning, drawn: TimestepSample, draw: Draw
) -> tuple[Tensor, ...]:
    """The prediction from latents with noise, its target, and those latents."""
    # Draw noise, and add it
    noise = draw(latents.shape[1:], purpose="noise")
    noisy = run.objective.add_noise(latents, noise, run.input_levels(drawn.at, draw))
    target = run.objective.target(latents, noise, drawn.at)

    # Predict the velocity
    told = conditioning, run.guidance
    return run.family.predict(run.network, noisy, drawn.timesteps, *told), target, noisy


def training_step(run: FlowRun, step: int, slots: Slots, batch: dict[str, Any]) -> LevelLosses:
    """One micro-batch, from images or their cached latents to gradients."""
    device = run.accelerator.device
    draw = partial(gaussian, seed=run.seed, step=step, slots=slots, device=device)
    latents, conditioning = encode(run, batch, draw)

    # Draw noise levels
    drawn = run.at_own_size(run.sampler.sample(slots, step=step, device=device), latents)

    # Predict; a model with dropout draws from the global generator
    run.seed_model(step, slots)
    prediction, target, noisy = predict(run, latents, conditioning, drawn, draw)

    # Loss and gradients; what is observed of a level is the error of the velocity
    weights, mask = run.loss_weights(drawn), run.mask(batch, target)
    loss, losses = run.loss(prediction, target, weights, mask)
    if run.args.precondition_outputs:
        denoised = run.objective.denoised(prediction, noisy, drawn.at)
        loss, _ = run.loss(denoised, latents, weights, mask)
    run.accelerator.backward(loss)
    return LevelLosses(drawn.indices, losses, loss.detach().reshape(1))


def main(argv: Sequence[str] | None = None) -> None:
    """Train from a command line (default: the program's own), from loading to the upload.

    Raises:
        UsageError: bad arguments, data or checkpoint; before any model is loaded.
        NonFiniteError: a loss or gradient was not finite.
    """
    Job(flow_task(argv), argv).train(training_step, encode, predict)


if __name__ == "__main__":
    run_script(main)
