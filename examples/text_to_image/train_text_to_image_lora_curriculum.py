#!/usr/bin/env python
"""Fine-tune Stable Diffusion by LoRA on image and caption pairs, spending the steps on the noise
levels that teach the model most.

It takes every flag of diffusers' train_text_to_image_lora.py, and --timestep_sampler, --curriculum
and --loss_weighting besides; `--help` lists them. Only the adapter is trained, in float32, averaged
and written into checkpoints; a stopped run goes on bit for bit.

    accelerate launch examples/text_to_image/train_text_to_image_lora_curriculum.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir my_images --rank 16 --curriculum difficulty --timestep_sampler laplace
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
from diffusers_curriculum.training.tasks.family import TextToImageRun
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora


def encode(run: TextToImageRun, batch: dict[str, Any], draw: Draw) -> tuple[Tensor, Conditioning]:
    """Latents of images, and what the network is told of their captions."""
    family, models, device = run.family, run.models, run.accelerator.device
    sent: Any = send_to_device(batch, device, non_blocking=True)
    with torch.no_grad():
        mean, std = run.encoded(sent)
        encoded = mean + std * draw(mean.shape[1:], purpose="posterior")
        return family.latents(models.vae, encoded), run.captions(sent)


def predict(
    run: TextToImageRun,
    latents: Tensor,
    conditioning: Conditioning,
    drawn: TimestepSample,
    draw: Draw,
) -> tuple[Tensor, ...]:
    """The prediction from latents with noise, and its target."""
    # Draw noise
    noise = draw(latents.shape[1:], purpose="noise")
    if run.args.noise_offset:
        offset = draw((latents.shape[1], 1, 1), purpose="noise_offset")
        noise = noise + run.args.noise_offset * offset

    # Add it
    noisy = run.objective.add_noise(latents, noise, run.input_levels(drawn.at, draw))
    target = run.objective.target(latents, noise, drawn.at)

    # Predict
    inputs = run.objective.scale_input(noisy, drawn.at)
    return run.family.predict(run.network, inputs, drawn.timesteps, conditioning), target


def training_step(
    run: TextToImageRun, step: int, slots: Slots, batch: dict[str, Any]
) -> LevelLosses:
    """One micro-batch, from images to gradients."""
    device = run.accelerator.device
    draw = partial(gaussian, seed=run.seed, step=step, slots=slots, device=device)
    latents, conditioning = encode(run, batch, draw)

    # Draw noise levels
    drawn = run.sampler.sample(slots, step=step, device=device)

    # Predict; dropout of the adapter draws from the global generator
    run.seed_model(step, slots)
    prediction, target = predict(run, latents, conditioning, drawn, draw)

    # Loss and gradients, of the adapter alone
    weights, mask = run.loss_weights(drawn), run.mask(batch, target)
    loss, losses = run.objective.loss(prediction, target, weights, mask)
    run.accelerator.backward(loss)
    return LevelLosses(drawn.indices, losses, loss.detach().reshape(1))


def main(argv: Sequence[str] | None = None) -> None:
    """Train from a command line (default: the program's own), from loading to the upload.

    Raises:
        UsageError: bad arguments, data or checkpoint; before any model is loaded.
        NonFiniteError: a loss or gradient was not finite.
    """
    Job(TextToImageLora(), argv).train(training_step, encode, predict)


if __name__ == "__main__":
    run_script(main)
