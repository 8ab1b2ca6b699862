#!/usr/bin/env python
"""Fine-tune Stable Diffusion on image and caption pairs, spending the steps on the noise levels
that teach the model most.

It takes every flag of diffusers' train_text_to_image.py, and --timestep_sampler, --curriculum and
--loss_weighting besides; `--help` lists them. Everything that is random is a function of the seed,
the step and the sample's slot in the global batch, so that a stopped run goes on bit for bit.

    accelerate launch train_text_to_image_curriculum.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir my_images --curriculum difficulty --timestep_sampler laplace
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel, compute_dream_and_update_latents
from torch import Tensor

from diffusers_curriculum import LearnedLossWeights, Objective, Slots, TimestepSampler
from diffusers_curriculum.analysis.preview import make_preview
from diffusers_curriculum.analysis.show import show
from diffusers_curriculum.randomness import gaussian, key
from diffusers_curriculum.training.arguments.run_config import tracker_config
from diffusers_curriculum.training.arguments.text_to_image import parse_args
from diffusers_curriculum.training.checkpoint.checkpoints import clean_temporary, find_checkpoint
from diffusers_curriculum.training.checkpoint.record import RunRecord
from diffusers_curriculum.training.checkpoint.same_run import (
    check_same_run,
    renewed_parts,
    run_facts,
)
from diffusers_curriculum.training.checkpoint.saving import Saver
from diffusers_curriculum.training.checkpoint.state import TrainingState
from diffusers_curriculum.training.data.bad_samples import usable_rows
from diffusers_curriculum.training.data.dataset import ImageCaptionDataset, training_batches
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.sources import load_image_captions
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.levels import timesteps
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.loop.monitor import Monitor
from diffusers_curriculum.training.parts import optimizers as optimization
from diffusers_curriculum.training.parts import stable_diffusion as parts
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.process.memory import out_of_memory_explained
from diffusers_curriculum.training.process.stopping import StopRequest
from diffusers_curriculum.training.publish.text_to_image import Publisher
from diffusers_curriculum.training.storage.manifest import read_manifest


@dataclass
class Run:
    """What the training step works with."""

    args: argparse.Namespace
    accelerator: Any  # accelerate.Accelerator, whose gather() is typed too widely
    seed: int
    models: parts.Components
    scheduler: Any
    sampler: TimestepSampler
    objective: Objective
    weights: Tensor | None
    optimizer: Any
    guard: FiniteGuard
    lr_scheduler: Any
    ema: EMAModel | None
    learned: LearnedLossWeights | None = None  # what makes the weights, where they are learned


def training_step(
    run: Run, step: int, slots: Slots, batch: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """One micro-batch, from images to gradients; returns levels, losses per sample, and loss."""
    args, models, device = run.args, run.models, run.accelerator.device
    draw = partial(gaussian, seed=run.seed, step=step, slots=slots, device=device)

    # Encode images and captions
    with torch.no_grad():
        # copied, then cast: a cast on the way would be made on the host, from pinned to pageable
        pixels = batch["pixel_values"].to(device, non_blocking=True).to(models.vae.dtype)
        posterior = models.vae.encode(pixels).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        latents = (mean + std * draw(mean.shape[1:], purpose="posterior")) * (
            models.vae.config.scaling_factor
        )
        tokens = batch["input_ids"].to(device, non_blocking=True)
        embeddings = models.text_encoder(tokens, return_dict=False)[0]

    # Draw noise and noise levels
    noise = draw(latents.shape[1:], purpose="noise")
    if args.noise_offset:
        offset = draw((latents.shape[1], 1, 1), purpose="noise_offset")
        noise = noise + args.noise_offset * offset
    levels = run.sampler.sample(slots, step=step, device=device)

    # Add the noise
    added = noise
    if args.input_perturbation:
        added = noise + args.input_perturbation * draw(latents.shape[1:], purpose="perturbation")
    noisy = run.objective.add_noise(latents, added, levels.at)
    target = run.objective.target(latents, noise, levels.at)
    if args.dream_training:
        noisy, target = compute_dream_and_update_latents(
            models.unet, run.scheduler, levels.timesteps, noise, noisy, target, embeddings,
            args.dream_detail_preservation,
        )  # fmt: skip

    # Predict; a model with dropout draws from the global generator
    torch.manual_seed(key(run.seed, step, slots.start, purpose="model") >> 65)
    inputs = run.objective.scale_input(noisy, levels.at)
    prediction = models.unet(inputs, levels.timesteps, embeddings, return_dict=False)[0]

    # Loss and gradients
    weight = None if run.weights is None else run.weights[levels.indices]
    if run.sampler.exponent > 0:
        weight = levels.importance if weight is None else weight * levels.importance
    loss, losses = run.objective.loss(prediction, target, weight)
    run.accelerator.backward(loss)
    return levels.indices, losses, loss.detach().reshape(1)


def optimizer_step(
    run: Run, step: int, plan: BatchPlan, batches: Iterator[dict[str, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One update from a whole global batch; returns its loss, levels, losses and gradient norm."""
    accelerator, args, observed, norm = run.accelerator, run.args, [], None
    for micro in range(plan.accumulation):
        with accelerator.accumulate(run.models.unet):
            observed.append(training_step(run, step, plan.slots(micro), next(batches)))
            if accelerator.sync_gradients:
                parameters = run.models.unet.parameters()
                norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                run.guard.step((seen for _, *both in observed for seen in both), norm)
            run.optimizer.zero_grad()
    run.lr_scheduler.step()
    if run.ema is not None and (step + 1) % args.ema_interval == 0:
        unet = accelerator.unwrap_model(run.models.unet)
        optimization.update_ema(run.ema, unet.parameters(), accelerator.device, args.offload_ema)

    # Observe: once per update, the same numbers on every process
    gathered = (torch.cat(column) for column in zip(*observed, strict=True))
    indices, losses, loss = (accelerator.gather(column) for column in gathered)
    run.sampler.observe(indices, losses, step)
    if run.learned is not None:
        run.learned.observe(indices, losses)
        run.weights = run.learned.weights(step + 1, losses.device)
    return loss.double().mean(), indices, losses, norm


def show_timesteps(args: argparse.Namespace) -> None:
    """Show what would be trained on; needs neither data nor models."""
    scheduler, inference = parts.load_schedulers(args)
    sampler = timesteps.build_sampler(args, scheduler, args.seed or 0, args.max_train_steps)
    weights = timesteps.build_loss_weights(args, timesteps.build_objective(args, sampler))
    preview = make_preview(sampler, weights, args.max_train_steps, inference=inference)
    sys.stdout.write(show(preview, args.show_timesteps) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Train from a command line (default: the program's own), from loading to the upload.

    Raises:
        UsageError: bad arguments, data or checkpoint; before any model is loaded.
        NonFiniteError: a loss or gradient was not finite.
    """
    args = parse_args(argv)
    if args.show_timesteps:
        show_timesteps(args)
        return
    accelerator = runtime.make_accelerator(args)
    stop = StopRequest(args.max_hours)

    # The run to resume, if any, and the seed
    runtime.prepare_output(accelerator, args.output_dir, clean_temporary)
    request = args.resume_from_checkpoint
    checkpoint = find_checkpoint(args.output_dir, request) if request else None
    resumed = read_manifest(checkpoint)["facts"] if checkpoint else None
    seed = runtime.agree_on_seed(args.seed, resumed, args.allow_config_change)

    # What is trained on
    scheduler, sampling_scheduler = parts.load_schedulers(args)
    sampler = timesteps.build_sampler(args, scheduler, seed, args.max_train_steps)
    objective = timesteps.build_objective(args, sampler)
    weights = timesteps.build_loss_weights(args, objective)
    learned = timesteps.build_learned_weights(args, objective, seed)

    # Data
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    with accelerator.main_process_first():
        rows = load_image_captions(
            args.dataset_name, args.dataset_config_name, args.train_data_dir, **columns,
            cache_dir=args.cache_dir, max_train_samples=args.max_train_samples, seed=seed,
        )  # fmt: skip
    rows = usable_rows(
        rows, **columns, policy=args.bad_samples, limit=args.bad_samples_limit,
        output_dir=args.output_dir, resolution=args.resolution,
        progress=accelerator.is_local_main_process, rank=accelerator.process_index,
        world_size=accelerator.num_processes, gather=gather_object,
    )  # fmt: skip
    plan = BatchPlan(
        len(rows), args.train_batch_size, args.gradient_accumulation_steps,
        accelerator.num_processes, accelerator.process_index, seed,
    )  # fmt: skip
    args.max_train_steps = args.max_train_steps or plan.steps_for_epochs(args.num_train_epochs)
    timesteps.check_length(args, sampler, args.max_train_steps)
    facts = run_facts(args, plan, sampler, objective, rows)
    changed = check_same_run(facts, resumed, args.allow_config_change)
    publisher = Publisher(args, accelerator, sampling_scheduler, sampler, objective.prediction_type)

    # Models
    tokenizer = parts.load_tokenizer(args)
    dtype = runtime.frozen_dtype(accelerator)
    models = parts.load_components(args, tokenizer, accelerator.device, dtype)
    ema = parts.make_ema(args, models.unet, accelerator.device)
    parameters = list(models.unet.parameters())
    optimizer = optimization.build_optimizer(args, parameters, accelerator.num_processes)
    lr_scheduler = optimization.build_lr_scheduler(args, optimizer, args.max_train_steps)
    unet = models.unet
    models.unet, optimizer = accelerator.prepare(models.unet, optimizer)
    weights = None if weights is None else weights.to(accelerator.device)
    guard = FiniteGuard(accelerator, optimizer, args.nonfinite)
    run = Run(args, accelerator, seed, models, scheduler, sampler, objective, weights, optimizer,
              guard, lr_scheduler, ema, learned)  # fmt: skip

    # Reports and checkpoints
    if accelerator.is_main_process:
        accelerator.init_trackers(args.tracker_project_name, tracker_config(args))
    monitor = Monitor(accelerator, sampler, weights, args.max_train_steps, args.log_every,
                      args.timestep_plot_steps, guard)  # fmt: skip
    more = {"guard": guard} | ({"loss_weights": learned} if learned else {})
    state = TrainingState(unet, optimizer.optimizer, lr_scheduler, sampler, ema,
                          accelerator.scaler, monitor.stateful | more)  # fmt: skip
    start = state.read(checkpoint, renewed_parts(changed)) if checkpoint else 0
    run.weights = learned.weights(start, accelerator.device) if learned else weights
    record = RunRecord(args.output_dir, args, facts, start, checkpoint, changed,
                       accelerator.is_main_process)  # fmt: skip
    transform = ImageTransform(
        args.resolution, args.image_interpolation_mode, args.center_crop, args.random_flip
    )
    dataset = ImageCaptionDataset(
        rows, plan, tokenizer, transform, **columns, caption_dropout=args.caption_dropout
    )
    batches = training_batches(
        dataset, plan, start, args.max_train_steps, args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    timesteps.warn_of_terminal_snr(objective, weights)
    runtime.log_run({"examples": plan.num_samples, "batch per update": plan.total, "seed": seed,
                     "updates": args.max_train_steps, "first update": start})  # fmt: skip

    # Train
    with stop, out_of_memory_explained(args):
        saver = Saver(args, accelerator, state, guard, facts, stop)
        record.start()
        monitor.start(start)
        for step in range(start, args.max_train_steps):
            loss, indices, losses, norm = optimizer_step(run, step, plan, batches)
            done = step + 1
            monitor.add(step, loss, indices, losses, norm)
            monitor.after_step(done, lr_scheduler.get_last_lr()[0])
            stopping = stop.requested(done)
            saver.after_step(done, stopping)
            if stopping:
                record.finish(done, str(stop.stopped()))
                accelerator.end_training()
                raise stop.stopped()
            if publisher.is_due(plan, step):
                publisher.validate(models, unet, ema, done)

    # Save and publish
    monitor.finish(args.output_dir)
    publisher.finish(unet, ema)
    record.finish(args.max_train_steps)
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(runtime.exit_status(main))
