"""Fine-tuning Stable Diffusion by LoRA: diffusers' train_text_to_image_lora.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffusers_curriculum.training.arguments.adapters import LORA
from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
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
    YOUNGER_CACHE,
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
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.task import JobParts
from diffusers_curriculum.training.parts.adapters import FOLDER, add_adapters, check_adapter
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.parts.fit import part_config
from diffusers_curriculum.training.parts.quantization import quantization_facts, quantized
from diffusers_curriculum.training.publish.adapters import AdapterPublisher
from diffusers_curriculum.training.storage.fingerprints import weights_identity
from diffusers_curriculum.training.tasks.family import FamilyTask

_INPUT = (MODEL, SOURCE, CAPTIONS, *OF_IMAGES)
_FAMILIAR = (*_INPUT, RUN, OPTIMIZER, PREDICTION, NOISE, PICTURES, *OF_MACHINE, CHECKPOINTS)
_AROUND = (EMA, DROPOUT, LATENT_CACHE, MEMORY)
_NOT_OFFICIAL = ("tracker_project_name", "untrained_timestep")


class AdapterTask(FamilyTask):
    """An adapter in the network of any family, which stays as it is."""

    is_adapted = True

    def choose(self, args: Arguments, seed: int) -> None:
        super().choose(args, seed)
        family = self.family
        kind, config = family.part_class(family.network), part_config(family, args, family.network)
        targets = args.lora_target_modules or family.adapter_targets(config)
        args.lora_target_modules = list(targets)
        modules = (f"{family.network}.{name}" for name in check_adapter(args, kind, config))
        unnamed = (name for name in modules if family.kohya_name(name, config) is None)
        if args.save_format == "kohya" and (module := next(unnamed, None)):
            raise UsageError(
                f"--save_format kohya: what kohya's trainer calls {module} is not known here, of "
                f"{family.title}; use --save_format diffusers."
            )

    def model_facts(self, args: Arguments) -> dict[str, Any]:
        base = weights_identity(args.pretrained_model_name_or_path, self.family.network)
        return super().model_facts(args) | base | quantization_facts(args)

    def network_settings(self, args: Arguments, dtype: torch.dtype) -> dict[str, Any]:
        return quantized(args, dtype)

    def publisher(self, job: JobParts) -> AdapterPublisher:
        self.published = AdapterPublisher(
            job.args, job.accelerator, self.levels, job.plan, self.family
        )
        return self.published

    def targets(self, args: Arguments) -> Mapping[str, Sequence[str]]:
        """Modules that get adapters, by the names of their parts."""
        return {self.family.network: args.lora_target_modules}

    def averages(self, job: JobParts) -> tuple[str, Averages]:
        args, models = job.args, self.models
        networks = {self.family.network: models.network, **models.encoders}
        averages = Averages(add_adapters(args, networks, self.targets(args), job.seed))
        return FOLDER, averages.with_ema(args, job.accelerator.device)


class TextToImageLora(AdapterTask):
    """An adapter in a Stable Diffusion UNet."""

    command_line = CommandLine(
        "Fine-tune Stable Diffusion by LoRA with a timestep curriculum and importance sampling.",
        (*_FAMILIAR, *SUBJECTS, LORA, *_AROUND, *NOISE_LEVELS, SLOWED, LOOP),
        official=f"{official(_FAMILIAR, without=_NOT_OFFICIAL)} rank",
        changes={
            "output_dir": {"default": "sd-model-finetuned-lora"},
            "tracker_project_name": {"default": "text2image-fine-tune"},
            "validation_steps": {"needs": (PROMPTED,)},
            **YOUNGER_CACHE,
        },
    )

    def check(self, args: Arguments) -> None:
        args.non_ema_revision = args.revision  # the script has no flag for it
