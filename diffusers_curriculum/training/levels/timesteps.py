"""From the command line to a timestep sampler and loss weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diffusers_curriculum.checks import refuse
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.pacing import PLATEAU_STAGE
from diffusers_curriculum.samplers import (
    AdaptiveTimestepSampler,
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    PerSourceTimestepSampler,
    SequenceTimestepSampler,
    TimestepSampler,
    named_samplers,
    sampler_named,
)
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.laws import is_file, meant_for
from diffusers_curriculum.training.errors import UsageError, usage_errors
from diffusers_curriculum.training.levels.sampler_file import sampler_of_file
from diffusers_curriculum.weighting import loss_weights
from diffusers_curriculum.weighting.learned import LearnedLossWeights

DRAW_DEFAULTS = {"timestep_draw": "iid", "timestep_floor": 0.1, "importance_correction": "none"}
UNCERTAINTY = "uncertainty"  # the loss weighting that is learned
# Of each pacing, by the name of the flag without "curriculum_".
_PACING_FLAGS = {
    "patience": ("patience", "min_delta", "smoothing", "min_stage_steps", "max_stage_steps"),
    "fixed": ("stage_steps",),
    "linear": ("total_steps",),
    "cosine": ("total_steps",),
    "root": ("total_steps",),
}


def build_sampler(
    args: Arguments, scheduler: Any, seed: int, continuous: bool = False
) -> TimestepSampler:
    """The sampler that the command line asks for, whatever the length of the run.

    Args:
        scheduler: the training noise scheduler.
        seed: of all draws.
        continuous: draw between the levels of the table, where the schedule has such.

    Raises:
        UsageError: the sampler refuses the arguments.
    """
    sampler = _of_run(args, scheduler, seed, continuous)
    if not any(source.has_law for source in args.sources):
        return sampler
    laws, of_source = [sampler], []
    for source in args.sources:
        of_source.append(len(laws) if source.has_law else 0)
        if source.has_law:
            own = source.put(args)
            for setting in DRAW_DEFAULTS.keys() - args.given:  # a law may have its own defaults
                setattr(own, setting, None)
            own.timestep_draw = sampler.draw
            with source.named(), usage_errors("timestep_sampler"):
                laws.append(_base(own, scheduler, seed, continuous))
    with usage_errors("--data_config"):
        return PerSourceTimestepSampler(laws, of_source)


def _of_run(
    args: Arguments, scheduler: Any, seed: int, continuous: bool = False
) -> TimestepSampler:
    """What is drawn for all sources that have no law of their own."""
    with usage_errors("--timestep_sampler"):
        base = _base(args, scheduler, seed, continuous)
    if args.curriculum == "none":
        return base
    with usage_errors("--curriculum"):
        return CurriculumTimestepSampler(
            base,
            clusters=args.curriculum_clusters,
            clustering=args.curriculum_clustering,
            clustering_args=_given(args, "boundaries", "min_size"),
            pacing=args.curriculum_pacing,
            pacing_args=_given(args, *_PACING_FLAGS[args.curriculum_pacing]),
            order=args.curriculum_order,
            within=args.curriculum_within,
        )


def _base(args: Arguments, scheduler: Any, seed: int, continuous: bool = False) -> TimestepSampler:
    """What is drawn before any curriculum: a density, a law that is learned, two phases, a file."""
    name, own = args.timestep_sampler, dict(args.timestep_sampler_args)
    if is_file(name):
        found = sampler_of_file(name, scheduler, seed)
        if len(found.laws) > 1:
            raise UsageError(
                f"--timestep_sampler {name} holds a law for each of several sources: put them into "
                "the rows of a --data_config."
            )
        return found
    kind = None if name in DENSITIES else sampler_named(name)
    # a sampler that is none of a density keeps its own settings where nothing was given
    missing = [setting for setting in DRAW_DEFAULTS if args[setting] is None]
    for setting in missing if kind is None else ():
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
    if name == "two_phase" and "switch_step" not in own:
        raise ValueError(
            "two_phase needs the first step of its second law: "
            "--timestep_sampler_args switch_step=N, reported at 60 % of the run."
        )
    if name == "two_phase":
        return SequenceTimestepSampler.two_phase(scheduler, **own, **given)
    if kind is not None and not issubclass(kind, AdaptiveTimestepSampler):
        own = kind.of_run(_for_data(args, own), args.max_train_steps)
        return kind.from_scheduler(scheduler, **own, **given)
    if kind is not None and args.loss_weighting == UNCERTAINTY:
        raise UsageError(
            f"--loss_weighting {UNCERTAINTY} evens out the losses that --timestep_sampler {name} "
            "follows: drop one of the two."
        )
    if kind is not None:
        loss = {
            "prediction_type": args.prediction_type,
            "loss_weighting": args.loss_weighting,
            "loss_weighting_args": args.loss_weighting_args,
        }
        return kind.from_losses(scheduler, **own, **given, **loss)
    moved = own.get("density") if name == "shifted" else None
    if isinstance(moved, str) and moved not in DENSITIES:
        raise UsageError(
            f"a shift moves a density, and --timestep_sampler {moved} is none of the catalogue's: "
            "give one of them, or drop --timestep_shift_preset."
        )
    if name not in DENSITIES:
        others = "a file timestep_sampler_config.json", "a name that a module of --import registers"
        refuse(repr(name), name, (*sorted(DENSITIES), *named_samplers(), "two_phase", *others))
    law = _scaled(args, name, own)
    return DensityTimestepSampler.from_scheduler(scheduler, **law, **given)


def _scaled(args: Arguments, name: str, own: dict[str, Any]) -> dict[str, Any]:
    """A density and its parameters, moved to the scale of the data where that is asked for; "auto"
    moves nothing until it is measured."""
    if args.data_scale == 1:
        return {"density": name, "density_args": own}
    unmoved = meant_for(args)
    nested = {"density": name, "density_args": own, "shift": _scale(args, unmoved) / unmoved}
    return {"density": "shifted", "density_args": nested}


def _for_data(args: Arguments, own: dict[str, Any]) -> dict[str, Any]:
    """The settings of a sampler that moves with the scale of the data, where that is asked for."""
    if args.data_scale == 1:
        return own
    if "data_std" in own:
        raise UsageError(
            f"--data_scale is {args.data_scale} and --timestep_sampler_args has data_std="
            f"{own['data_std']!r}: both say the scale of the data; drop one of the two."
        )
    return own | {"data_std": _scale(args, meant_for(args))}


def _scale(args: Arguments, unmoved: float) -> float:
    """The scale of the data; ``unmoved`` until it is measured."""
    scale = args.data_std if args.data_scale == "auto" else args.data_scale
    return unmoved if scale is None else scale


def build_loss_weights(args: Arguments, objective: Objective) -> Tensor | None:
    """(T,) loss weights on the objective's own target, or None for none and for learned ones."""
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
    """Weights that are learned beside the model, for --loss_weighting uncertainty."""
    if args.loss_weighting != UNCERTAINTY:
        return None
    with usage_errors("--loss_weighting"):
        return LearnedLossWeights(objective.levels, seed=seed, **args.loss_weighting_args)


def build_objective(args: Arguments, sampler: TimestepSampler) -> Objective:
    """The objective for --prediction_type, by default the scheduler's own."""
    levels = sampler.levels
    if args.prediction_type is not None:
        levels = levels.with_prediction_type(args.prediction_type)
    with usage_errors("--prediction_type"):
        return Objective(levels)


def check_length(args: Arguments, sampler: TimestepSampler, max_train_steps: int | None) -> None:
    """Refuse a curriculum whose hard clusters would open late or never.

    Raises:
        UsageError: what :func:`length_fault` tells.
    """
    fault = length_fault(args, sampler, max_train_steps)
    if fault is not None:
        raise UsageError(fault)


def length_fault(
    args: Arguments, sampler: TimestepSampler, max_train_steps: int | None
) -> str | None:
    """Why a curriculum is too long for a run, with the remedy: its expected length exceeds
    --curriculum_max_share; None where it does not, or where the length of the run is unknown."""
    faults = (_length_fault(args, law, max_train_steps) for law in sampler.laws.values())
    return next(filter(None, faults), None)


def _length_fault(
    args: Arguments, sampler: TimestepSampler, max_train_steps: int | None
) -> str | None:
    pacing, stages, share = sampler.pacing, sampler.stages, args.curriculum_max_share
    if pacing is None or max_train_steps is None:
        return None
    expected, allowed = pacing.expected_steps(stages), share * max_train_steps
    if expected <= allowed:
        return None
    patience = math.floor(allowed / (PLATEAU_STAGE * max(1, stages - 1)))
    remedy = (
        f"--curriculum_patience {patience}"
        if pacing.name == "patience" and patience >= 1
        else "fewer --curriculum_clusters or a faster pacing"
    )
    return (
        f"the curriculum of {stages} clusters is expected to take {expected:.0f} of "
        f"{max_train_steps} steps before the cleanest noise levels are trained, more than "
        f"--curriculum_max_share {share}: use {remedy}, more steps, or a larger share."
    )


def _given(args: Arguments, *names: str) -> dict[str, Any]:
    """Settings of the curriculum that have a value."""
    values = ((name, args[f"curriculum_{name}"]) for name in names)
    return {name: value for name, value in values if value is not None}
