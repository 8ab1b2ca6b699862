"""Pictures and pipeline of a text-to-image run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import nn

from diffusers_curriculum.metrics.clip_score import ClipScore
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.errors import UsageError, usage_errors
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.levels.sampling import with_prediction_type
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import ModelFamily
from diffusers_curriculum.training.process.memory import lent
from diffusers_curriculum.training.process.runtime import frozen_dtype
from diffusers_curriculum.training.publish.card import TAGS, CardFacts
from diffusers_curriculum.training.publish.metrics_record import MetricsRecord
from diffusers_curriculum.training.publish.pictures import decoding_precisely, evaluation_mode
from diffusers_curriculum.training.publish.publisher import PipelinePublisher

# training_utils takes seconds to import, which a wrong command line should not have to wait for: it
# is imported where it is used.

logger = logging.getLogger(__name__)

CLIP_FILE = "clip_score.jsonl"
INFERENCE_STEPS = 20  # as in diffusers' train_text_to_image.py
ONE_PROMPT_STEPS = 25  # as in diffusers' train_text_to_image_sdxl.py


class TextToImagePublisher(PipelinePublisher):
    """Publishes a text-to-image pipeline; one picture for each validation prompt.

    Args:
        family: of the models; for the rest see :class:`PipelinePublisher`.

    Attributes:
        models: put in once they are loaded.

    Raises:
        HubError: the name or licence is not acceptable, or the Hub refused.
        UsageError: pictures are wanted that the pipeline's scheduler cannot draw.
    """

    prompt_flag: ClassVar[str] = "validation_prompts"
    steps: ClassVar[int] = INFERENCE_STEPS  # of denoising
    models: Components

    def __init__(
        self,
        args: Arguments,
        accelerator: Any,
        levels: Levels,
        plan: BatchPlan,
        family: ModelFamily,
    ) -> None:
        self.family, self.clip_score = family, None
        super().__init__(args, accelerator, levels, plan)
        if args.validation_clip_score is not None and accelerator.is_main_process:
            with usage_errors("--validation_clip_score"):
                self.clip_score = ClipScore(args.validation_clip_score)

    @property
    def captions(self) -> Sequence[str]:
        return self.args.validation_prompts or []

    def _check_sampling(self) -> None:
        with usage_errors("--prediction_type"):
            scheduler = self._scheduler()
        fault = self.family.sampling_fault(scheduler)
        if fault is None:
            return
        problem = (
            f"{type(scheduler).__name__}, the scheduler of --pretrained_model_name_or_path, cannot "
            f"draw pictures for {self._prediction_type!r} in a {self.family.pipeline} ({fault})"
        )
        if self.captions:
            raise UsageError(
                f"{problem}: save the pipeline with another scheduler, or leave out "
                f"--{self.prompt_flag}."
            )
        logger.warning("%s; the saved pipeline will need another one", problem)

    def _facts(self) -> CardFacts:
        return replace(super()._facts(), tags=(*self.family.tags, "text-to-image", *TAGS))

    @property
    def _prediction_type(self) -> str:
        return self.levels.objective.prediction_type

    def _scheduler(self) -> Any:
        """The pipeline's own, for what is predicted now."""
        return with_prediction_type(self.levels.inference, self._prediction_type)

    def _validation_pipeline(self) -> Any:
        """Around the models in memory; those that were not kept are read, for now."""
        family, models = self.family, self.models
        device, dtype = self.accelerator.device, frozen_dtype(self.accelerator)
        read = partial(family.load_frozen, self.args, device=device, dtype=dtype)
        if not models.encoders:
            models = replace(models, encoders={name: read(name) for name in family.encoders})
        if not models.has_vae:
            models = replace(models, vae=read("vae"))
        return family.pipeline_of(models, self.network, self._scheduler())

    def _save(self, folder: Path) -> Callable[[], Any]:
        base = self.models.base or self.family.open_base(self.args)
        return self.family.save_pipeline(base, self.network, self._scheduler(), folder)

    @property
    def pictures(self) -> int:
        """How many there are of each caption."""
        return 1

    def _show(self, tag: str, images: list[Image], done: int) -> None:
        super()._show(tag, images, done)
        if self.clip_score is not None:
            prompts = [caption for caption in self.captions for _ in range(self.pictures)]
            score = self.clip_score(images, prompts, self.accelerator.device)
            record = MetricsRecord(
                self.accelerator, Path(self.args.output_dir, CLIP_FILE), "validation"
            )
            facts = {"pictures": len(images), "model": self.args.validation_clip_score}
            record.add(done, {"clip_score": score}, facts)

    def _draw(self, build: Any) -> list[Image]:
        device, models = self.accelerator.device, self.models
        vae = [models.vae] if models.has_vae else []
        with lent(device, *vae, *models.encoders.values()):  # which may wait on the host
            return validation_images(
                (lambda: decoding_precisely(build())) if self.family.precise_vae else build,
                self.captions,
                seed=self.plan.seed,
                device=device,
                steps=self.steps,
                images=self.pictures,
                autocast=self.accelerator.autocast,
                **self.family.picture_settings(self.args),
            )


class OnePromptPublisher(TextToImagePublisher):
    """Publishes a text-to-image pipeline; several pictures for the one validation prompt."""

    prompt_flag, steps = "validation_prompt", ONE_PROMPT_STEPS

    @property
    def captions(self) -> Sequence[str]:
        prompt = self.args.validation_prompt
        return [] if prompt is None else [prompt]

    @property
    def pictures(self) -> int:
        return self.args.num_validation_images


def validation_images(
    build_pipeline: Callable[[], Any],
    prompts: Sequence[str],
    *,
    seed: int,
    device: torch.device | str,
    steps: int = INFERENCE_STEPS,
    images: int = 1,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **settings: Any,
) -> list[Image]:
    """Sample ``images`` pictures for every prompt; then let go of the pipeline, and free memory.

    Every prompt starts from the same noise, drawn on the CPU, so that a picture depends neither on
    the other prompts nor on the device.

    Args:
        settings: of the pipeline's call, such as height and width.
    """
    from diffusers.training_utils import free_memory

    pipeline = build_pipeline().to(device)
    pipeline.set_progress_bar_config(disable=True)
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    drawn: list[Image] = []
    try:
        with evaluation_mode(*modules), autocast():
            for prompt in prompts:
                generator = torch.Generator().manual_seed(seed)
                told = {"generator": generator, "num_inference_steps": steps} | settings
                for _ in range(images):
                    drawn += pipeline(prompt=prompt, **told).images
    finally:
        del pipeline, modules
        free_memory()
    return drawn
