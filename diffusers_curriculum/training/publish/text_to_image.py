"""Pictures and pipeline of a text-to-image run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from diffusers_curriculum.training.errors import UsageError, usage_errors
from diffusers_curriculum.training.levels.sampling import sampling_fault, with_prediction_type
from diffusers_curriculum.training.parts.stable_diffusion import Components, final_pipeline
from diffusers_curriculum.training.publish.hub import CardFacts
from diffusers_curriculum.training.publish.pictures import text_to_image_pipeline, validation_images
from diffusers_curriculum.training.publish.publisher import PipelinePublisher

logger = logging.getLogger(__name__)


class TextToImagePublisher(PipelinePublisher):
    """Publishes a Stable Diffusion pipeline; one picture for each validation prompt.

    Attributes:
        models: put in once they are loaded; for the rest see :class:`PipelinePublisher`.

    Raises:
        HubError: the name or licence is not acceptable, or the Hub refused.
        UsageError: pictures are wanted that the pipeline's scheduler cannot draw.
    """

    models: Components

    @property
    def captions(self) -> Sequence[str]:
        return self.args.validation_prompts or []

    def _check_sampling(self) -> None:
        with usage_errors("--prediction_type"):
            scheduler = with_prediction_type(self.levels.inference, self._prediction_type)
        fault = sampling_fault(scheduler)
        if fault is None:
            return
        problem = (
            f"{type(scheduler).__name__}, the scheduler of --pretrained_model_name_or_path, cannot "
            f"draw pictures for {self._prediction_type!r} in a StableDiffusionPipeline ({fault})"
        )
        if self.captions:
            raise UsageError(
                f"{problem}: save the pipeline with another scheduler, or leave out "
                "--validation_prompts."
            )
        logger.warning("%s; the saved pipeline will need another one", problem)

    @property
    def _prediction_type(self) -> str:
        return self.levels.objective.prediction_type

    def _validation_pipeline(self) -> Any:
        return text_to_image_pipeline(
            vae=self.models.vae,
            text_encoder=self.models.text_encoder,
            tokenizer=self.models.tokenizer,
            unet=self.network,
            scheduler=self.levels.inference,
            prediction_type=self._prediction_type,
        )

    def _final_pipeline(self) -> Any:
        return final_pipeline(self.args, self.network, self._prediction_type)

    def _draw(self, build: Any) -> list[Image]:
        return validation_images(
            build,
            self.captions,
            seed=self.args.seed,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
        )

    def _facts(self) -> CardFacts:
        return CardFacts(**self._shared_facts())
