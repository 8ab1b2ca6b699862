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

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from vqgan_arguments import parse_args, run_facts
from vqgan_losses import Adversary, Guards, Losses, ReconstructionLoss
from vqgan_monitor import Monitor
from vqgan_results import Results

from diffusers_curriculum.models.vit_vq import ViTVQModel
from diffusers_curriculum.randomness import host_generator, key
from diffusers_curriculum.training.arguments.run_config import tracker_config
from diffusers_curriculum.training.checkpoint.checkpoints import clean_temporary, find_checkpoint
from diffusers_curriculum.training.checkpoint.record import RunRecord
from diffusers_curriculum.training.checkpoint.same_run import check_same_run, renewed_parts
from diffusers_curriculum.training.checkpoint.saving import Saver
from diffusers_curriculum.training.checkpoint.state import TrainingState
from diffusers_curriculum.training.data.bad_samples import usable_rows
from diffusers_curriculum.training.data.dataset import ImageDataset, training_batches
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.parts import optimizers as optimization
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.process.memory import out_of_memory_explained
from diffusers_curriculum.training.process.stopping import StopRequest
from diffusers_curriculum.training.storage.manifest import read_manifest


@dataclass
class Run:
    """What the training step works with."""

    args: argparse.Namespace
    accelerator: Any  # accelerate.Accelerator, whose gather() is typed too widely
    seed: int
    model: Any
    bare: ViTVQModel  # the model without accelerate's wrappers
    loss: ReconstructionLoss
    adversary: Adversary | None
    optimizer: Any
    guard: FiniteGuard
    lr_scheduler: Any


def training_step(run: Run, step: int, batch: dict[str, Tensor]) -> tuple[Losses, Tensor, Tensor]:
    """One micro-batch, from images to gradients; returns losses, codes, and latents."""
    # Draw a batch
    images = batch["pixel_values"].to(run.accelerator.device, non_blocking=True)

    # Reconstruct
    reconstruction, codebook, indices, latents = run.model(images, return_dict=False)

    # Generator losses
    total, losses = run.loss(reconstruction, images)
    loss = total + codebook
    losses["codebook"] = codebook.detach()
    critic = run.adversary if step >= run.args.discriminator_start else None
    if critic is not None:
        adversarial = critic.generator_loss(reconstruction)
        loss = loss + run.args.adversarial_weight * adversarial
        losses["adversarial"] = adversarial.detach()
    losses["loss"] = loss.detach()
    run.accelerator.backward(loss)

    # Discriminator
    if critic is not None:
        losses |= critic.backward(images, reconstruction, step)
    return losses, indices, latents.detach()


def optimizer_step(
    run: Run, step: int, plan: BatchPlan, batches: Iterator[dict[str, Tensor]]
) -> tuple[Losses, Tensor]:
    """One update from a whole global batch; returns its mean losses, and how many codes revived."""
    accelerator, args, observed = run.accelerator, run.args, []
    for _ in range(plan.accumulation):
        with accelerator.accumulate(run.model):
            observed.append(training_step(run, step, next(batches)))
            # Update
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
                run.guard.step((losses["loss"] for losses, *_ in observed), norm)
                if run.adversary is not None and step >= args.discriminator_start:
                    run.adversary.step()
            run.optimizer.zero_grad()
    run.lr_scheduler.step()

    # Codebook: once per update, the same on every process
    losses, indices, latents = zip(*observed, strict=True)
    quantiser = run.bare.quantise
    quantiser.observe(accelerator.gather(torch.cat(indices)))
    revived = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    if args.codebook_patience:
        vectors = accelerator.gather(torch.cat(latents)).permute(0, 2, 3, 1)
        choice = host_generator(run.seed, step, purpose="revive")
        revived = quantiser.revive(vectors, choice, args.codebook_patience)
    values = torch.stack(
        [torch.stack([part[name] for part in losses]).mean() for name in losses[0]]
    )
    values = accelerator.reduce(values, "mean")
    return dict(zip(losses[0], values.unbind(), strict=True)), revived


def build_model(args: argparse.Namespace, seed: int) -> ViTVQModel:
    """A fresh model, the same at every start, or a saved one.

    Raises:
        UsageError: it cannot be built or loaded, or takes other images.
    """
    try:
        if args.pretrained_model_name_or_path is None:
            torch.manual_seed(key(seed, purpose="model_weights") >> 65)
            model: Any = ViTVQModel(**args.model_config)
        else:
            model = ViTVQModel.from_pretrained(
                args.pretrained_model_name_or_path, cache_dir=args.cache_dir, use_safetensors=True
            )
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"the model cannot be built: {error}") from error
    if model.config.image_size != args.resolution or model.config.in_channels != 3:
        raise UsageError(
            f"--resolution is {args.resolution}, but the model takes {model.config.in_channels} x "
            f"{model.config.image_size} x {model.config.image_size} pixels: make them agree."
        )
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def load_held_out(args: argparse.Namespace) -> Any:
    """The images of --validation_data_dir, None without one."""
    if args.validation_data_dir is None:
        return None
    return load_images(train_data_dir=args.validation_data_dir, cache_dir=args.cache_dir)


def main(argv: Sequence[str] | None = None) -> None:
    """Train from a command line (default: the program's own), from loading to the last picture.

    Raises:
        UsageError: bad arguments, data or checkpoint.
        NonFiniteError: a loss or gradient was not finite.
    """
    args = parse_args(argv)
    accelerator = runtime.make_accelerator(args)
    stop = StopRequest(args.max_hours)

    # The run to resume, if any, and the seed
    runtime.prepare_output(accelerator, args.output_dir, clean_temporary)
    request = args.resume_from_checkpoint
    checkpoint = find_checkpoint(args.output_dir, request) if request else None
    resumed = read_manifest(checkpoint)["facts"] if checkpoint else None
    seed = runtime.agree_on_seed(args.seed, resumed, args.allow_config_change)

    # Data
    with accelerator.main_process_first():
        rows = load_images(
            args.dataset_name, args.dataset_config_name, args.train_data_dir,
            cache_dir=args.cache_dir, image_column=args.image_column,
            max_train_samples=args.max_train_samples, seed=seed,
        )  # fmt: skip
        held_out = load_held_out(args)
    rows = usable_rows(
        rows, args.image_column, None, policy=args.bad_samples, limit=args.bad_samples_limit,
        output_dir=args.output_dir, resolution=args.resolution,
        progress=accelerator.is_local_main_process, rank=accelerator.process_index,
        world_size=accelerator.num_processes, gather=gather_object,
    )  # fmt: skip
    plan = BatchPlan(
        len(rows), args.train_batch_size, args.gradient_accumulation_steps,
        accelerator.num_processes, accelerator.process_index, seed,
    )  # fmt: skip
    args.max_train_steps = args.max_train_steps or plan.steps_for_epochs(args.num_train_epochs)

    # Models
    bare = build_model(args, seed).to(accelerator.device)
    facts = run_facts(args, plan, rows, dict(bare.config))
    changed = check_same_run(facts, resumed, args.allow_config_change)
    loss = ReconstructionLoss(args, accelerator.device)
    adversary = Adversary(args, accelerator, seed) if args.adversarial_weight else None
    optimizer = optimization.build_optimizer(
        args, list(bare.parameters()), accelerator.num_processes
    )
    lr_scheduler = optimization.build_lr_scheduler(args, optimizer, args.max_train_steps)
    model, optimizer = accelerator.prepare(bare, optimizer)
    guard = FiniteGuard(accelerator, optimizer, args.nonfinite)
    run = Run(args, accelerator, seed, model, bare, loss, adversary, optimizer, guard, lr_scheduler)

    # Reports and checkpoints
    if accelerator.is_main_process:
        accelerator.init_trackers(args.tracker_project_name, tracker_config(args))
    guards: Any = Guards(guard, *([adversary.guard] if adversary else []))
    monitor = Monitor(args, accelerator, bare.quantise, loss.names, adversary is not None, guards)
    trackers = {"monitor": monitor, "guard": guard} | ({"critic": adversary} if adversary else {})
    none: Any = None  # there are no noise levels to sample
    state = TrainingState(bare, optimizer.optimizer, lr_scheduler, none, None, accelerator.scaler,
                          trackers, model_name="vit_vq")  # fmt: skip
    start = state.read(checkpoint, renewed_parts(changed)) if checkpoint else 0
    record = RunRecord(args.output_dir, args, facts, start, checkpoint, changed,
                       accelerator.is_main_process)  # fmt: skip
    transform = ImageTransform(
        args.resolution, args.image_interpolation_mode, args.center_crop, args.random_flip
    )
    batches = training_batches(
        ImageDataset(rows, plan, transform, image_column=args.image_column),
        plan, start, args.max_train_steps, args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    results = Results(args, accelerator, rows, held_out, plan)
    runtime.log_run({"images": plan.num_samples, "batch per update": plan.total, "seed": seed,
                     "updates": args.max_train_steps, "first update": start})  # fmt: skip

    # Train
    with stop, out_of_memory_explained(args):
        saver = Saver(args, accelerator, state, guards, facts, stop)
        record.start()
        monitor.start(start)
        for step in range(start, args.max_train_steps):
            losses, revived = optimizer_step(run, step, plan, batches)
            done = step + 1
            monitor.add(losses, revived)
            monitor.after_step(done, lr_scheduler.get_last_lr()[0])
            stopping = stop.requested(done)
            saver.after_step(done, stopping)
            if stopping:
                record.finish(done, str(stop.stopped()))
                accelerator.end_training()
                raise stop.stopped()
            results.validate(bare, done)

    # Measure and save
    monitor.close()
    results.finish(bare, args.max_train_steps)
    record.finish(args.max_train_steps)
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(runtime.exit_status(main))
