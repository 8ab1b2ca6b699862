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

import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from diffusers_curriculum import Slots
from diffusers_curriculum.randomness import gaussian, key
from diffusers_curriculum.training.arguments.class_conditional import parse_class_args
from diffusers_curriculum.training.checkpoint.checkpoints import clean_temporary, find_checkpoint
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.loop.image_job import ImageJob
from diffusers_curriculum.training.loop.image_setup import ImageRun, show_timesteps
from diffusers_curriculum.training.parts import optimizers as optimization
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.process.memory import out_of_memory_explained
from diffusers_curriculum.training.process.stopping import StopRequest

SAMPLING_SCHEDULER = "DDIMScheduler"  # of a variance preserving process, unless a flag says another


def training_step(
    run: ImageRun, step: int, slots: Slots, batch: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """One micro-batch, from images to gradients; returns levels, losses per sample, and loss."""
    device = run.accelerator.device
    draw = partial(gaussian, seed=run.seed, step=step, slots=slots, device=device)

    # Encode images, or take the latents that were encoded before; classes were dropped on loading
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if "pixel_values" in batch:
        mean, std = run.space.encode(batch["pixel_values"])
    else:
        mean, std = batch["mean"], batch.get("std")
    latents = mean
    if std is not None:
        latents = mean + std * draw(mean.shape[1:], purpose="posterior")
    labels = batch["label"]

    # Draw noise and noise levels
    noise = draw(latents.shape[1:], purpose="noise")
    levels = run.sampler.sample(slots, step=step, device=device)

    # Add the noise
    noisy = run.objective.add_noise(latents, noise, levels.at)
    target = run.objective.target(latents, noise, levels.at)

    # Predict; a model with dropout draws from the global generator
    torch.manual_seed(key(run.seed, step, slots.start, purpose="model") >> 65)
    inputs = run.objective.scale_input(noisy, levels.at)
    output = run.network(inputs, levels.timesteps, class_labels=labels, return_dict=False)[0]
    prediction, variance = output.tensor_split([latents.shape[1]], dim=1)

    # Loss and gradients
    loss, losses = run.objective.loss(prediction, target, run.loss_weights(levels))
    if run.bound is not None:
        bound = run.bound.loss(prediction.detach(), variance, latents, noisy, levels.indices)
        loss = loss + (bound * levels.importance).mean()
    run.accelerator.backward(loss)
    return levels.indices, losses, loss.detach().reshape(1)


def optimizer_step(
    run: ImageRun, step: int, plan: BatchPlan, batches: Iterator[dict[str, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One update from a whole global batch; returns its loss, levels, losses and gradient norm."""
    accelerator, args, observed, norm = run.accelerator, run.args, [], None
    for micro in range(plan.accumulation):
        with accelerator.accumulate(run.network):
            observed.append(training_step(run, step, plan.slots(micro), next(batches)))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(run.network.parameters(), args.max_grad_norm)
                run.guard.step((seen for _, *both in observed for seen in both), norm)
            run.optimizer.zero_grad()
    run.lr_scheduler.step()

    # Average the weights
    if run.ema is not None and (step + 1) % args.ema_interval == 0:
        network = accelerator.unwrap_model(run.network)
        optimization.update_ema(run.ema, network.parameters(), accelerator.device, args.offload_ema)
    if run.power is not None:
        run.power.update(step + 1)

    # Observe: once per update, the same numbers on every process
    gathered = (torch.cat(column) for column in zip(*observed, strict=True))
    indices, losses, loss = (accelerator.gather(column) for column in gathered)
    run.sampler.observe(indices, losses, step)
    if run.learned is not None:
        run.learned.observe(indices, losses)
        run.weights = run.learned.weights(step + 1, losses.device)
    return loss.double().mean(), indices, losses, norm


def main(argv: Sequence[str] | None = None) -> None:
    """Train from a command line (default: the program's own), from loading to the upload.

    Raises:
        UsageError: bad arguments, data or checkpoint; before any model is loaded.
        NonFiniteError: a loss or gradient was not finite.
    """
    args = parse_class_args(argv)
    if args.show_timesteps:
        show_timesteps(args, SAMPLING_SCHEDULER)
        return
    accelerator = runtime.make_accelerator(args)
    stop = StopRequest(args.max_hours)
    runtime.prepare_output(accelerator, args.output_dir, clean_temporary)
    request = args.resume_from_checkpoint
    checkpoint = find_checkpoint(args.output_dir, request) if request else None
    job = ImageJob(args, accelerator, checkpoint, stop, SAMPLING_SCHEDULER)
    batches = job.batches()
    with stop, out_of_memory_explained(args):
        for step in range(job.start, args.max_train_steps):
            job.after_step(step, *optimizer_step(job.run, step, job.plan, batches))
    job.finish()


if __name__ == "__main__":
    sys.exit(runtime.exit_status(main))
