#!/usr/bin/env python
"""Train ViT-VQGAN (arXiv 2110.04627), the autoencoder whose latents a diffusion model learns.

Everything that is random is a function of the seed and the step, so that a stopped run goes on bit
for bit, with critic, codebook and their statistics. `--help` lists the flags; they are named as in
diffusers' scripts.

    accelerate launch examples/autoencoder/train_vit_vqgan.py \
        --train_data_dir my_images --validation_data_dir my_held_out_images \
        --model_config base --resolution 256 --mixed_precision bf16
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from vqgan_task import VQGAN, Reconstructions, VQGANRun

from diffusers_curriculum import Slots
from diffusers_curriculum.training.loop.job import Job, run_script


def training_step(
    run: VQGANRun, step: int, slots: Slots, batch: dict[str, Tensor]
) -> Reconstructions:
    """One micro-batch, from images to the gradients of autoencoder and critic."""
    # Draw a batch
    images = batch["pixel_values"].to(run.accelerator.device, non_blocking=True)

    # Reconstruct
    reconstruction, codebook, codes, latents = run.network(images, return_dict=False)

    # Generator losses
    total, losses = run.loss(reconstruction, images)
    loss = total + codebook
    losses["codebook"] = codebook.detach()
    critic = run.critic(step)
    if critic is not None:
        adversarial = critic.generator_loss(reconstruction)
        loss = loss + run.args.adversarial_weight * adversarial
        losses["adversarial"] = adversarial.detach()
    losses["loss"] = loss.detach()
    run.accelerator.backward(loss)

    # Discriminator
    if critic is not None:
        losses |= critic.backward(images, reconstruction, step)
    return run.outcome(losses, codes, latents)


def main(argv: Sequence[str] | None = None) -> None:
    """Train from a command line (default: the program's own), from loading to the last picture.

    Raises:
        UsageError: bad arguments, data or checkpoint.
        NonFiniteError: a loss or gradient was not finite.
    """
    Job(VQGAN(), argv).train(training_step)


if __name__ == "__main__":
    run_script(main)
