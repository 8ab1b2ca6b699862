"""What every kind of training on noise levels has in common."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from diffusers_curriculum.analysis.advice import laplace_betas
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.checkpoint.same_run import dataset_facts, level_facts, run_facts
from diffusers_curriculum.training.data.bad_samples import usable_images
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.guards import learning_warnings
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.levels.timesteps import check_length, length_fault
from diffusers_curriculum.training.loop.monitor import LevelMonitor
from diffusers_curriculum.training.loop.task import JobParts, Task

logger = logging.getLogger(__name__)


def check_slowed(args: Arguments, levels: Levels) -> None:
    """Refuse the slower inputs of MixFlow on what is no flow."""
    family = levels.objective.levels.family
    if args.mixflow_gamma is not None and family != "flow":
        raise UsageError(
            f"--mixflow_gamma is {args.mixflow_gamma}, and the noise levels are those of family "
            f"{family!r}: it is defined for flow matching only; drop it, or train a flow."
        )


class LevelTask(Task):
    """A task with noise levels to draw."""

    args: Arguments  # checked, once levels are chosen
    levels: Levels  # what is trained on

    def choose_levels(self, args: Arguments, seed: int) -> Levels:
        """Schedulers, sampler, objective and weights."""
        raise NotImplementedError

    def model_facts(self, args: Arguments) -> dict[str, Any]:
        """What tells the network and its frozen parts; cheap, and without loading them. By default
        the flags of the setting "model"."""
        return args.of_setting("model")

    def show(self, args: Arguments) -> str | None:
        if args.show_timesteps is None:
            return None
        from diffusers_curriculum.analysis.preview import make_preview
        from diffusers_curriculum.analysis.terminal import show

        levels = self.choose_levels(args, args.seed or 0)
        preview = make_preview(
            levels.sampler,
            levels.weights,
            args.max_train_steps,
            inference=levels.inference,
            refusal=length_fault(args, levels.sampler, args.max_train_steps),
        )
        return show(preview, args.show_timesteps)

    def choose(self, args: Arguments, seed: int) -> None:
        self.args, self.levels = args, self.choose_levels(args, seed)
        check_length(args, self.levels.sampler, args.max_train_steps)

    def data_facts(self, job: JobParts) -> dict[str, Any]:
        """What tells the samples; by default the flags of the setting "dataset"."""
        return job.args.of_setting("dataset")

    def facts(self, job: JobParts) -> dict[str, Any]:
        check_length(job.args, self.levels.sampler, job.args.max_train_steps)
        for warning in learning_warnings(job.args, self.levels.sampler, job.args.max_train_steps):
            logger.warning("%s", warning)
        facts = run_facts(job.args, job.plan, self.data_facts(job), self.model_facts(job.args))
        return facts | level_facts(job.args, self.levels)

    def monitor(self, job: JobParts) -> LevelMonitor:
        return LevelMonitor(
            self.levels,
            job.args.timestep_plot_steps,
            accelerator=job.accelerator,
            guard=job.run.guard,
            max_train_steps=job.args.max_train_steps,
            log_every=job.args.log_every,
            plan=job.plan,
        )

    def parts(self, job: JobParts) -> dict[str, Any]:
        learned = self.levels.learned
        return {"sampler": self.levels.sampler} | ({"loss_weights": learned} if learned else {})

    def started(self, job: JobParts) -> None:
        self.levels.start(job.start, job.accelerator.device)
        self.levels.warn_of_terminal_snr()
        for warning in laplace_betas(self.levels.scheduler):
            logger.warning("%s", warning)


class ImageLevelTask(LevelTask):
    """A task on images, with captions or classes if any."""

    @property
    def text_columns(self) -> Mapping[str, str]:
        """Columns beside the images, as ``caption_column`` or ``label_column``."""
        return {}

    def load_rows(self, args: Arguments, seed: int) -> Any:
        from diffusers_curriculum.training.data.sources import training_rows

        return training_rows(args, seed, **self.text_columns)

    def usable_rows(self, args: Arguments, accelerator: Any, rows: Any) -> Any:
        return usable_images(args, accelerator, rows, **self.text_columns)

    def data_facts(self, job: JobParts) -> dict[str, Any]:
        text = next(iter(self.text_columns.values()), None)
        columns = [job.args.image_column, *([] if text is None else [text])]
        return dataset_facts(job.args, job.rows, text) | {"columns": columns}

    def transform(self) -> ImageTransform:
        """The geometry of the training images."""
        return ImageTransform.of(self.args)
