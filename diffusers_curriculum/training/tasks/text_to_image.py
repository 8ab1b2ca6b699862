"""Fine-tuning Stable Diffusion on image and caption pairs: diffusers' train_text_to_image.py."""

from __future__ import annotations

import logging

from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
from diffusers_curriculum.training.arguments.flag import (
    NOT_NEGATIVE,
    Family,
    Need,
    count,
    sharing,
    tracked,
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
    YOUNGER_CACHE,
    official,
)
from diffusers_curriculum.training.arguments.subjects import SUBJECTS
from diffusers_curriculum.training.arguments.text_to_image import (
    CAPTIONS,
    CLIP_SCORE,
    DROPOUT,
    MEMORY,
    MODEL,
    NOISE,
    check_clip_score,
)
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.tasks.family import FamilyTask

logger = logging.getLogger(__name__)

_DREAMING = Need("--dream_training", lambda a: a.dream_training)
_PROMPTED = Need("--validation_prompts", lambda a: bool(a.validation_prompts))

_UNET = Family.of(
    "model",
    tracked("non_ema_revision", str, help="deprecated: revision of the UNet; see --variant"),
    setting="model",
)
_PERTURBED = Family.of(
    "objective",
    tracked("input_perturbation", float, 0, "scale of noise on the input only", bound=NOT_NEGATIVE),
    tracked("dream_training", help="train with DREAM (arXiv 2312.00210)"),
    tracked(
        "dream_detail_preservation",
        float,
        1.0,
        "exponent p of DREAM",
        bound=NOT_NEGATIVE,
        needs=(_DREAMING,),
    ),
    setting="objective",
)
_VALIDATION = Family.of(
    "validation",
    tracked("validation_prompts", str, help="prompts drawn from time to time", nargs="+"),
    count("validation_epochs", 5, "epochs between validations"),
    *sharing(CLIP_SCORE, needs=_PROMPTED),
    check_machine=check_clip_score,
)
_INPUT = (MODEL, _UNET, SOURCE, CAPTIONS, *OF_IMAGES)
_TRAINING = (RUN, OPTIMIZER, PREDICTION, NOISE, _PERTURBED, EMA)
_FAMILIAR = (*_INPUT, *_TRAINING, _VALIDATION, *OF_MACHINE, CHECKPOINTS)


class TextToImage(FamilyTask):
    """All of a Stable Diffusion UNet."""

    command_line = CommandLine(
        "Fine-tune Stable Diffusion with a timestep curriculum and importance sampling.",
        (*_FAMILIAR, *SUBJECTS, *NOISE_LEVELS, SLOWED, DROPOUT, LATENT_CACHE, MEMORY, LOOP),
        official=official(_FAMILIAR),
        changes={
            "offload": {"name": "offload_models"},  # --offload is short for an official flag
            "output_dir": {"default": "sd-model-finetuned"},
            "tracker_project_name": {"default": "text2image-fine-tune"},
            "validation_steps": {"needs": (_PROMPTED,)},
            **YOUNGER_CACHE,
        },
    )

    def check(self, args: Arguments) -> None:
        if "non_ema_revision" in args.given:
            logger.warning("--non_ema_revision is deprecated: use --variant=non_ema instead.")
        else:
            args.non_ema_revision = args.revision

    def choose_levels(self, args: Arguments, seed: int) -> Levels:
        levels = super().choose_levels(args, seed)
        kind = levels.objective.prediction_type
        if args.dream_training and kind != "epsilon":
            raise UsageError(
                f"--dream_training needs an epsilon model, and this one predicts {kind!r}: leave "
                "it out or pass --prediction_type epsilon."
            )
        return levels
