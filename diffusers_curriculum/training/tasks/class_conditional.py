"""Training a class-conditional DiT or U-Net; flags are named as in diffusers' scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.classes import (
    GUIDANCE,
    LABEL_COLUMN,
    LABEL_DROPOUT,
    OF_CLASSES,
    PICTURE_EPOCHS,
)
from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
from diffusers_curriculum.training.arguments.evaluation import EVALUATION
from diffusers_curriculum.training.arguments.flag import LEVELS, Family, count, place, sharing
from diffusers_curriculum.training.arguments.images import (
    AUTOENCODED,
    AUTOENCODER,
    DDPM,
    FORMULATION,
    PICTURES,
    POWER_EMA,
    PROCESS,
    network,
    pictures,
)
from diffusers_curriculum.training.arguments.noise_levels import PREDICTION, SLOWED
from diffusers_curriculum.training.arguments.run import (
    CHECKPOINTS,
    EMA,
    LATENT_CACHE,
    LOOP,
    OF_IMAGES,
    OF_MACHINE,
    OPTIMIZER,
    RUN,
    SOURCE,
    official,
)
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.task import JobParts
from diffusers_curriculum.training.tasks.images import ImageTask

_WANTED = "a folder of images with one sub-folder per class"
_MODEL = network(
    place(
        "model_config",
        help="network to train from scratch: DiT-S/2 ... DiT-XL/8, UNet, or a config file, folder "
        "or Hub repository of a DiTTransformer2DModel or UNet2DModel",
    ),
    "class-conditional",
)
_LABELS = Family.of(
    "data",
    LABEL_COLUMN,
    LABEL_DROPOUT,
    check_machine=lambda args: environment.check_data(args, _WANTED),
)
_PICTURES = pictures(
    *sharing(*OF_CLASSES, needs=PICTURES),
    GUIDANCE,
    *sharing(
        count("validation_inference_steps", 50, "denoising steps per picture", most=LEVELS),
        PICTURE_EPOCHS,
        needs=PICTURES,
    ),
    sampler="DDIMScheduler",
)
# Named as in diffusers' scripts, whose abbreviations go on working.
_TRAINING = (RUN, OPTIMIZER, EMA, *OF_MACHINE, CHECKPOINTS)
_INPUT = (_MODEL, SOURCE, _LABELS, *OF_IMAGES, AUTOENCODER, LATENT_CACHE)
_FAMILIAR = (*_INPUT, *_TRAINING)
_LEVELS = (PREDICTION, PROCESS, FORMULATION, *NOISE_LEVELS, SLOWED)


class ClassConditional(ImageTask):
    """Images and their classes, with labels left out now and then."""

    command_line = CommandLine(
        "Train a class-conditional DiT or U-Net with a curriculum over noise levels and importance "
        "sampling.",
        (*_FAMILIAR, *_LEVELS, POWER_EMA, _PICTURES, EVALUATION, LOOP),
        official=official(_FAMILIAR),
        changes={
            "output_dir": {"default": "class-conditional-model"},
            "tracker_project_name": {"default": "class-conditional"},
            "resolution": {"default": 256},
            "adam_weight_decay": {"default": 0.0},
            "prediction_type": {"needs": (DDPM,)},
            "cache_latents": {"needs": (AUTOENCODED,)},
            "validation_steps": {"needs": (PICTURES,)},
        },
    )
    default_vp = "DDIMScheduler"

    def check(self, args: Arguments) -> None:
        if args.model_config is None and args.pretrained_model_name_or_path is None:
            raise UsageError(
                "neither --model_config nor --pretrained_model_name_or_path is given: name a "
                "network to train from scratch, such as --model_config DiT-B/2, or a pipeline to "
                "go on from."
            )

    @property
    def text_columns(self) -> Mapping[str, str]:
        return {"label_column": self.args.label_column}

    @property
    def guidance_scale(self) -> float:
        return self.args.guidance_scale

    def facts(self, job: JobParts) -> dict[str, Any]:
        self.know_classes(job)
        return super().facts(job)

    def dataset_options(self, args: Arguments) -> dict[str, Any]:
        return {
            **self.text_columns,
            "label_dropout": args.label_dropout,
            "null_label": self.null_label or 0,
        }
