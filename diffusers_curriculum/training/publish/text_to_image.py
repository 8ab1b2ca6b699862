"""Pictures and pipeline of a text-to-image run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import nn

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.errors import UsageError, usage_errors
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.levels.sampling import with_prediction_type
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import ModelFamily
from diffusers_curriculum.training.publish.pictures import decoding_precisely, evaluation_mode
from diffusers_curriculum.training.publish.publisher import PipelinePublisher

# training_utils takes seconds to import, which a wrong command line should not have to wait for: it
# is imported where it is used.

logger = logging.getLogger(__name__)

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
        self.family = family
        super().__init__(args, accelerator, levels, plan)

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

    @property
    def _prediction_type(self) -> str:
        return self.levels.objective.prediction_type

    def _scheduler(self) -> Any:
        """The pipeline's own, for what is predicted now."""
        return with_prediction_type(self.levels.inference, self._prediction_type)

    def _validation_pipeline(self) -> Any:
        return self.family.pipeline_of(self.models, self.network, self._scheduler())

    def _save(self, folder: Path) -> Callable[[], Any]:
        base = self.models.base or self.family.open_base(self.args)
        return self.family.save_pipeline(base, self.network, self._scheduler(), folder)

    @property
    def pictures(self) -> int:
        """How many there are of each caption."""
        return 1

    def _draw(self, build: Any) -> list[Image]:
        return validation_images(
            (lambda: decoding_precisely(build())) if self.family.precise_vae else build,
            self.captions,
            seed=self.args.seed,
            device=self.accelerator.device,
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
    seed: int | None,
    device: torch.device | str,
    steps: int = INFERENCE_STEPS,
    images: int = 1,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **settings: Any,
) -> list[Image]:
    """Sample ``images`` pictures for every prompt; then let go of the pipeline, and free memory.

    Every prompt starts from the same noise, drawn on the CPU, so that a picture depends neither on
    the other prompts nor on the device; with no seed the noise is fresh each time.

    Args:
        settings: of the pipeline's call, such as height and width.
    """
    from diffusers.training_utils import free_memory

    pipeline = build_pipeline().to(device)
    pipeline.set_progress_bar_config(disable=True)
    noise_seed = torch.Generator().seed() if seed is None else seed
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    drawn: list[Image] = []
    try:
        with evaluation_mode(*modules), autocast():
            for prompt in prompts:
                generator = torch.Generator().manual_seed(noise_seed)
                told = {"generator": generator, "num_inference_steps": steps} | settings
                for _ in range(images):
                    drawn += pipeline(prompt=prompt, **told).images
    finally:
        del pipeline, modules
        free_memory()
    return drawn
