"""What a run trains on: noise levels, how they are drawn, and what their losses weigh."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.objective import Objective
from diffusers_curriculum.samplers import TimestepSample, TimestepSampler
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels import timesteps
from diffusers_curriculum.weighting import WEIGHTINGS
from diffusers_curriculum.weighting.learned import LearnedLossWeights
from diffusers_curriculum.weighting.tables import log_weight
from diffusers_curriculum.weighting.variational import VariationalBound

logger = logging.getLogger(__name__)


@dataclass
class Levels:
    """What is trained on."""

    scheduler: Any  # adds noise in training
    inference: Any  # the scheduler of pictures and pipeline
    sampler: TimestepSampler
    objective: Objective
    weighting: tuple[str, dict[str, Any]]  # name and parameters of the loss weighting
    # (T,) by noise level, on the device once training starts; None for an unweighted loss
    weights: Tensor | None
    learned: LearnedLossWeights | None  # what makes the weights, where they are learned
    bound: VariationalBound | None = None  # the term of a learned variance, where one is trained
    data_std: float | None = None  # standard deviation of the data, once it is measured

    @classmethod
    def of(
        cls, args: Arguments, scheduler: Any, inference: Any, seed: int, continuous: bool = False
    ) -> Levels:
        """What the command line asks for on a training scheduler; loads no model.

        Args:
            continuous: draw between the levels of the table, where the schedule has such.
        """
        sampler = timesteps.build_sampler(args, scheduler, seed, continuous)
        objective = timesteps.build_objective(args, sampler)
        return cls(
            scheduler,
            inference,
            sampler,
            objective,
            weighting=(args.loss_weighting, args.loss_weighting_args),
            weights=timesteps.build_loss_weights(args, objective),
            learned=timesteps.build_learned_weights(args, objective, seed),
        )

    def start(self, step: int, device: torch.device) -> None:
        """Make the weights for the first step on ``device``, once states are loaded."""
        if self.learned is not None:
            self.weights = self.learned.weights(step, device)
        elif self.weights is not None:
            self.weights = self.weights.to(device)

    def loss_weights(self, drawn: TimestepSample) -> Tensor | None:
        """(B,) weights of the samples' losses, importance included; None where all are 1."""
        weight = None
        if self.weights is not None:
            weight = self.weights[drawn.indices]
            if drawn.log_snr is not None and self.learned is None:
                weight = self._exact_weights(drawn.log_snr, weight)
        if self.sampler.exponent > 0:
            weight = drawn.importance if weight is None else weight * drawn.importance
        return weight

    def _exact_weights(self, log_snr: Tensor, of_cells: Tensor) -> Tensor:
        """Weights (B,) float32 of levels (B,) that were drawn continuously; those of their cells
        where a weight depends on the whole schedule."""
        name, settings = self.weighting
        of_schedule = {"measure", "normalise", "terminal_weight"}
        if WEIGHTINGS.entry(name).whole_schedule or of_schedule & set(settings):
            return of_cells
        kind, levels = self.objective.prediction_type, self.objective.levels
        return log_weight(name, log_snr, kind, levels=levels, **settings).exp().float()

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        """Learn from optimizer step ``step``: call it once per update, with the same numbers on
        every process.

        Args:
            indices, losses: (N,) levels and unweighted losses of the global batch.
        """
        self.sampler.observe(indices, losses, step)
        if self.learned is not None:
            self.learned.observe(indices, losses)
            self.weights = self.learned.weights(step + 1, losses.device)

    def check_terminal_snr(self, untrained: int | None) -> None:
        """Refuse epsilon at zero terminal SNR, unless the timestep that it leaves ``untrained`` is
        named, and a name where all are trained; a UsageError says what to do."""
        levels = self.objective.levels
        last, kind = len(levels) - 1, levels.prediction_type
        nothing = kind == "epsilon" and levels.family == "vp" and not bool(levels.finite[last])
        if not nothing and untrained is not None:
            raise UsageError(
                f"--untrained_timestep is {untrained}, but prediction type {kind!r} trains every "
                "timestep of this schedule: drop it."
            )
        if nothing and untrained != last:
            given = "" if untrained is None else f" (--untrained_timestep is {untrained})"
            raise UsageError(
                f"the schedule has zero terminal SNR: at timestep {last}, where sampling begins, "
                f"epsilon says nothing of the image, and nothing is learned{given}. Use "
                "--prediction_type v_prediction or sample, a schedule without zero terminal SNR, "
                f"or --untrained_timestep {last} to leave it untrained."
            )

    def warn_of_terminal_snr(self) -> None:
        """Log what a level of zero SNR means for this objective, if the schedule has one."""
        terminal = self.objective.levels.log_snr == -torch.inf
        if not bool(terminal.any()):
            return
        if self.objective.prediction_type == "epsilon":
            logger.warning(
                "timestep %d stays untrained: it has zero terminal SNR, where epsilon says nothing "
                "of the image; --prediction_type v_prediction is meant for it",
                len(terminal) - 1,
            )
        if self.weights is not None and not bool(self.weights.cpu()[terminal].any()):
            logger.warning(
                "the loss weight is 0 at zero terminal SNR, which is thus never trained: "
                "--loss_weighting_args terminal_weight=1 gives it one"
            )
