#!/usr/bin/env python
"""Train a class-conditional DiT or U-Net, spending the steps on the noise levels that teach the
model most.

Diffusion (epsilon, v or sample), flow matching and EDM; in pixels or in the latents of an
AutoencoderKL, VQModel or ViTVQModel. Flags are named as in diffusers' scripts; `--help` lists them.
Everything that is random is a function of the seed, the step and the sample's slot in the global
batch, so that a stopped run goes on bit for bit.

    accelerate launch examples/class_conditional/train_class_conditional_curriculum.py \
        --model_config DiT-B/2 --train_data_dir folders_by_class --resolution 256 \
        --pretrained_vae_model_name_or_path stabilityai/sd-vae-ft-ema --use_ema \
        --curriculum difficulty --timestep_sampler laplace
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from diffusers_curriculum import Slots
from diffusers_curriculum.randomness import gaussian
from diffusers_curriculum.samplers import TimestepSample
from diffusers_curriculum.training.loop.job import Job, run_script
from diffusers_curriculum.training.loop.run import Draw, LevelLosses
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.images import ImageRun


def encode(run: ImageRun, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents of images, or those of the cache, and what the network is told besides."""
    device = run.accelerator.device
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    mean, std = run.encoded(batch)
    latents = mean
    if std is not None:
        latents = mean + std * draw(mean.shape[1:], purpose="posterior")
    return latents, {"class_labels": batch["label"]}  # some were dropped on loading


def predict(
    run: ImageRun,
    latents: Tensor,
    conditioning: dict[str, Tensor],
    drawn: TimestepSample,
    draw: Draw,
) -> tuple[Tensor, ...]:
    """The prediction from latents with noise, its target, those latents, and a learned variance."""
    # Draw noise, and add it
    noise = draw(latents.shape[1:], purpose="noise")
    noisy = run.objective.add_noise(latents, noise, run.input_levels(drawn.at, draw))
    target = run.objective.target(latents, noise, drawn.at)

    # Predict
    inputs = run.objective.scale_input(noisy, drawn.at)
    output = run.network(inputs, drawn.timesteps, **conditioning, return_dict=False)[0]
    prediction, variance = output.tensor_split([latents.shape[1]], dim=1)

    # Between two times (--formulation mean_flow) the velocity is an average
    target = run.average_velocity(noisy, target, conditioning, drawn)
    return prediction, target, noisy, variance


def training_step(run: ImageRun, step: int, slots: Slots, batch: dict[str, Tensor]) -> LevelLosses:
    """One micro-batch, from images or their cached latents to gradients."""
    device = run.accelerator.device
    draw = partial(gaussian, seed=run.seed, step=step, slots=slots, device=device)
    latents, conditioning = encode(run, batch, draw)

    # Draw noise levels
    drawn = run.sampler.sample(slots, step=step, device=device)

    # Predict; a model with dropout draws from the global generator
    run.seed_model(step, slots)
    prediction, target, noisy, variance = predict(run, latents, conditioning, drawn, draw)

    # Loss and gradients
    loss, losses = run.objective.loss(prediction, target, run.loss_weights(drawn))
    if run.bound is not None:
        bound = run.bound.loss(prediction.detach(), variance, latents, noisy, drawn.indices)
        loss = loss + (bound * drawn.importance).mean()
    run.accelerator.backward(loss)
    return LevelLosses(drawn.indices, losses, loss.detach().reshape(1))


def main(argv: Sequence[str] | None = None) -> None:
    """Train from a command line (default: the program's own), from loading to the upload.

    Raises:
        UsageError: bad arguments, data or checkpoint; before any model is loaded.
        NonFiniteError: a loss or gradient was not finite.
    """
    Job(ClassConditional(), argv).train(training_step, encode, predict)


if __name__ == "__main__":
    run_script(main)
