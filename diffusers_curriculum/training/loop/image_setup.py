"""The parts of a class-conditional or unconditional run, from its command line: noise levels, data,
and models, in the order in which they can fail."""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffusers_curriculum.analysis.preview import make_preview
from diffusers_curriculum.analysis.show import show
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.models.networks import check_conditioning, null_class, takes_labels
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.samplers import TimestepSample, TimestepSampler
from diffusers_curriculum.training.cache.latents import CachedLatents, cache_latents
from diffusers_curriculum.training.data.bad_samples import usable_rows
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels import timesteps
from diffusers_curriculum.training.levels.formulations import build_schedulers
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.parts import images as parts
from diffusers_curriculum.training.parts import optimizers as optimization
from diffusers_curriculum.training.parts.averages import PowerEMA
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.storage.fingerprints import dataset_digest
from diffusers_curriculum.weighting.learned import LearnedLossWeights
from diffusers_curriculum.weighting.variational import VariationalBound

LATENTS_FOLDER = "latents"
CROP_SEED = 0  # of cached crops, so that runs of other seeds may share a cache


@dataclass(frozen=True)
class Levels:
    """What is trained on.

    Attributes:
        inference: the scheduler of pictures and pipeline.
        weights: (T,) loss weights by noise level; None for none and for learned ones.
        learned: what makes the weights, where they are learned.
        bound: the variational term of a learned variance; None where none is trained.
    """

    inference: Any
    sampler: TimestepSampler
    objective: Objective
    weights: Tensor | None
    learned: LearnedLossWeights | None
    bound: VariationalBound | None


@dataclass(frozen=True)
class Data:
    """What is learned from; ``id2label`` is None without classes."""

    rows: Dataset
    plan: BatchPlan
    label_column: str | None
    id2label: dict[int, str] | None

    @property
    def classes(self) -> int | None:
        return None if self.id2label is None else len(self.id2label)


@dataclass
class ImageRun:
    """What the training step works with.

    Attributes:
        network: prepared by accelerate.
        null_label: the class that stands for none; None for a network without labels.
        bound: the variational term of a learned variance; None where none is trained.
        weights: (T,) loss weights by noise level.
    """

    args: argparse.Namespace
    accelerator: Any  # accelerate.Accelerator, whose gather() is typed too widely
    seed: int
    network: Any
    space: LatentSpace
    null_label: int | None
    sampler: TimestepSampler
    objective: Objective
    bound: VariationalBound | None
    weights: Tensor | None
    learned: LearnedLossWeights | None
    optimizer: Any
    guard: FiniteGuard
    lr_scheduler: Any
    ema: EMAModel | None
    power: PowerEMA | None

    def loss_weights(self, levels: TimestepSample) -> Tensor | None:
        """(B,) weights of the samples' losses, importance included; None where all are 1."""
        weight = None
        if self.weights is not None:
            weight = self.weights[levels.indices]
            if levels.log_snr is not None and self.learned is None:
                weight = timesteps.exact_weights(self.args, self.objective, levels.log_snr, weight)
        if self.sampler.exponent > 0:
            weight = levels.importance if weight is None else weight * levels.importance
        return weight


def choose_levels(args: argparse.Namespace, seed: int, default_vp: str) -> Levels:
    """Schedulers, sampler, objective and weights; loads no model.

    Args:
        default_vp: scheduler class for sampling a variance preserving process.

    Raises:
        UsageError: the arguments do not go together.
    """
    pixels = parts.autoencoder_source(args) is None
    if pixels and args.cache_latents:
        raise UsageError(
            "--cache_latents has no effect in pixels: give --pretrained_vae_model_name_or_path, or "
            "drop it."
        )
    scheduler, inference = build_schedulers(args, pixels=pixels, default_vp=default_vp)
    sampler = timesteps.build_sampler(args, scheduler, seed, args.max_train_steps)
    objective = timesteps.build_objective(args, sampler)
    weights = timesteps.build_loss_weights(args, objective)
    learned = timesteps.build_learned_weights(args, objective, seed)
    bound = None
    if args.learned_variance == "vlb":
        with timesteps.usage_errors("--learned_variance vlb"):
            bound = VariationalBound(objective.levels, bins=256 if pixels else None)
    return Levels(inference, sampler, objective, weights, learned, bound)


def show_timesteps(args: argparse.Namespace, default_vp: str) -> None:
    """Show what would be trained on; needs neither data nor models."""
    levels = choose_levels(args, args.seed or 0, default_vp)
    preview = make_preview(
        levels.sampler, levels.weights, args.max_train_steps, inference=levels.inference
    )
    sys.stdout.write(show(preview, args.show_timesteps) + "\n")


def load_data(args: argparse.Namespace, accelerator: Any, seed: int) -> Data:
    """Rows, classes and the order of the samples.

    Raises:
        UsageError: nothing to train on, or samples that cannot be used.
    """
    label_column = getattr(args, "label_column", None)
    columns = {"image_column": args.image_column, "label_column": label_column}
    with accelerator.main_process_first():
        rows = load_images(
            args.dataset_name, args.dataset_config_name, args.train_data_dir, **columns,
            cache_dir=args.cache_dir, max_train_samples=args.max_train_samples, seed=seed,
        )  # fmt: skip
    rows = usable_rows(
        rows, **columns, caption_column=None, policy=args.bad_samples,
        limit=args.bad_samples_limit, output_dir=args.output_dir, resolution=args.resolution,
        progress=accelerator.is_local_main_process, rank=accelerator.process_index,
        world_size=accelerator.num_processes, gather=gather_object,
    )  # fmt: skip
    names = None
    if label_column is not None:
        names = dict(enumerate(rows.features[label_column].names))
    plan = BatchPlan(
        len(rows), args.train_batch_size, args.gradient_accumulation_steps,
        accelerator.num_processes, accelerator.process_index, seed,
    )  # fmt: skip
    return Data(rows, plan, label_column, names)


def load_models(
    args: argparse.Namespace, accelerator: Any, seed: int, levels: Levels, classes: int | None
) -> tuple[ImageRun, parts.ImageModels]:
    """Network, latent space, averages and optimizer: what the step works with, and the models as
    they are without accelerate.

    Raises:
        UsageError: a model that cannot be loaded or does not fit.
    """
    device, dtype = accelerator.device, runtime.frozen_dtype(accelerator)
    # What is encoded once is encoded in full; and the whole pipeline can be saved at any time.
    space = parts.load_space(args)
    kept = space.model
    if space.model is not None:
        half = dtype != torch.float32 and not args.cache_latents
        model = copy.deepcopy(kept).to(dtype) if half else kept
        space = LatentSpace.of(model.to(device))
    network = parts.make_network(args, space, classes, seed)
    with timesteps.usage_errors("--formulation"):
        check_conditioning(network, levels.sampler.levels.timesteps)
    parts.ready(args, network, device)
    averages = parts.make_averages(args, network, device)
    trained = list(network.parameters())
    optimizer = optimization.build_optimizer(args, trained, accelerator.num_processes)
    lr_scheduler = optimization.build_lr_scheduler(args, optimizer, args.max_train_steps)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    run = ImageRun(
        args, accelerator, seed, prepared, space,
        null_class(network) if takes_labels(network) else None,
        levels.sampler, levels.objective, levels.bound,
        None if levels.weights is None else levels.weights.to(device), levels.learned,
        optimizer, FiniteGuard(accelerator, optimizer, args.nonfinite), lr_scheduler, *averages,
    )  # fmt: skip
    return run, parts.ImageModels(network, space, kept)


def image_transform(args: argparse.Namespace) -> ImageTransform:
    """The geometry of the training images."""
    return ImageTransform(
        args.resolution, args.image_interpolation_mode, args.center_crop, args.random_flip
    )


def cached_latents(
    args: argparse.Namespace, accelerator: Any, data: Data, space: LatentSpace
) -> CachedLatents | None:
    """The latents of all images, for --cache_latents.

    Raises:
        UsageError: see :func:`cache_latents`.
    """
    if not args.cache_latents:
        return None
    folder = args.train_data_dir if args.dataset_name is None else None
    fingerprint = {
        "autoencoder": parts.autoencoder_identity(args),
        "data": dataset_digest(data.rows, args.image_column, data.label_column, folder),
    }
    return cache_latents(
        data.rows, space, image_transform(args), fingerprint=fingerprint,
        folder=args.latent_cache_dir or Path(args.output_dir, LATENTS_FOLDER),
        image_column=args.image_column, crops=args.latent_crops, flip=args.random_flip,
        seed=CROP_SEED, batch_size=args.train_batch_size, device=accelerator.device,
        dtype=args.latent_cache_dtype,
        progress=accelerator.is_local_main_process, rank=accelerator.process_index,
        world_size=accelerator.num_processes, wait=accelerator.wait_for_everyone,
    )  # fmt: skip
