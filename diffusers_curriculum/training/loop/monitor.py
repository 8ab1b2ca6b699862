"""What a run tells while it goes on: progress bar, metrics, pictures of the density."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from diffusers_curriculum.analysis.plots import (
    figure_to_image,
    plot_loss_by_noise_level,
    plot_timesteps,
    save_figure,
)
from diffusers_curriculum.samplers import TimestepSampler
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.loop.tracking import LossByNoiseLevel, RunningMean
from diffusers_curriculum.training.publish.pictures import log_images

logger = logging.getLogger(__name__)


class Monitor:
    """Collects on the device at every step, reads and reports every ``log_every`` steps.

    All processes are given the same global numbers; only the main one shows anything.

    Args:
        accelerator: for its trackers and its device.
        sampler: whose curriculum is reported.
        weights: (T,) loss weights, for the picture of the effective density.
        max_train_steps: length of the run.
        log_every: optimizer steps between reports.
        plot_every: optimizer steps between pictures of the effective density.
        guard: asked at every report whether the updates were finite.
    """

    def __init__(
        self,
        accelerator: Any,
        sampler: TimestepSampler,
        weights: Tensor | None,
        max_train_steps: int,
        log_every: int,
        plot_every: int,
        guard: FiniteGuard,
    ) -> None:
        self.accelerator, self.guard = accelerator, guard
        self.sampler, self.weights = sampler, weights
        self.max_train_steps, self.log_every, self.plot_every = (
            max_train_steps,
            log_every,
            plot_every,
        )
        device = accelerator.device
        self.train_loss, self.grad_norm = RunningMean(device), RunningMean(device)
        # one for the reports; two halves, so that the picture at the end shows what was learnt
        self.by_level, *self.halves = (
            LossByNoiseLevel(sampler.levels.log_snr, 10, device) for _ in range(3)
        )
        self.stage = sampler.stage(0)
        self.bar: Any = None

    @property
    def stateful(self) -> dict[str, Any]:
        """What must be saved for the reports to go on as if nothing had happened."""
        return {
            "train_loss": self.train_loss,
            "grad_norm": self.grad_norm,
            "by_level": self.by_level,
            "first_half": self.halves[0],
            "second_half": self.halves[1],
        }

    def start(self, step: int) -> None:
        """Show the progress bar from ``step`` on."""
        self.stage = self.sampler.stage(step)
        self.bar = tqdm(
            total=self.max_train_steps,
            initial=step,
            desc="Steps",
            disable=not self.accelerator.is_local_main_process,
        )

    def add(
        self, step: int, loss: Tensor, indices: Tensor, losses: Tensor, norm: Tensor | None
    ) -> None:
        """Take in optimizer step ``step``; nothing is read back from the device.

        Args:
            loss: training loss, mean over the global batch.
            indices, losses: (N,) levels and unweighted losses of the global batch.
            norm: gradient norm before clipping, None if unknown.
        """
        self.train_loss.add(loss)
        if norm is not None:
            self.grad_norm.add(norm)
        for seen in (self.by_level, self.halves[2 * step >= self.max_train_steps]):
            seen.add(indices, losses)

    def after_step(self, step: int, learning_rate: float) -> None:
        """Report if it is time; ``step`` counts the finished steps.

        Raises:
            NonFiniteError: a loss or gradient was not finite since the last report.
        """
        if self.bar is not None:
            self.bar.update(1)
        if step % self.log_every == 0 or step == self.max_train_steps:
            self.report(step, learning_rate)
        if step % self.plot_every == 0:
            self.plot(step)

    def report(self, step: int, learning_rate: float) -> None:
        """Read everything once, and show it."""
        skipped = self.guard.check(step)
        metrics: dict[str, float] = {
            "train_loss": self.train_loss.read(),
            "lr": learning_rate,
            "grad_norm": self.grad_norm.read(),
            "skipped_updates": skipped,
        }
        metrics |= {k: v for k, v in self.by_level.read().items() if v or "count" not in k}
        of_sampler = self.sampler.report(step)
        metrics |= of_sampler.metrics
        shown = {"loss": f"{metrics['train_loss']:.4f}", "lr": f"{learning_rate:.2e}"}
        shown |= of_sampler.shown
        if of_sampler.stage != self.stage and self.accelerator.is_main_process:
            logger.info("%s", of_sampler.news)
        self.stage = of_sampler.stage
        self.accelerator.log(metrics, step=step)
        if self.bar is not None:
            self.bar.set_postfix(shown)

    def plot(self, step: int) -> None:
        """Send a picture of the effective density to the trackers."""
        if self.accelerator.is_main_process and self.accelerator.trackers:
            figure = plot_timesteps(self.sampler, self._cpu_weights(), self.max_train_steps)
            picture = figure_to_image(figure)
            log_images(self.accelerator, "timesteps", [picture], ["timesteps"], step)
            del figure
            gc.collect()  # its megabytes refer to each other, and full collections are rare

    def finish(self, output_dir: str) -> None:
        """Write timesteps.png and loss_per_noise_level.png into ``output_dir``, and end the bar."""
        if self.bar is not None:
            self.bar.close()
        if not self.accelerator.is_main_process:
            return
        folder = Path(output_dir)
        first, second = (half.summary() for half in self.halves)
        save_figure(
            plot_timesteps(self.sampler, self._cpu_weights(), self.max_train_steps),
            folder / "timesteps.png",
        )
        counts = [a + b for a, b in zip(first.counts, second.counts, strict=True)]
        losses = {"first half": first.means, "second half": second.means}
        save_figure(
            plot_loss_by_noise_level(first.edges, losses, counts),
            folder / "loss_per_noise_level.png",
        )

    def _cpu_weights(self) -> Tensor | None:
        return None if self.weights is None else self.weights.cpu()
