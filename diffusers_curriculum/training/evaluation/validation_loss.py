"""The loss on samples that are kept apart, at fixed noise levels and with fixed noise.

Nothing in it depends on the law that training draws levels from, on the weighting of its loss, on
the step, or on the seed: runs can be compared by it, and steps of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.randomness import Slots, gaussian
from diffusers_curriculum.samplers import TimestepSample
from diffusers_curriculum.training.data.plan import chosen_rows, share
from diffusers_curriculum.training.publish.metrics_record import VALIDATION_LOSS, MetricsRecord
from diffusers_curriculum.training.publish.pictures import evaluation_mode

_SEED = 0  # of noise and choice, whatever the run's


class ValidationLoss:
    """The unweighted loss of each sample at K levels, averaged over the samples, and over the
    levels: of the weights as they are ("raw"), and of their average ("ema") where there is one.

    The work is shared by all processes in whole batches, and the numbers do not depend on how many
    there are.

    Args:
        run: what a training step works with; its network without accelerate's wrappers, and its
            arguments without what disturbs samples (``arguments.validation.undisturbed``).
        samples: what a data loader would read, by row.
        encode: ``(run, batch, draw) -> (latents, conditioning)``, of the script.
        predict: ``(run, latents, conditioning, drawn, draw) -> (prediction, target, ...)``.
    """

    def __init__(
        self,
        run: Any,
        samples: Any,
        count: int,
        encode: Callable[..., tuple[Tensor, Any]],
        predict: Callable[..., tuple[Tensor, ...]],
    ) -> None:
        args, self.accelerator = run.args, run.accelerator
        self.run, self.samples, self.encode, self.predict = run, samples, encode, predict
        self.every = args.validation_loss_steps or args.checkpointing_steps
        self.rows = chosen_rows(count, args.validation_loss_samples, _SEED)
        levels: NoiseLevels = run.sampler.levels
        self.levels = middle_levels(len(levels), args.validation_loss_quantiles)
        self.names = _names(levels.log_snr[self.levels].tolist())
        self.timesteps = levels.timesteps[self.levels].to(self.accelerator.device)
        path = Path(args.output_dir, VALIDATION_LOSS)
        self.record = MetricsRecord(self.accelerator, path, "validation_loss")

    def is_due(self, step: int) -> bool:
        """Whether it is computed after ``step`` steps: before the first and after the last, too."""
        return step % self.every == 0 or step == self.run.args.max_train_steps

    def evaluate(self, step: int) -> dict[str, float]:
        """Compute it, log it under ``validation_loss/`` and write the line of the file.

        Returns:
            "raw", "ema" and, of each, "raw/log_snr_X"; the same on every process.

        Raises:
            OSError: validation_loss.jsonl could not be written.
        """
        averages = self.run.averages
        with averages.whole():
            values = self._values("raw")
        if averages.ema is not None or averages.power is not None:
            with averages.shown():
                values |= self._values("ema")
        self.record.add(step, values, {"samples": len(self.rows)})
        return values

    def _values(self, weights: str) -> dict[str, float]:
        means = self._losses().double().cpu().mean(0)
        each = zip(self.names, means.tolist(), strict=True)
        return {weights: float(means.mean())} | {f"{weights}/{name}": x for name, x in each}

    @torch.no_grad()
    def _losses(self) -> Tensor:
        """(N, K) of all samples at all levels."""
        accelerator, size = self.accelerator, self.run.args.train_batch_size
        ranks = accelerator.process_index, accelerator.num_processes
        own, places = share(len(self.rows), size, *ranks)
        losses = torch.zeros(places, len(self.levels), device=accelerator.device)
        with evaluation_mode(self.run.network):
            for first in range(0, len(own), size):
                rows = [self.rows[number] for number in own[first : first + size]]
                losses[first : first + len(rows)] = self._of_batch(rows)
        return accelerator.gather(losses)[: len(self.rows)]

    def _of_batch(self, rows: Sequence[int]) -> Tensor:
        """(B, K): encoded once, and predicted at each level."""
        batch = default_collate(self.samples.__getitems__(rows))
        draw = partial(_of_rows, rows=rows, device=self.accelerator.device)
        latents, conditioning = self.encode(self.run, batch, draw)
        losses = []
        for level, timestep in zip(self.levels.tolist(), self.timesteps, strict=True):
            at = torch.full((len(rows),), level, device=latents.device)
            drawn = TimestepSample(timestep.expand(len(rows)), at, torch.ones_like(at).float())
            predicted = self.predict(self.run, latents, conditioning, drawn, draw)
            losses.append(self.run.objective.loss(*predicted[:2])[1])
        return torch.stack(losses, 1)


def middle_levels(count: int, quantiles: int) -> Tensor:
    """(K,) int64 of ``count`` levels, cleanest first: the quantiles (k + 1/2) / K of log-SNR where
    levels are drawn uniformly, from clean to noisy."""
    return ((torch.arange(quantiles, dtype=torch.float64) + 0.5) * count / quantiles).long()


def _of_rows(shape: Sequence[int], *, rows: Sequence[int], purpose: str, device: Any) -> Tensor:
    """Standard normal numbers (B, *shape), each a function of its row."""
    settings = {"seed": _SEED, "step": 0, "purpose": f"validation {purpose}", "device": device}
    return torch.cat([gaussian(shape, slots=Slots(n, 1, n + 1), **settings) for n in rows])


def _names(log_snr: Sequence[float]) -> list[str]:
    """ "log_snr_X" with as few decimals as tell the levels apart."""
    for decimals in range(1, 18):
        names = [f"log_snr_{x:.{decimals}f}" for x in log_snr]
        if len(set(names)) == len(names):
            break
    return names
