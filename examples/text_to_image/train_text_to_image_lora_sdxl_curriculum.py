#!/usr/bin/env python
"""Fine-tune Stable Diffusion XL by LoRA on image and caption pairs, spending the steps on the noise
levels that teach the model most.

It takes the flags of diffusers' train_text_to_image_lora_sdxl.py, --train_text_encoder among them,
and --timestep_sampler, --curriculum, --loss_weighting and --cache_latents besides; `--help` lists
them. Only adapters are trained, in float32, averaged and written into checkpoints; a stopped run
goes on bit for bit.

    accelerate launch examples/text_to_image/train_text_to_image_lora_sdxl_curriculum.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --train_data_dir my_images --rank 16 --train_text_encoder --mixed_precision bf16 \
        --gradient_checkpointing --curriculum difficulty --timestep_sampler laplace
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from diffusers_curriculum import Slots
from diffusers_curriculum.randomness import gaussian, key
from diffusers_curriculum.training.loop.job import Job, run_script
from diffusers_curriculum.training.loop.run import LevelLosses
from diffusers_curriculum.training.tasks.text_to_image import TextToImageRun
from diffusers_curriculum.training.tasks.text_to_image_lora_sdxl import TextToImageLoraSDXL


def training_step(
    run: TextToImageRun, step: int, slots: Slots, batch: dict[str, Tensor]
) -> LevelLosses:
    """One micro-batch, from images or their cached latents to gradients."""
    args, family, models, device = run.args, run.family, run.models, run.accelerator.device
    draw = partial(gaussian, seed=run.seed, step=step, slots=slots, device=device)
    batch = {name: each.to(device, non_blocking=True) for name, each in batch.items()}

    # Encode images, and captions unless their encoders are trained
    with torch.no_grad():
        mean, std = run.encoded(batch)
        encoded = mean + std * draw(mean.shape[1:], purpose="posterior")
        latents = family.latents(models.vae, encoded)
        if not args.train_text_encoder:
            batch |= family.encode_text(models, batch)

    # Draw noise and noise levels
    noise = draw(latents.shape[1:], purpose="noise")
    if args.noise_offset:
        offset = draw((latents.shape[1], 1, 1), purpose="noise_offset")
        noise = noise + args.noise_offset * offset
    drawn = run.sampler.sample(slots, step=step, device=device)

    # Add the noise
    noisy = run.objective.add_noise(latents, noise, run.input_levels(drawn.at, draw))
    target = run.objective.target(latents, noise, drawn.at)

    # Encode captions if that is trained, and predict; dropout draws from the global generator
    torch.manual_seed(key(run.seed, step, slots.start, purpose="model") >> 65)
    inputs = run.objective.scale_input(noisy, drawn.at)
    prediction = run.network(inputs, drawn.timesteps, batch)

    # Loss and gradients, of the adapters alone
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
    Job(TextToImageLoraSDXL(), argv).train(training_step)


if __name__ == "__main__":
    run_script(main)
