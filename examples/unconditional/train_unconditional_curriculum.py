#!/usr/bin/env python
"""Train an unconditional model, spending the steps on the noise levels that teach it most.

It takes every flag of diffusers' train_unconditional.py and leaves the same pipeline, and trains
DiT besides U-Net, flow matching and EDM besides DDPM, latents besides pixels; `--help` lists all.
Everything that is random is a function of the seed, the step and the sample's slot in the global
batch, so that a stopped run goes on bit for bit.

    accelerate launch examples/unconditional/train_unconditional_curriculum.py \
        --train_data_dir my_images --resolution 64 --use_ema \
        --curriculum difficulty --timestep_sampler laplace
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from diffusers_curriculum import Slots
from diffusers_curriculum.randomness import gaussian
from diffusers_curriculum.samplers import TimestepSample
from diffusers_curriculum.training.loop.job import Job, run_script
from diffusers_curriculum.training.loop.run import Draw, LevelLosses
from diffusers_curriculum.training.tasks.images import ImageRun
from diffusers_curriculum.training.tasks.unconditional import Unconditional


def encode(run: ImageRun, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents of images, or those of the cache, and what the network is told besides."""
    device = run.accelerator.device
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    mean, std = run.encoded(batch)
    latents = mean
    if std is not None:
        latents = mean + std * draw(mean.shape[1:], purpose="posterior")
    if run.null_label is None:
        return latents, {}
    # a network that knows classes is told that there is none
    return latents, {"class_labels": torch.full((len(latents),), run.null_label, device=device)}


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
    Job(Unconditional(), argv).train(training_step, encode, predict)


if __name__ == "__main__":
    run_script(main)
