"""Pictures during the run, and what is left after it: the pipeline, its card, its upload."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from PIL.Image import Image

from diffusers_curriculum.samplers import (
    CurriculumTimestepSampler,
    SequenceTimestepSampler,
    TimestepSampler,
)
from diffusers_curriculum.samplers.configs import plain_config
from diffusers_curriculum.training.batch_plan import BatchPlan
from diffusers_curriculum.training.components import Components, final_pipeline
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.hub import (
    CardFacts,
    build_model_card,
    prepare_repository,
    push,
    repository_name,
    write_model_card,
)
from diffusers_curriculum.training.timesteps import usage_errors
from diffusers_curriculum.training.validation import (
    ema_weights,
    image_grid,
    log_images,
    sampling_fault,
    text_to_image_pipeline,
    validation_images,
    with_prediction_type,
)

logger = logging.getLogger(__name__)

GRID_FILE = "val_imgs_grid.png"


class Publisher:
    """Validation pictures, the final pipeline, its model card, and its push to the Hub.

    Made before training: a card or a repository that cannot be made is told then. All processes
    call the same methods; the main one acts, and the others wait for it.

    Args:
        args: the command line.
        accelerator: of the run.
        sampler: described in the card, and saved beside the pipeline.
        prediction_type: what the network predicts.

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
        self.args, self.accelerator, self.scheduler = args, accelerator, scheduler
        self.sampler, self.prediction_type = sampler, prediction_type
        self._check_sampling()
        self.repository = repository_name(args.hub_model_id, args.output_dir)
        build_model_card(self._facts())
        if args.push_to_hub and accelerator.is_main_process:
            self.repository = prepare_repository(self._facts(), token=args.hub_token)
        accelerator.wait_for_everyone()

    def is_due(self, plan: BatchPlan, step: int) -> bool:
        """Whether pictures are wanted after optimizer step ``step``: every --validation_steps, else
        whenever an epoch ends whose number is a multiple of --validation_epochs."""
        if not self.args.validation_prompts or step + 1 == self.args.max_train_steps:
            return False
        if self.args.validation_steps is not None:
            return (step + 1) % self.args.validation_steps == 0
        before, after = plan.epochs_finished(step - 1) if step else 0, plan.epochs_finished(step)
        return any(epoch % self.args.validation_epochs == 0 for epoch in range(before, after))

    def validate(self, models: Components, unet: Any, ema: EMAModel | None, step: int) -> None:
        """Draw and log one picture for each validation prompt, with the averaged weights if any."""
        if self.accelerator.is_main_process:
            build = partial(
                text_to_image_pipeline,
                vae=models.vae,
                text_encoder=models.text_encoder,
                tokenizer=models.tokenizer,
                unet=unet,
                scheduler=self.scheduler,
                prediction_type=self.prediction_type,
            )
            with ema_weights(ema, unet):
                images = self._images(build)
            log_images(self.accelerator, "validation", images, self._prompts, step)
        self.accelerator.wait_for_everyone()

    def finish(self, unet: Any, ema: EMAModel | None) -> None:
        """Save the pipeline (averaged weights if any), its sampler config, pictures and card, and
        push it if asked to.

        Raises:
            HubError: the upload failed; everything is saved by then.
        """
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir)
            with ema_weights(ema, unet):
                pipeline = final_pipeline(self.args, unet, self.prediction_type)
                pipeline.save_pretrained(folder)
                images = self._images(lambda: pipeline) if self._prompts else []
            self.sampler.save_pretrained(str(folder))
            self._save_card(images, folder)
            if self.args.push_to_hub:
                push(folder, self.repository, token=self.args.hub_token)
        self.accelerator.wait_for_everyone()

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
        if self._prompts:
            raise UsageError(
                f"{problem}: save the pipeline with another scheduler, or leave out "
                "--validation_prompts."
            )
        logger.warning("%s; the saved pipeline will need another one", problem)

    @property
    def _prompts(self) -> list[str]:
        return self.args.validation_prompts or []

    def _images(self, build: Any) -> list[Image]:
        return validation_images(
            build,
            self._prompts,
            seed=self.args.seed,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
        )

    def _save_card(self, images: list[Image], folder: Path) -> None:
        facts = self._facts()
        if images:
            image_grid(images, self._prompts).save(folder / GRID_FILE)
            log_images(self.accelerator, "test", images, self._prompts, self.args.max_train_steps)
            facts = replace(facts, image_grid=GRID_FILE)
        write_model_card(facts, folder)

    def _facts(self) -> CardFacts:
        args = self.args
        return CardFacts(
            repo_id=self.repository,
            base_model=args.pretrained_model_name_or_path,
            dataset_name=args.dataset_name,
            prompts=tuple(self._prompts),
            prediction_type=self.prediction_type,
            resolution=args.resolution,
            train_batch_size=args.train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            num_processes=self.accelerator.num_processes,
            learning_rate=args.learning_rate,
            steps=args.max_train_steps,
            mixed_precision=self.accelerator.mixed_precision,
            sampler=describe_sampler(self.sampler) | {"Loss weighting": args.loss_weighting},
            license=args.license,
        )


def describe_sampler(sampler: TimestepSampler) -> dict[str, object]:
    """What a reader of the model card wants to know of a sampler."""
    base = sampler.base if isinstance(sampler, CurriculumTimestepSampler) else sampler
    told: dict[str, object] = {
        "Timestep density": _law(base),
        "Timestep draw": sampler.draw,
    }
    if isinstance(sampler, CurriculumTimestepSampler):
        pacing = " ".join(f"{k}={v}" for k, v in sampler.config["pacing_args"].items())
        told["Curriculum"] = (
            f"{sampler.order}, {sampler.stages} clusters, {sampler.pacing.name} {pacing}"
        )
    return told


def _law(sampler: TimestepSampler) -> str:
    """A density with its parameters, or what else the law comes from."""
    if isinstance(sampler, SequenceTimestepSampler):
        steps = [f"until step {phase['until']}, then" for phase in sampler.config["phases"][:-1]]
        laws = [_law(phase) for phase in sampler.samplers]
        told = [f"{law} {end}" for law, end in zip(laws, steps, strict=False)]
        return " ".join([*told, laws[-1]])
    config = plain_config(sampler)
    parameters = " ".join(f"{k}={v}" for k, v in config.get("density_args", {}).items())
    entry = getattr(sampler, "entry", None)
    name = config.get("density") or (entry.name if entry else type(sampler).__name__)
    return f"{name} {parameters}".strip()
