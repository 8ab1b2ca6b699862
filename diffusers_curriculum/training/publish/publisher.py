"""What every run leaves: pictures on the way, then the pipeline, its card, its upload."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from diffusers_curriculum.models.saving import share_weights
from diffusers_curriculum.samplers.files import FOLDER
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.configuration import DEFAULTS
from diffusers_curriculum.training.arguments.environment import LOCAL, repository_name
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.errors import HubError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.process.memory import is_out_of_memory
from diffusers_curriculum.training.publish.card import CardFacts, build_model_card
from diffusers_curriculum.training.publish.hub import (
    pictures,
    prepare_repository,
    push,
    write_model_card,
)
from diffusers_curriculum.training.publish.metrics_record import VALIDATION_LOSS, read_metrics
from diffusers_curriculum.training.publish.pictures import image_grid
from diffusers_curriculum.training.publish.trackers import log_images
from diffusers_curriculum.training.storage.manifest import versions

logger = logging.getLogger(__name__)

GRID_FILE = "val_imgs_grid.png"
VALIDATION_LOSS_PICTURE = "validation_loss.png"
_OF_THIS_RUN = (DEFAULTS, "output_dir", "overwrite_output_dir", "logging_dir", "cache_dir")
_OF_THIS_RUN += ("report_to", "logger", "tracker_project_name", "push_to_hub", "license")
_OF_THIS_RUN += ("resume_from_checkpoint", "allow_config_change", "latent_cache_dir", "max_hours")


class PipelinePublisher:
    """Validation pictures, the final pipeline, its model card, and its push to the Hub.

    Made before training: a card or a repository that cannot be made is told then. All processes
    call the same methods; the main one acts, and the others wait for it. A subclass says what is
    drawn and what is saved.

    Args:
        levels: what is trained on: its sampler is described in the card, and saved.
        plan: the order of the samples, for epochs.

    Attributes:
        averages: of the network that is published; put in once it is loaded.

    Raises:
        HubError: the name or licence is not acceptable, or the Hub refused.
        UsageError: pictures are wanted that cannot be drawn.
    """

    averages: Averages

    def __init__(self, args: Arguments, accelerator: Any, levels: Levels, plan: BatchPlan) -> None:
        self.args, self.accelerator, self.levels, self.plan = args, accelerator, levels, plan
        self._check_sampling()
        self.repository = repository_name(args.hub_model_id, args.output_dir)
        build_model_card(self._facts())
        if args.push_to_hub and accelerator.is_main_process:
            self.repository = prepare_repository(
                self._facts(), token=args.hub_token, private=args.hub_private_repo
            )
        accelerator.wait_for_everyone()

    # -- what a subclass says --------------------------------------------------------------------

    @property
    def captions(self) -> Sequence[str]:
        """A caption for each row of pictures; none for no pictures."""
        raise NotImplementedError

    def _check_sampling(self) -> None:
        """Refuse pictures that cannot be drawn."""

    def _validation_pipeline(self) -> Any:
        """A pipeline around models that are in memory."""
        raise NotImplementedError

    def _save(self, folder: Path) -> Callable[[], Any]:
        """Write the pipeline to keep; returns what makes it, for pictures."""
        raise NotImplementedError

    def _draw(self, build: Any) -> list[Image]:
        """Pictures, row by row, of the pipeline that ``build()`` makes."""
        raise NotImplementedError

    # -- what all share --------------------------------------------------------------------------

    @property
    def network(self) -> Any:
        """The trained network, without accelerate's wrappers."""
        return self.averages.network

    def is_due(self, done: int) -> bool:
        """Whether pictures are wanted after ``done`` steps: every --validation_steps, else whenever
        an epoch ends whose number is a multiple of --validation_epochs."""
        if not self.captions or done == self.args.max_train_steps:
            return False
        if self.args.validation_steps is not None:
            return done % self.args.validation_steps == 0
        return self.plan.epoch_is_due(done, self.args.validation_epochs)

    def validate(self, done: int) -> None:
        """Draw and log the pictures, with the averaged weights if any."""
        main = self.accelerator.is_main_process
        with self.averages.shown():
            images = self._draw(self._validation_pipeline) if main else []
        if main:
            self._show("validation", images, done)
        self.accelerator.wait_for_everyone()

    def _show(self, tag: str, images: list[Image], done: int) -> None:
        """Log the pictures, and what is measured of them."""
        log_images(self.accelerator, tag, images, self.captions, done)

    def finish(self) -> None:
        """:meth:`keep` the trained pipeline, with pictures; a HubError says that the upload failed,
        when everything is saved."""
        self.accelerator.wait_for_everyone()
        self.keep(final=True)

    def saved(self, step: int) -> None:
        """After checkpoint ``step`` is saved: push it, with the pipeline, if asked to."""
        if self.args.push_to_hub and self.args.hub_strategy == "every_save":
            self.keep(checkpoint=Path(self.args.output_dir, f"checkpoint-{step}"))

    def keep(self, final: bool = False, checkpoint: Path | None = None) -> None:
        """Save the pipeline as it is now (averaged weights if any), its sampler and card, and push
        it if asked to, a checkpoint too; before the end, a Hub that does not answer is only a
        warning."""
        with self.averages.shown():
            images = self._saved(final) if self.accelerator.is_main_process else []
        if self.accelerator.is_main_process:
            self._tell(images, final, checkpoint)
        self.accelerator.wait_for_everyone()

    def _saved(self, final: bool) -> list[Image]:
        """Save the pipeline; the pictures that are drawn of the ``final`` one."""
        folder = Path(self.args.output_dir)
        build = self._save(folder)
        for pattern in ("*.safetensors", "*/*.safetensors"):
            share_weights(folder, pattern)
        return self._drawn_if_it_can(build) if final and self.captions else []

    def _tell(self, images: list[Image], final: bool, checkpoint: Path | None) -> None:
        """Sampler, card and upload of a pipeline that is saved."""
        folder = Path(self.args.output_dir)
        self.levels.sampler.save_pretrained(str(folder / FOLDER))
        self._save_card(images, folder)
        logger.info("pipeline in %s", folder)
        try:
            if self.args.push_to_hub:
                token = self.args.hub_token
                push(folder, self.repository, checkpoint=checkpoint, token=token)
        except HubError as error:
            if final:
                raise
            logger.warning("%s The training goes on.", error)

    def _drawn_if_it_can(self, build: Callable[[], Any]) -> list[Image]:
        """The pictures; without them the card and the upload are still made."""
        try:
            return self._draw(build)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("Memory ran out while drawing: the pipeline is saved without pictures.")
            return []

    def _save_card(self, images: list[Image], folder: Path) -> None:
        facts = replace(self._facts(), flags=_repeatable(self.args.configuration))
        if losses := read_metrics(folder / VALIDATION_LOSS):
            # here, as matplotlib takes part of a second
            from diffusers_curriculum.analysis.plots import save_figure
            from diffusers_curriculum.analysis.run_plots import plot_validation_loss

            save_figure(plot_validation_loss(losses), folder / VALIDATION_LOSS_PICTURE)
        if images:
            image_grid(images, self.captions).save(folder / GRID_FILE)
            self._show("test", images, self.args.max_train_steps)
            facts = replace(facts, image_grid=GRID_FILE)
        others = [name for name in pictures(folder) if name != facts.image_grid]
        write_model_card(replace(facts, pictures=tuple(others)), folder)

    def _facts(self) -> CardFacts:
        """What the model card tells."""
        args = self.args
        return CardFacts(
            repo_id=self.repository,
            base_model=args.pretrained_model_name_or_path,
            dataset_name=args.dataset_name,
            sources=tuple(source.flags.get("dataset_name") for source in args.sources),
            prompts=tuple(self.captions),
            license=args.license,
            versions=versions(),
            training={
                "Optimizer steps": args.max_train_steps,
                "Learning rate": args.learning_rate,
                "Batch size per process": args.train_batch_size,
                "Gradient accumulation steps": args.gradient_accumulation_steps,
                "Processes": self.accelerator.num_processes,
                "Resolution": args.resolution,
                "Mixed precision": self.accelerator.mixed_precision,
                "Prediction type": self.levels.objective.prediction_type,
            },
            sampler=self.levels.sampler.rows() | self._stages(),
            script=Path(sys.argv[0]).stem,
        )

    def _stages(self) -> dict[str, str]:
        """Where the stages of a curriculum opened, and the weighting."""
        starts, how = self.levels.sampler.stage_starts(self.args.max_train_steps or 0)
        opened = ", ".join(f"{start:.0f}" for start in starts if math.isfinite(start))
        stages = {f"Stages from steps ({how})": opened} if len(starts) > 1 else {}
        return stages | {"Loss weighting": self.args.loss_weighting}


def _repeatable(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The flags by which a run can be repeated elsewhere; of what is on this machine, the name."""
    told = {k: v for k, v in configuration.items() if k not in _OF_THIS_RUN}
    return {name: _without_path(value) for name, value in told.items() if name[:4] != "hub_"}


def _without_path(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_path(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_path(item) for name, item in value.items()}
    if isinstance(value, str) and (value.startswith(LOCAL) or os.path.exists(value)):
        return Path(value).resolve().name
    return value
