"""What every kind of training on noise levels has in common."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffusers_curriculum.analysis.advice import laplace_betas
from diffusers_curriculum.analysis.preview import quantiles
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.checkpoint.record import recorded_facts
from diffusers_curriculum.training.checkpoint.same_run import level_facts, run_facts
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels import data_scale
from diffusers_curriculum.training.levels.data_scale import DataScale
from diffusers_curriculum.training.levels.guards import learning_warnings
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.levels.timesteps import check_length, length_fault
from diffusers_curriculum.training.loop.monitor import LevelMonitor, file_of_law
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


def known_std(args: Arguments) -> float | None:
    """The standard deviation of the data, as given or as the last run into the same folder
    measured it; None where neither is so.

    Raises:
        UsageError: a law is to follow it, and it is not known yet.
    """
    if args.data_scale not in (1, "auto"):
        return args.data_scale
    scale = data_scale.kept(recorded_facts(args.output_dir))
    if args.data_scale == "auto" and scale is None:
        raise UsageError(
            f"--data_scale is auto, and no run in {args.output_dir} has measured it yet: give "
            "--data_scale NUMBER to see the law, or start the run."
        )
    return None if scale is None else scale.std


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
        from diffusers_curriculum.analysis.terminal import TERMINAL, show

        args.data_std = known_std(args)
        levels = self.choose_levels(args, args.seed or 0)
        shown = []
        for name, law in levels.sampler.laws.items():
            preview = make_preview(
                law,
                levels.weights,
                args.max_train_steps,
                inference=levels.inference,
                title=f"{name}: {law.describe()}" if name else None,
                refusal=length_fault(args, law, args.max_train_steps),
                data_std=args.data_std,
            )
            to_file = args.show_timesteps != TERMINAL
            where = file_of_law(args.show_timesteps, name) if to_file else TERMINAL
            shown.append(show(preview, where))
        return "\n".join(shown)

    def remember(self, args: Arguments, resumed: Mapping[str, Any] | None) -> None:
        scale = data_scale.kept(resumed)
        args.data_std = None if scale is None else scale.std
        if args.data_scale == "auto" and resumed is not None and scale is None:
            raise UsageError(
                "--data_scale is auto, and the checkpoint holds no scale that was measured: give "
                "--data_scale NUMBER, or leave it out as the run did that wrote it."
            )

    def choose(self, args: Arguments, seed: int) -> None:
        self.args, self.levels = args, self.choose_levels(args, seed)
        self.levels.check_terminal_snr(args.untrained_timestep)
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

    def clean(self, job: JobParts) -> Iterable[tuple[Tensor, Tensor | None]] | None:
        """The first samples in batches, as mean and deviation of what noise is added to; None: the
        scale of the data is not measured."""
        return None

    def measured(self, job: JobParts) -> dict[str, Any]:
        args, scale = job.args, data_scale.kept(job.resumed)
        if scale is None:
            scale = self._measure(job)
        if scale is None:
            return {}
        if args.data_scale == "auto" and args.data_std is None:
            args.data_std = scale.std
            self.levels.sampler = self.choose_levels(args, job.seed).sampler
        sampler, self.levels.data_std = self.levels.sampler.laws[""], scale.std
        where = quantiles(sampler.levels, sampler.opened.probabilities().numpy())
        logger.info("%s", data_scale.told(scale, where.log_snr[1:4]))
        return level_facts(args, self.levels) | {data_scale.FACT: scale._asdict()}

    def _measure(self, job: JobParts) -> DataScale | None:
        """By the main process, so that all have the same number."""
        batches = self.clean(job)
        if batches is None:
            if job.args.data_scale == "auto":
                raise UsageError("--data_scale is auto, which this job cannot do: give a number.")
            return None
        found: list[DataScale | UsageError | None] = [None]
        if job.accelerator.is_main_process:
            try:
                found = [data_scale.measure(batches)]
            except UsageError as error:  # the others must not wait for a number
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], UsageError):
            raise found[0]
        return found[0]

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
        self.levels.sampler.take_order(job.plan)
        self.levels.start(job.start, job.accelerator.device)
        self.levels.warn_of_terminal_snr()
        for warning in laplace_betas(self.levels.scheduler):
            logger.warning("%s", warning)
