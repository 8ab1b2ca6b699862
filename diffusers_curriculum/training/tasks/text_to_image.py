"""Fine-tuning Stable Diffusion on image and caption pairs: diffusers' train_text_to_image.py."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
from diffusers_curriculum.training.arguments.flag import (
    NOT_NEGATIVE,
    SHARE,
    Family,
    Need,
    count,
    place,
    tracked,
)
from diffusers_curriculum.training.arguments.noise_levels import PREDICTION, SLOWED
from diffusers_curriculum.training.arguments.run import (
    CHECKPOINTS,
    EMA,
    LOOP,
    OF_IMAGES,
    OF_MACHINE,
    OPTIMIZER,
    RUN,
    SOURCE,
    official,
)
from diffusers_curriculum.training.data.columns import warn_of_long_captions
from diffusers_curriculum.training.data.dataset import ImageCaptionDataset
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.run import LevelRun
from diffusers_curriculum.training.loop.task import JobParts, Trained
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import ModelFamily, families
from diffusers_curriculum.training.parts.fit import check_parts, check_tokenizers
from diffusers_curriculum.training.process.runtime import frozen_dtype
from diffusers_curriculum.training.publish.text_to_image import TextToImagePublisher
from diffusers_curriculum.training.storage.fingerprints import model_identity
from diffusers_curriculum.training.tasks.levels import ImageLevelTask, check_slowed

logger = logging.getLogger(__name__)

_WANTED = "a folder of images and a metadata file (metadata.jsonl or metadata.csv) of captions"
_DREAMING = Need("--dream_training", lambda a: a.dream_training)
_PROMPTED = Need("--validation_prompts", lambda a: bool(a.validation_prompts))

_MODEL = Family.of(
    "model",
    place(
        "pretrained_model_name_or_path",
        help="pipeline to fine-tune: a repository on the Hub or a local folder",
        required=True,
    ),
    tracked("revision", str, help="branch, tag or commit of that repository"),
    tracked("variant", str, help="variant of its weight files, such as fp16"),
    tracked("non_ema_revision", str, help="deprecated: revision of the UNet; see --variant"),
    setting="model",
    check_machine=lambda args: environment.check_folder(
        args, "pretrained_model_name_or_path", "a saved pipeline"
    ),
)
_CAPTIONS = Family.of(
    "data",
    tracked("caption_column", str, "text", "column with the captions", setting="dataset"),
    check_machine=lambda args: environment.check_data(args, _WANTED),
)
_NOISE = Family.of(
    "objective",
    tracked("noise_offset", float, 0, "scale of noise shared by a channel", bound=NOT_NEGATIVE),
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
)
_DROPOUT = Family.of(
    "further options",
    tracked(
        "caption_dropout", float, 0.0, "share of captions left empty", bound=SHARE, setting="images"
    ),
)
_INPUT = (_MODEL, SOURCE, _CAPTIONS, *OF_IMAGES)
_TRAINING = (RUN, OPTIMIZER, PREDICTION, _NOISE, EMA)
_FAMILIAR = (*_INPUT, *_TRAINING, _VALIDATION, *OF_MACHINE, CHECKPOINTS)


@dataclass(kw_only=True)
class TextToImageRun(LevelRun):
    """What the step works with."""

    family: ModelFamily
    models: Components


class TextToImage(ImageLevelTask):
    """Stable Diffusion, in the latents of its autoencoder, with captions."""

    family: ModelFamily  # of the models, once levels are chosen

    command_line = CommandLine(
        "Fine-tune Stable Diffusion with a timestep curriculum and importance sampling.",
        (*_FAMILIAR, *NOISE_LEVELS, SLOWED, _DROPOUT, LOOP),
        official=official(_FAMILIAR),
        changes={
            "output_dir": {"default": "sd-model-finetuned"},
            "tracker_project_name": {"default": "text2image-fine-tune"},
            "validation_steps": {"needs": (_PROMPTED,)},
        },
    )

    def check(self, args: Arguments) -> None:
        if "non_ema_revision" in args.given:
            logger.warning("--non_ema_revision is deprecated: use --variant=non_ema instead.")
        else:
            args.non_ema_revision = args.revision

    def family_of(self, args: Arguments) -> ModelFamily:
        """The family of the models that are trained."""
        return families()["sd"]

    def choose(self, args: Arguments, seed: int) -> None:
        family = self.family = self.family_of(args)
        check_parts(family, args)
        super().choose(args, seed)
        family.check_variant(args)
        self.tokenizers = family.load_tokenizers(args)
        check_tokenizers(family, args, self.tokenizers)

    def choose_levels(self, args: Arguments, seed: int) -> Levels:
        levels = Levels.of(args, *self.family_of(args).load_schedulers(args), seed)
        kind = levels.objective.prediction_type
        if args.dream_training and kind != "epsilon":
            raise UsageError(
                f"--dream_training needs an epsilon model, and this one predicts {kind!r}: leave "
                "it out or pass --prediction_type epsilon."
            )
        check_slowed(args, levels)
        if args.timestep_sampler == "information_rate" and args.noise_offset:
            logger.warning(
                "--timestep_sampler information_rate beside --noise_offset %s: the offset adds an "
                "error that is no information, and the law follows it; leave one of the two out",
                args.noise_offset,
            )
        return levels

    @property
    def text_columns(self) -> Mapping[str, str]:
        return {"caption_column": self.args.caption_column}

    def model_facts(self, args: Arguments) -> dict[str, Any]:
        return model_identity(args.pretrained_model_name_or_path, args.revision, args.variant)

    def publisher(self, job: JobParts) -> TextToImagePublisher:
        self.published = TextToImagePublisher(
            job.args, job.accelerator, self.levels, job.plan, self.family
        )
        return self.published

    def load(self, job: JobParts) -> Trained:
        args, device, family = job.args, job.accelerator.device, self.family
        if job.accelerator.is_main_process:
            longest = max(self.tokenizers.values(), key=lambda each: each.model_max_length)
            warn_of_long_captions(job.rows, args.caption_column, longest)
        dtype = frozen_dtype(job.accelerator)
        self.models = family.load_components(args, self.tokenizers, device, dtype)
        network = self.models.network
        source = family.load_averaged(args) if args.use_ema else None
        averages = Averages(network).with_ema(args, device, source)
        self.published.models, self.published.averages = self.models, averages
        return Trained(network, family.network, averages)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        vae, family = self.models.vae, self.family
        with torch.no_grad():
            mean, std = family.posterior(vae, pixels)
            zero = family.latents(vae, torch.zeros_like(std))
            return family.latents(vae, mean), family.latents(vae, std) - zero

    def make_run(self, job: JobParts, **common: Any) -> TextToImageRun:
        return TextToImageRun(**common, levels=self.levels, family=self.family, models=self.models)

    def dataset(self, job: JobParts) -> ImageCaptionDataset:
        return ImageCaptionDataset(
            job.rows,
            job.plan,
            partial(self.family.tokenize, self.tokenizers),
            self.transform(),
            image_column=job.args.image_column,
            **self.text_columns,
            caption_dropout=job.args.caption_dropout,
        )
