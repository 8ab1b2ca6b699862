"""Fine-tuning Stable Diffusion XL by LoRA: diffusers' train_text_to_image_lora_sdxl.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from diffusers_curriculum.training.arguments.adapters import LORA, TEXT_ENCODERS
from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
from diffusers_curriculum.training.arguments.flag import Need
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
from diffusers_curriculum.training.loop.task import JobParts, Trained
from diffusers_curriculum.training.parts.adapters import check_text_adapters
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import Conditioning
from diffusers_curriculum.training.parts.families.sdxl import StableDiffusionXL
from diffusers_curriculum.training.parts.fit import part_config
from diffusers_curriculum.training.tasks.text_to_image_lora import AdapterTask
from diffusers_curriculum.training.tasks.text_to_image_sdxl import OWN_VAE, TextToImageSDXL

_FROZEN_TEXT = Need(
    "text encoders as they are (drop --train_text_encoder)", lambda a: not a.train_text_encoder
)
_INPUT = (MODEL, AUTOENCODER, SOURCE, CAPTIONS, *OF_IMAGES)
_FAMILIAR = (*_INPUT, RUN, OPTIMIZER, PREDICTION, NOISE, PICTURES, *OF_MACHINE, CHECKPOINTS)
_NOT_OFFICIAL = ("tracker_project_name", "untrained_timestep")


class CaptionedNetwork(nn.Module):
    """A network and the text encoders that are trained with it, as one module: gradients of all are
    reduced among processes together.

    Args:
        trained: names of the encoders.
    """

    def __init__(self, family: StableDiffusionXL, models: Components, trained: Sequence[str]):
        super().__init__()
        self.family, self.models, self.network = family, models, models.network
        self.encoders = nn.ModuleDict({name: models.encoders[name] for name in trained})

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction for noisy latents at timesteps (B,), from tokens where encoders are
        trained, and else from what they said."""
        if self.encoders:
            conditioning = conditioning | self.family.encode_text(self.models, conditioning)
        return self.family.predict(self.network, noisy, timesteps, conditioning)


class TextToImageLoraSDXL(AdapterTask, TextToImageSDXL):
    """An adapter in a Stable Diffusion XL UNet, and in its text encoders if asked for."""

    family: StableDiffusionXL

    command_line = CommandLine(
        "Fine-tune Stable Diffusion XL by LoRA with a timestep curriculum and importance sampling.",
        (
            *_FAMILIAR,
            *SUBJECTS,
            LORA,
            TEXT_ENCODERS,
            EMA,
            *NOISE_LEVELS,
            SLOWED,
            DROPOUT,
            LATENT_CACHE,
            MEMORY,
            LOOP,
        ),
        official=f"{official(_FAMILIAR, without=_NOT_OFFICIAL)} rank train_text_encoder",
        changes={
            "output_dir": {"default": "sd-model-finetuned-lora"},
            "tracker_project_name": {"default": "text2image-fine-tune"},
            "resolution": {"default": 1024},
            "pretrained_vae_model_name_or_path": {"help": OWN_VAE},
            "validation_steps": {"needs": (PROMPTED,)},
            "cache_text_embeddings": {"needs": (_FROZEN_TEXT,)},
        },
    )

    def choose(self, args: Arguments, seed: int) -> None:
        if args.train_text_encoder:
            check_text_adapters()
        super().choose(args, seed)

    def targets(self, args: Arguments) -> Mapping[str, Sequence[str]]:
        family, found = self.family, {**super().targets(args)}
        for name in family.encoders if args.train_text_encoder else ():
            found[name] = family.encoder_targets(name, part_config(family, args, name))
        return found

    def load(self, job: JobParts) -> Trained:
        trained, args = super().load(job), job.args
        encoders = self.models.encoders if args.train_text_encoder else {}
        for encoder in encoders.values():
            encoder.train()
            if args.gradient_checkpointing:
                new_name = getattr(encoder, "activation_checkpointing_enable", None)
                (new_name or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
        network = CaptionedNetwork(self.family, self.models, [*encoders])
        return trained._replace(network=network)
