"""What a run tells while it goes on: progress bar, metrics, pictures of the density."""

from __future__ import annotations

import gc
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.run import LevelLosses
from diffusers_curriculum.training.loop.tracking import LossByNoiseLevel, Pace, RunningMean
from diffusers_curriculum.training.publish.trackers import log_images, log_lines
from diffusers_curriculum.training.storage.files import write_atomically

logger = logging.getLogger(__name__)


class Monitor(ABC):
    """Collects on the device at every step, reads and reports every ``log_every`` steps.

    All processes are given the same global numbers; only the main one shows anything.

    Args:
        guard: asked at every report whether the updates were finite.
        plan: how many samples an update and an epoch have.
    """

    def __init__(
        self, accelerator: Any, guard: Any, max_train_steps: int, log_every: int, plan: BatchPlan
    ) -> None:
        self.accelerator, self.guard = accelerator, guard
        self.max_train_steps, self.log_every = max_train_steps, log_every
        self.pace = Pace(plan, accelerator.device)
        self.bar: Any = None

    @property
    @abstractmethod
    def stateful(self) -> dict[str, Any]:
        """What must be saved for the reports to go on as if nothing had happened."""

    @abstractmethod
    def add(self, step: int, outcome: Any, norm: Tensor | None) -> None:
        """Take in optimizer step ``step``; nothing is read back from the device.

        Args:
            outcome: of the micro-batches of all processes.
            norm: gradient norm before clipping, None if unknown.
        """

    @abstractmethod
    def read(self, step: int) -> tuple[dict[str, float], dict[str, str]]:
        """Read everything once: metrics by name, and what the progress bar shows of them."""

    def start(self, step: int) -> None:
        """Show the progress bar from ``step`` on, and start the clock."""
        self.pace.start(step)
        self.bar = tqdm(
            total=self.max_train_steps,
            initial=step,
            desc="Steps",
            disable=not self.accelerator.is_local_main_process,
        )

    def after_step(self, step: int, learning_rate: float) -> None:
        """Report if it is time; ``step`` counts the finished steps.

        Raises:
            NonFiniteError: a loss or gradient was not finite since the last report.
        """
        if self.bar is not None:
            self.bar.update(1)
        if step % self.log_every == 0 or step == self.max_train_steps:
            self.report(step, learning_rate)

    def report(self, step: int, learning_rate: float) -> None:
        """Read everything once, and show it."""
        skipped = self.guard.check(step)
        metrics, shown = self.read(step)
        metrics |= {"lr": learning_rate, "skipped_updates": skipped} | self.pace.read(step)
        self.accelerator.log(metrics, step=step)
        if self.bar is not None:
            self.bar.set_postfix(shown | {"lr": f"{learning_rate:.2e}"})

    def show_law(self, step: int) -> None:
        """Show what is drawn from after ``step`` steps, where there is a law to draw from."""
        return

    def finish(self, output_dir: str) -> None:
        """End the bar, and write what sums up the run into ``output_dir``."""
        if self.bar is not None:
            self.bar.close()


class LevelMonitor(Monitor):
    """Reports of a run on noise levels: losses by log-SNR, the curriculum, pictures of the density.

    Args:
        plot_every: optimizer steps between pictures of the effective density.
        options: those of :class:`Monitor`.
    """

    def __init__(self, levels: Levels, plot_every: int, **options: Any) -> None:
        super().__init__(**options)
        self.levels, self.sampler, self.plot_every = levels, levels.sampler, plot_every
        device = self.accelerator.device
        self.train_loss, self.grad_norm = RunningMean(device), RunningMean(device)
        # one for the reports; two halves, so that the picture at the end shows what was learnt
        self.by_level, *self.halves = (
            LossByNoiseLevel(self.sampler.levels.log_snr, 10, device) for _ in range(3)
        )
        self.stage, self._law_shown = self.sampler.stage(0), -1

    @property
    def stateful(self) -> dict[str, Any]:
        return {
            "train_loss": self.train_loss,
            "grad_norm": self.grad_norm,
            "by_level": self.by_level,
            "first_half": self.halves[0],
            "second_half": self.halves[1],
        }

    def start(self, step: int) -> None:
        super().start(step)
        self.stage = self.sampler.stage(step)
        if 2 * step <= self.max_train_steps:  # of a longer run, all that was seen is the first half
            self.halves[0].absorb(self.halves[1])

    def add(self, step: int, outcome: LevelLosses, norm: Tensor | None) -> None:
        self.train_loss.add(outcome.loss.double().mean())
        if norm is not None:
            self.grad_norm.add(norm)
        for seen in (self.by_level, self.halves[2 * step >= self.max_train_steps]):
            seen.add(outcome.indices, outcome.losses)

    def after_step(self, step: int, learning_rate: float) -> None:
        super().after_step(step, learning_rate)
        if step % self.plot_every == 0 and step < self.max_train_steps and self._has_trackers:
            from diffusers_curriculum.analysis.plots import figure_to_image

            for tag, figure in self._timesteps():
                self._send(tag, figure_to_image(figure), step)

    def read(self, step: int) -> tuple[dict[str, float], dict[str, str]]:
        metrics = {"train_loss": self.train_loss.read(), "grad_norm": self.grad_norm.read()}
        metrics |= {k: v for k, v in self.by_level.read().items() if v or "count" not in k}
        of_sampler = self.sampler.report(step)
        metrics |= of_sampler.metrics
        if of_sampler.stage != self.stage:
            self._tell_stages(step, of_sampler.stage)
        return metrics, {"loss": f"{metrics['train_loss']:.4f}"} | of_sampler.shown

    def show_law(self, step: int) -> None:
        """Send a picture of the law that step ``step`` is drawn from, unless it is there."""
        law = 0 if self.sampler.static_law else step
        if law != self._law_shown and self._has_trackers:
            from diffusers_curriculum.analysis.plots import figure_to_image, plot_law

            self._send("law", figure_to_image(plot_law(self.sampler, step)), step)
        self._law_shown = law

    def finish(self, output_dir: str) -> None:
        """End the bar, and write timesteps.png, and the loss per noise level as a picture and as
        numbers; the trackers get the pictures, too."""
        from diffusers_curriculum.analysis import plots

        super().finish(output_dir)
        if not self.accelerator.is_main_process:
            return
        folder, last = Path(output_dir), self.max_train_steps
        first, second = (half.summary() for half in self.halves)
        counts = [a + b for a, b in zip(first.counts, second.counts, strict=True)]
        losses = {"first half": first.means, "second half": second.means}
        by_level = plots.plot_loss_by_noise_level(first.edges, losses, counts)
        for tag, figure in [*self._timesteps(), ("loss_per_noise_level", by_level)]:
            path = folder / f"{tag}.png"
            plots.save_figure(figure, path)
            if self._has_trackers:
                with Image.open(path) as picture:
                    self._send(tag, picture.convert("RGB"), last)
        named = {"edges": first.edges, "first_half": first.means, "second_half": second.means}
        told = {k: [x if math.isfinite(x) else None for x in v] for k, v in named.items()}
        text = json.dumps(told | {"counts": counts}, indent=2) + "\n"
        write_atomically(folder / "loss_per_noise_level.json", text)

    def _tell_stages(self, step: int, stage: int) -> None:
        """Tell of the stages up to ``stage``, the new ones in the log, and show the law."""
        opened = [self.sampler.opening(number) for number in range(1, stage + 1)]
        for line in opened[self.stage :] if self.accelerator.is_main_process else ():
            logger.info("%s", line)
        log_lines(self.accelerator, "curriculum/stages", opened, step)
        self.show_law(step)
        self.stage = stage

    @property
    def _has_trackers(self) -> bool:
        return self.accelerator.is_main_process and bool(self.accelerator.trackers)

    def _send(self, tag: str, picture: Image.Image, step: int) -> None:
        """Send the picture of a figure that is done with to the trackers."""
        log_images(self.accelerator, tag, [picture], [tag], step)
        gc.collect()  # a figure's megabytes refer to each other, and full collections are rare

    def _timesteps(self) -> Iterator[tuple[str, Any]]:
        """By its name, the picture of what is trained on by each law, as things stand."""
        from diffusers_curriculum.analysis.plots import plot_timesteps

        levels, last = self.levels, self.max_train_steps
        weights = None if levels.weights is None else levels.weights.cpu()
        for name, law in self.sampler.laws.items():
            yield (
                file_of_law("timesteps", name),
                plot_timesteps(law, weights, last, levels.data_std),
            )


def file_of_law(file: str, law: str) -> str:
    """A file for one of several laws: ``timesteps_source2.png``; itself for that without a name."""
    path = Path(file)
    return str(path.with_name(f"{path.stem}_{law}{path.suffix}")) if law else file
