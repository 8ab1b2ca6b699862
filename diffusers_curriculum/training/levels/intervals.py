"""From noise levels to intervals between two of them, for the average velocity (MeanFlow)."""

from __future__ import annotations

from dataclasses import replace

from diffusers_curriculum.average_velocity import AverageVelocity
from diffusers_curriculum.samplers import IntervalTimestepSampler
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError, usage_errors
from diffusers_curriculum.training.levels.levels import Levels


def with_intervals(args: Arguments, levels: Levels) -> Levels:
    """The same levels, of which two are drawn for each sample (arXiv 2505.13447).

    Raises:
        UsageError: the law that is drawn from is none for pairs.
    """
    if len(levels.sampler.laws) > 1:
        raise UsageError(
            "--formulation mean_flow draws both times of a sample from one law, and --data_config "
            "has several: drop the laws of its rows."
        )
    with usage_errors("--formulation mean_flow"):
        sampler = IntervalTimestepSampler(
            levels.sampler, args.interval_share, args.interval_opening_steps or 0
        )
        objective = AverageVelocity(levels.objective.levels, args.adaptive_loss_power)
    return replace(levels, sampler=sampler, objective=objective)
