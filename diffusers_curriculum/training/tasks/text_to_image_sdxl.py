"""Fine-tuning Stable Diffusion XL: diffusers' train_text_to_image_sdxl.py."""

from __future__ import annotations

from typing import Any

from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
from diffusers_curriculum.training.arguments.images import AUTOENCODER
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
from diffusers_curriculum.training.arguments.subjects import SUBJECTS
from diffusers_curriculum.training.arguments.text_to_image import (
    CAPTIONS,
    DROPOUT,
    MEMORY,
    MODEL,
    NOISE,
    PICTURES,
    PROMPTED,
)
from diffusers_curriculum.training.loop.task import JobParts
from diffusers_curriculum.training.parts.families.base import ModelFamily, families
from diffusers_curriculum.training.parts.images import autoencoder_identity
from diffusers_curriculum.training.publish.text_to_image import OnePromptPublisher
from diffusers_curriculum.training.tasks.family import FamilyTask

_INPUT = (MODEL, AUTOENCODER, SOURCE, CAPTIONS, *OF_IMAGES)
_TRAINING = (RUN, OPTIMIZER, PREDICTION, NOISE, EMA, DROPOUT)
_FAMILIAR = (*_INPUT, *_TRAINING, PICTURES, *OF_MACHINE, CHECKPOINTS)
# What diffusers' script for Stable Diffusion has, and this one lacks
_NOT_OFFICIAL = "caption_dropout offload_ema foreach_ema tracker_project_name untrained_timestep"
OWN_VAE = (
    "AutoencoderKL to train and to draw with: a repository on the Hub or a folder (default: the "
)
OWN_VAE += "pipeline's own)"
_BIAS = [f"timestep_bias_{name}" for name in ("strategy", "multiplier", "begin", "end", "portion")]


class TextToImageSDXL(FamilyTask):
    """All of a Stable Diffusion XL UNet."""

    command_line = CommandLine(
        "Fine-tune Stable Diffusion XL with a timestep curriculum and importance sampling.",
        (*_FAMILIAR, *SUBJECTS, *NOISE_LEVELS, SLOWED, LATENT_CACHE, MEMORY, LOOP),
        official=" ".join(
            (official(_FAMILIAR, without=_NOT_OFFICIAL.split()), "proportion_empty_prompts", *_BIAS)
        ),
        changes={
            "output_dir": {"default": "sdxl-model-finetuned"},
            "tracker_project_name": {"default": "text2image-fine-tune-sdxl"},
            "resolution": {"default": 1024},
            "caption_dropout": {"name": "proportion_empty_prompts", "default": 0},
            "pretrained_vae_model_name_or_path": {"help": OWN_VAE},
            "validation_steps": {"needs": (PROMPTED,)},
        },
    )

    def family_of(self, args: Arguments) -> ModelFamily:
        return families()["sdxl"]

    def model_facts(self, args: Arguments) -> dict[str, Any]:
        return super().model_facts(args) | {"autoencoder": autoencoder_identity(args)}

    def publisher(self, job: JobParts) -> OnePromptPublisher:
        self.published = OnePromptPublisher(
            job.args, job.accelerator, self.levels, job.plan, self.family
        )
        return self.published
