"""What training a ViT-VQGAN asks for: its flags, its model and critic, what a step works with."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vqgan_losses import Adversary, ReconstructionLoss
from vqgan_monitor import ReconstructionMonitor
from vqgan_results import Results

from diffusers_curriculum.models.loading import load_model
from diffusers_curriculum.models.vit_vq import VIT_VQ_SIZES, ViTVQModel, vit_vq_config
from diffusers_curriculum.randomness import host_generator, key
from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.flag import (
    COUNT,
    FROM_ZERO,
    NOT_NEGATIVE,
    Family,
    Need,
    pairs,
    path,
    tracked,
)
from diffusers_curriculum.training.arguments.output import OUTPUT
from diffusers_curriculum.training.arguments.run import (
    CHECKPOINTS,
    IMAGES,
    LOADING,
    LOOP,
    OPTIMIZER,
    PRECISION,
    RUN,
    SAMPLES,
    SOURCE,
)
from diffusers_curriculum.training.arguments.validation import HELD_OUT, KEPT_APART
from diffusers_curriculum.training.checkpoint.same_run import dataset_facts, run_facts
from diffusers_curriculum.training.data.bad_samples import usable_held_out, usable_images
from diffusers_curriculum.training.data.dataset import ImageDataset
from diffusers_curriculum.training.data.shards import shards_of
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.run import Run
from diffusers_curriculum.training.loop.task import JobParts, Task, Trained
from diffusers_curriculum.training.parts.averages import Averages

_COMPARED = Need("--perceptual_model", lambda a: a.perceptual_model is not None)
_CRITIC = Need("an --adversarial_weight above 0", lambda a: a.adversarial_weight > 0)
_FRESH = Need(
    "a fresh model (drop --pretrained_model_name_or_path, which brings its own config)",
    lambda a: a.pretrained_model_name_or_path is None,
)


def _check_losses(args: Arguments) -> None:
    if not (args.l2_weight or args.logit_laplace_weight or args.perceptual_model):
        raise UsageError("nothing is reconstructed: give --l2_weight or --logit_laplace_weight.")


_DATA = Family.of(
    "data", check_machine=lambda args: environment.check_data(args, "a folder of images")
)
_MODEL = Family.of(
    "model",
    tracked(
        "pretrained_model_name_or_path",
        str,
        help="ViTVQModel to go on from: folder or Hub id",
        convert=path,
    ),
    tracked(
        "model_config",
        str,
        help=f"{', '.join(VIT_VQ_SIZES)}, or a JSON file with ViTVQModel's arguments",
        convert=path,
        needs=(_FRESH,),
    ),
    pairs("model_args", "changes to --model_config", needs=(_FRESH,)),
    setting="model",
)
_LOSSES = Family.of(
    "losses",
    tracked("l2_weight", float, 1.0, "weight of the squared error", bound=NOT_NEGATIVE),
    tracked(
        "logit_laplace_weight", float, 0.0, "weight of the logit-Laplace loss", bound=NOT_NEGATIVE
    ),
    tracked(
        "perceptual_model",
        str,
        help="vision model of transformers whose features are compared",
        convert=path,
    ),
    tracked(
        "perceptual_weight",
        float,
        0.1,
        "weight of their distance",
        bound=NOT_NEGATIVE,
        needs=(_COMPARED,),
    ),
    tracked("adversarial_weight", float, 0.1, "weight of the critic; 0: none", bound=NOT_NEGATIVE),
    tracked(
        "discriminator_start",
        int,
        0,
        "first step with the critic",
        bound=FROM_ZERO,
        needs=(_CRITIC,),
    ),
    tracked(
        "discriminator_width", int, 64, "its channels at full resolution", bound=COUNT, most=1024
    ),
    tracked(
        "discriminator_learning_rate",
        float,
        help="default: --learning_rate",
        bound=NOT_NEGATIVE,
        needs=(_CRITIC,),
        setting="optimizer",
    ),
    tracked("r1_gamma", float, 10.0, "weight of the critic's gradient penalty", bound=NOT_NEGATIVE),
    tracked("r1_interval", int, 16, "steps between penalties", bound=COUNT),
    tracked(
        "codebook_patience",
        int,
        100,
        "steps after which an unused code is revived; 0: never",
        bound=FROM_ZERO,
    ),
    setting="objective",
    check=_check_losses,
)
_MEASURES = Family.of(
    "further options",
    tracked("measure_samples", int, 10_000, "images that the latents' scale is of", bound=COUNT),
    tracked(
        "latent_scale",
        str,
        "rms",
        "which of the two scaling_factor makes 1; they differ where the mean is not 0",
        choices=("rms", "std"),
    ),
)
_FAMILIAR = (
    SOURCE,
    _DATA,
    IMAGES,
    LOADING,
    SAMPLES,
    HELD_OUT,
    RUN,
    OPTIMIZER,
    PRECISION,
    OUTPUT,
    CHECKPOINTS,
)
_OURS = "train_split background bad_samples bad_samples_limit validation_split allow_config_change"
_OURS += " overwrite_output_dir lr_num_cycles lr_power lr_end"
SETTINGS = ("seed", "global_batch", "dataset", "model", "objective", "images", "optimizer")
SETTINGS += ("imports",)


class Reconstructions(NamedTuple):
    """The outcome of a micro-batch.

    Attributes:
        loss: (1,) of the autoencoder, as it was differentiated.
        losses: the same.
        parts: (1, K) what it is made of, by ``VQGANRun.names``; NaN for what is not computed yet.
        codes: (B, h, w) of the images.
        latents: (B, C, h, w) before they were replaced by codes.
    """

    loss: Tensor
    losses: Tensor
    parts: Tensor
    codes: Tensor
    latents: Tensor


@dataclass(kw_only=True)
class VQGANRun(Run):
    """What the step works with.

    Attributes:
        loss: the distances of reconstructions to their images.
        adversary: the critic, None for none.
        names: of the losses that are told.
        revived: codes that the last update revived.
    """

    loss: ReconstructionLoss
    adversary: Adversary | None
    names: tuple[str, ...]
    revived: Tensor

    def critic(self, step: int) -> Adversary | None:
        """The critic, once it takes part."""
        return self.adversary if step >= self.args.discriminator_start else None

    def outcome(self, losses: dict[str, Tensor], codes: Tensor, latents: Tensor) -> Reconstructions:
        """What a step returns of its named losses, codes and latents."""
        nothing = torch.full_like(losses["loss"], torch.nan)
        parts = torch.stack([losses.get(name, nothing) for name in self.names])
        loss = losses["loss"].reshape(1)
        return Reconstructions(loss, loss, parts[None], codes, latents.detach())

    def update(self, step: int, observed: Any, norm: Tensor | None) -> None:
        super().update(step, observed, norm)
        critic = self.critic(step)
        if critic is not None:
            critic.step()

    def observe(self, step: int, outcome: Reconstructions) -> None:
        """Count the codes that were used, and revive those that were not for long."""
        quantiser = self.averages.network.quantise
        quantiser.observe(outcome.codes, self.guard.left_out)
        self.revived = torch.zeros_like(self.revived)
        if self.args.codebook_patience:
            vectors = outcome.latents.permute(0, 2, 3, 1)
            choice = host_generator(self.seed, step, purpose="revive")
            self.revived = quantiser.revive(vectors, choice, self.args.codebook_patience)


class VQGAN(Task):
    """A ViT-VQGAN (arXiv 2110.04627), the autoencoder whose latents a diffusion model learns."""

    command_line = CommandLine(
        "Train ViT-VQGAN (arXiv 2110.04627) on images.",
        (*_FAMILIAR, _MODEL, _LOSSES, _MEASURES, LOOP),
        official=" ".join(
            f.name for family in _FAMILIAR for f in family.flags if f.name not in _OURS.split()
        ),
        changes={
            "output_dir": {"default": "vit-vqgan"},
            "tracker_project_name": {"default": "vit-vqgan"},
            "resolution": {"default": 256},
            "allow_config_change": {
                "choices": SETTINGS,
                "help": f"settings that may differ from the run to resume: {', '.join(SETTINGS)}",
            },
            "validation_steps": {
                "help": "optimizer steps between validations (default: at the end)",
                "needs": (KEPT_APART,),
            },
        },
    )

    def check(self, args: Arguments) -> None:
        self.model_config = _model_config(args)

    def check_engine(self, sharded: bool) -> None:
        if sharded:
            raise UsageError(
                "the codes and the critic of an autoencoder cannot lie in the shards of FSDP2: "
                "train it by plain data parallelism (unset ACCELERATE_USE_FSDP)."
            )

    def load_rows(self, args: Arguments, seed: int) -> Any:
        from diffusers_curriculum.training.data.rows import read_rows

        training, self.held_out = read_rows(args, seed)
        return training

    def usable_rows(self, args: Arguments, accelerator: Any, rows: Any) -> Any:
        if self.held_out is not None:
            self.held_out = usable_held_out(args, accelerator, self.held_out)
        rows = usable_images(args, accelerator, rows)
        if args.streaming:
            self.shards = shards_of(rows, args.image_column, args.shuffle_buffer)
        return rows

    def facts(self, job: JobParts) -> dict[str, Any]:
        """The model is built for them, as its config tells it."""
        self.model = build_model(job.args, self.model_config, job.seed)
        self.model.to(job.accelerator.device)
        # the scale is measured at the end, and the rest tells versions and folders
        config = dict(self.model.config)
        model = {k: v for k, v in config.items() if k[0] != "_" and k != "scaling_factor"}
        return run_facts(job.args, job.plan, dataset_facts(job.args, job.rows, None), model)

    def publisher(self, job: JobParts) -> Results:
        return Results(job.args, job.accelerator, self.model, job.rows, self.held_out, job.plan)

    def load(self, job: JobParts) -> Trained:
        return Trained(self.model, "vit_vq", Averages(self.model))

    def make_run(self, job: JobParts, **common: Any) -> VQGANRun:
        args, device = job.args, job.accelerator.device
        loss = ReconstructionLoss(args, device)
        self.adversary = None
        if args.adversarial_weight:
            self.adversary = Adversary(args, job.accelerator, job.seed)
        more = ("adversarial", "discriminator") if self.adversary else ()
        revived = torch.zeros((), dtype=torch.int64, device=device)
        return VQGANRun(
            **common,
            loss=loss,
            adversary=self.adversary,
            names=("loss", *loss.names, "codebook", *more),
            revived=revived,
        )

    def monitor(self, job: JobParts) -> ReconstructionMonitor:
        return ReconstructionMonitor(
            job.run, job.args.max_train_steps, job.args.log_every, job.plan
        )

    def parts(self, job: JobParts) -> dict[str, Any]:
        return {"critic": self.adversary} if self.adversary else {}

    def dataset(self, job: JobParts) -> ImageDataset:
        transform = ImageTransform.of(job.args)
        return ImageDataset(job.rows, job.plan, transform, image_column=job.args.image_column)


def build_model(args: Arguments, config: dict[str, Any], seed: int) -> ViTVQModel:
    """A fresh model, the same at every start, or a saved one.

    Raises:
        UsageError: it cannot be built or loaded, or takes other images.
    """
    try:
        if args.pretrained_model_name_or_path is None:
            torch.manual_seed(key(seed, purpose="model_weights") >> 65)
            model: Any = ViTVQModel(**config)
        else:
            name = args.pretrained_model_name_or_path
            model = load_model(ViTVQModel, name, cache_dir=args.cache_dir)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"the model cannot be built: {error}") from error
    if model.config.image_size != args.resolution or model.config.in_channels != 3:
        raise UsageError(
            f"--resolution is {args.resolution}, but the model takes {model.config.in_channels} x "
            f"{model.config.image_size} x {model.config.image_size} pixels: make them agree."
        )
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def _model_config(args: Arguments) -> dict[str, Any]:
    """Arguments of the model to build; those of a pretrained one are read with it."""
    if args.pretrained_model_name_or_path is not None:
        return {}
    known = set(inspect.signature(ViTVQModel.__init__).parameters) - {"self"}
    name = args.model_config
    if name is None or name in VIT_VQ_SIZES:
        config = vit_vq_config(name or "small", args.resolution) | args.model_args
    else:
        config = {"image_size": args.resolution} | _read_config(name) | args.model_args
    unknown = sorted(config.keys() - known)
    if unknown:
        raise UsageError(f"the model has no argument {unknown[0]!r}; it has {', '.join(known)}.")
    return config


def _read_config(name: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--model_config is {name!r}: it is none of {', '.join(VIT_VQ_SIZES)} and cannot be "
            f"read as JSON ({error})."
        ) from error
    if not isinstance(config, dict):
        raise UsageError(f"--model_config {name!r} must hold a JSON object.")
    return {key: value for key, value in config.items() if not key.startswith("_")}
