"""What is drawn before any curriculum: a density, a law that is learned, two phases, or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import (
    DensityTimestepSampler,
    SequenceTimestepSampler,
    TimestepSampler,
    learning_samplers,
)
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.noise_levels import is_file
from diffusers_curriculum.training.errors import UsageError

DRAW_DEFAULTS = {"timestep_draw": "iid", "timestep_floor": 0.1, "importance_correction": "none"}
UNCERTAINTY = "uncertainty"  # the loss weighting that is learned


def build_base(
    args: Arguments, scheduler: Any, seed: int, continuous: bool = False
) -> TimestepSampler:
    """The sampler that the flags ask for, without the curriculum.

    Args:
        continuous: draw between the levels of the table, where the schedule has such.

    Raises:
        UsageError: an unknown name, a file that does not fit, or flags that exclude each other.
        ValueError, TypeError: the sampler refuses its arguments.
    """
    learning = learning_samplers()
    name, own = args.timestep_sampler, dict(args.timestep_sampler_args)
    if is_file(name):
        return _sampler_of_file(name, scheduler)
    # a sampler that learns keeps its own settings where nothing was given
    missing = [setting for setting in DRAW_DEFAULTS if args[setting] is None]
    for setting in missing if name not in learning else ():
        setattr(args, setting, DRAW_DEFAULTS[setting])
    given = {
        "draw": args.timestep_draw,
        "floor": args.timestep_floor,
        "importance_correction": args.importance_correction,
        "seed": seed,
    }
    if continuous:
        given["continuous"] = NoiseLevels.from_scheduler(scheduler).continuous or None
    given = {setting: value for setting, value in given.items() if value is not None}
    if name == "two_phase":
        return SequenceTimestepSampler.two_phase(scheduler, **own, **given)
    if name in learning and args.loss_weighting == UNCERTAINTY:
        raise UsageError(
            f"--loss_weighting {UNCERTAINTY} evens out the losses that --timestep_sampler {name} "
            "follows: drop one of the two."
        )
    if name in learning:
        loss = {
            "prediction_type": args.prediction_type,
            "loss_weighting": args.loss_weighting,
            "loss_weighting_args": args.loss_weighting_args,
        }
        return learning[name].from_losses(scheduler, **own, **given, **loss)
    if name not in DENSITIES:
        names = ", ".join([*sorted(DENSITIES), *learning, "two_phase"])
        raise UsageError(
            f"--timestep_sampler {name!r} is unknown: choose from {names}, or give a file "
            "timestep_sampler_config.json."
        )
    return DensityTimestepSampler.from_scheduler(scheduler, density=name, density_args=own, **given)


def _sampler_of_file(path: str, scheduler: Any) -> TimestepSampler:
    """The sampler whose config a file holds, if it is one for this schedule."""
    try:
        sampler = TimestepSampler.from_config(json.loads(Path(path).read_text("utf-8")))
    except OSError as error:
        raise UsageError(f"--timestep_sampler {path} cannot be read: {error.strerror}.") from error
    levels = NoiseLevels.from_scheduler(scheduler)
    mine, theirs = levels.log_snr, sampler.levels.log_snr
    if mine.shape != theirs.shape or not torch.allclose(mine, theirs, atol=1e-6, equal_nan=True):
        raise UsageError(
            f"--timestep_sampler {path} is for a schedule of {len(theirs)} levels, log-SNR "
            f"{float(theirs[-1]):.3f} to {float(theirs[0]):.3f}; the model's has {len(mine)}, "
            f"{float(mine[-1]):.3f} to {float(mine[0]):.3f}: make the file for this scheduler."
        )
    return sampler
