"""From the command line to a timestep sampler and loss weights."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import Tensor

from diffusers_curriculum.objective import Objective
from diffusers_curriculum.pacing import PLATEAU_STAGE
from diffusers_curriculum.samplers import CurriculumTimestepSampler, TimestepSampler
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError, usage_errors
from diffusers_curriculum.training.levels.samplers import UNCERTAINTY, build_base
from diffusers_curriculum.weighting import loss_weights
from diffusers_curriculum.weighting.learned import LearnedLossWeights

logger = logging.getLogger(__name__)

# Of each pacing, by the name of the flag without "curriculum_".
_PACING_FLAGS = {
    "patience": ("patience", "min_delta", "smoothing", "min_stage_steps", "max_stage_steps"),
    "fixed": ("stage_steps",),
    "linear": ("total_steps",),
    "cosine": ("total_steps",),
    "root": ("total_steps",),
}


def build_sampler(
    args: Arguments,
    scheduler: Any,
    seed: int,
    max_train_steps: int | None,
    continuous: bool = False,
) -> TimestepSampler:
    """The sampler that the command line asks for.

    Args:
        scheduler: the training noise scheduler.
        seed: of all draws.
        max_train_steps: length of the run, against which a curriculum is checked; None if unknown.
        continuous: draw between the levels of the table, where the schedule has such.

    Raises:
        UsageError: the sampler refuses the arguments, or the curriculum is too long for the run.
    """
    with usage_errors("--timestep_sampler"):
        base = build_base(args, scheduler, seed, continuous)
    if args.curriculum == "none":
        return base
    with usage_errors("--curriculum"):
        sampler = CurriculumTimestepSampler(
            base,
            clusters=args.curriculum_clusters,
            clustering=args.curriculum_clustering,
            clustering_args=_given(args, "boundaries", "min_size"),
            pacing=args.curriculum_pacing,
            pacing_args=_given(args, *_PACING_FLAGS[args.curriculum_pacing]),
            order=args.curriculum_order,
            within=args.curriculum_within,
        )
    if max_train_steps is not None:
        check_length(args, sampler, max_train_steps)
    return sampler


def build_loss_weights(args: Arguments, objective: Objective) -> Tensor | None:
    """(T,) loss weights on the objective's own target, or None for none and for learned ones.

    Raises:
        UsageError: the weighting refuses the arguments or is infinite on this schedule.
    """
    if args.loss_weighting == UNCERTAINTY:
        return None
    with usage_errors("--loss_weighting"):
        return loss_weights(
            args.loss_weighting,
            objective.levels,
            objective.prediction_type,
            **args.loss_weighting_args,
        )


def build_learned_weights(
    args: Arguments, objective: Objective, seed: int
) -> LearnedLossWeights | None:
    """Weights that are learned beside the model, for --loss_weighting uncertainty.

    Raises:
        UsageError: an unknown argument or a number out of range.
    """
    if args.loss_weighting != UNCERTAINTY:
        return None
    with usage_errors("--loss_weighting"):
        return LearnedLossWeights(objective.levels, seed=seed, **args.loss_weighting_args)


def build_objective(args: Arguments, sampler: TimestepSampler) -> Objective:
    """The objective for --prediction_type, by default the scheduler's own.

    Raises:
        UsageError: the schedule has no such prediction type.
    """
    levels = sampler.levels
    if args.prediction_type is not None:
        levels = levels.with_prediction_type(args.prediction_type)
    with usage_errors("--prediction_type"):
        return Objective(levels)


def check_length(args: Arguments, sampler: TimestepSampler, max_train_steps: int) -> None:
    """Refuse a curriculum whose hard clusters would open late or never.

    Raises:
        UsageError: its expected length exceeds --curriculum_max_share of the run.
    """
    pacing, stages, share = sampler.pacing, sampler.stages, args.curriculum_max_share
    if pacing is None:
        return
    expected, allowed = pacing.expected_steps(stages), share * max_train_steps
    if expected <= allowed:
        return
    patience = math.floor(allowed / (PLATEAU_STAGE * max(1, stages - 1)))
    remedy = (
        f"--curriculum_patience {patience}"
        if pacing.name == "patience" and patience >= 1
        else "fewer --curriculum_clusters or a faster pacing"
    )
    raise UsageError(
        f"the curriculum of {stages} clusters is expected to take {expected:.0f} of "
        f"{max_train_steps} steps before the cleanest noise levels are trained, more than "
        f"--curriculum_max_share {share}: use {remedy}, more steps, or a larger share."
    )


def _given(args: Arguments, *names: str) -> dict[str, Any]:
    """Settings of the curriculum that have a value."""
    values = ((name, args[f"curriculum_{name}"]) for name in names)
    return {name: value for name, value in values if value is not None}
