"""Pictures and pipeline of a text-to-image run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from diffusers_curriculum.samplers import TimestepSampler
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.timesteps import usage_errors
from diffusers_curriculum.training.parts.stable_diffusion import Components, final_pipeline
from diffusers_curriculum.training.publish.hub import CardFacts
from diffusers_curriculum.training.publish.pictures import (
    sampling_fault,
    text_to_image_pipeline,
    validation_images,
    with_prediction_type,
)
from diffusers_curriculum.training.publish.publisher import BasePublisher

logger = logging.getLogger(__name__)


class Publisher(BasePublisher):
    """Publishes a Stable Diffusion pipeline; one picture for each validation prompt.

    Args:
        scheduler: the pipeline's own, for sampling; for the rest see :class:`BasePublisher`.

    Raises:
        HubError: the name or licence is not acceptable, or the Hub refused.
        UsageError: pictures are wanted that the pipeline's scheduler cannot draw.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Any,
        scheduler: Any,
        sampler: TimestepSampler,
        prediction_type: str,
    ) -> None:
        self.scheduler = scheduler
        super().__init__(args, accelerator, sampler, prediction_type)

    @property
    def captions(self) -> Sequence[str]:
        return self.args.validation_prompts or []

    def _check_sampling(self) -> None:
        with usage_errors("--prediction_type"):
            scheduler = with_prediction_type(self.scheduler, self.prediction_type)
        fault = sampling_fault(scheduler)
        if fault is None:
            return
        problem = (
            f"{type(scheduler).__name__}, the scheduler of --pretrained_model_name_or_path, cannot "
            f"draw pictures for {self.prediction_type!r} in a StableDiffusionPipeline ({fault})"
        )
        if self.captions:
            raise UsageError(
                f"{problem}: save the pipeline with another scheduler, or leave out "
                "--validation_prompts."
            )
        logger.warning("%s; the saved pipeline will need another one", problem)

    def _validation_pipeline(self, models: Components, network: Any) -> Any:
        return text_to_image_pipeline(
            vae=models.vae,
            text_encoder=models.text_encoder,
            tokenizer=models.tokenizer,
            unet=network,
            scheduler=self.scheduler,
            prediction_type=self.prediction_type,
        )

    def _final_pipeline(self, network: Any) -> Any:
        return final_pipeline(self.args, network, self.prediction_type)

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
