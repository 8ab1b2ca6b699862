"""From the command line to noise schedulers: variance preserving, flow matching or EDM."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.pipelines.denoising import LEARNED_VARIANCE, denoise
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.foreign_code import refuse_foreign_code
from diffusers_curriculum.training.validation import with_prediction_type

FAMILIES = {"ddpm": "vp", "flow": "flow", "edm": "edm"}
# Standard deviation of the data that EDM's preconditioning assumes: in pixels, and in latents,
# whose scaling factor makes it about 1.
SIGMA_DATA = {True: 0.5, False: 1.0}
# The scheduler's setting for each flag, and the value that means "as it is".
_SETTINGS = {
    "ddpm": {
        "ddpm_num_steps": ("num_train_timesteps", 1000),
        "ddpm_beta_schedule": ("beta_schedule", "linear"),
    },
    "flow": {"flow_shift": ("shift", 1.0)},
    "edm": {
        "sigma_min": ("sigma_min", 0.002),
        "sigma_max": ("sigma_max", 80.0),
        "sigma_data": ("sigma_data", None),
    },
}


def pipeline_index(args: argparse.Namespace) -> dict[str, Any]:
    """The model_index.json of --pretrained_model_name_or_path, empty without one.

    Raises:
        UsageError: it cannot be read, or brings code of its own.
    """
    path = args.pretrained_model_name_or_path
    if path is None:
        return {}
    if not Path(path).is_dir() and Path(path).exists():
        raise UsageError(f"--pretrained_model_name_or_path {path!r} is a file: give its folder.")
    refuse_foreign_code(path, args.revision)
    try:
        index: Any = DiffusionPipeline.load_config(path, revision=args.revision)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r} cannot be read ({error}). Give a folder or "
            "Hub id of a saved pipeline."
        ) from error
    return dict(index)


def formulation_of(args: argparse.Namespace) -> str:
    """The formulation of a pretrained pipeline.

    Raises:
        UsageError: its scheduler cannot be read.
    """
    family = NoiseLevels.from_scheduler(_own_scheduler(args)).family
    return next(name for name, kind in FAMILIES.items() if kind == family)


def build_schedulers(args: argparse.Namespace, *, pixels: bool, default_vp: str) -> tuple[Any, Any]:
    """The scheduler that adds noise in training, and the one of pictures and pipeline.

    A pretrained pipeline's own, with what the flags change, if it has the formulation asked for.

    Args:
        pixels: whether images are trained on, and not latents.
        default_vp: class for sampling a variance preserving process.

    Raises:
        UsageError: a class that is none, cannot sample this formulation, or refuses a setting.
    """
    own = None if args.pretrained_model_name_or_path is None else _own_scheduler(args)
    if own is not None and NoiseLevels.from_scheduler(own).family != FAMILIES[args.formulation]:
        own = None
    settings = _settings(args, own is None, pixels)
    kinds = {"ddpm": DDPMScheduler, "flow": FlowMatchEulerDiscreteScheduler}
    kind: Any = kinds.get(args.formulation, EDMEulerScheduler)
    base = {} if own is None else dict(own.config)
    try:
        training = kind.from_config(base, **settings)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"--formulation {args.formulation}: {error}") from error
    defaults = {"ddpm": default_vp if own is None else type(own).__name__}
    name = args.sampling_scheduler or defaults.get(args.formulation) or kind.__name__
    return training, _sampling(args, name, training)


def _settings(args: argparse.Namespace, fresh: bool, pixels: bool) -> dict[str, Any]:
    """Settings of the training scheduler: all for a fresh one, else those that a flag changes."""
    given = {}
    for flag, (name, neutral) in _SETTINGS[args.formulation].items():
        value = getattr(args, flag)
        if fresh or value != neutral:
            given[name] = value
    if args.formulation == "edm" and fresh and args.sigma_data is None:
        given["sigma_data"] = SIGMA_DATA[pixels]
    if args.formulation == "ddpm":
        if args.prediction_type is not None:
            given["prediction_type"] = args.prediction_type
        if fresh:
            given["clip_sample"] = pixels
    return given


def _own_scheduler(args: argparse.Namespace) -> Any:
    path, index = args.pretrained_model_name_or_path, pipeline_index(args)
    named = index.get("scheduler")
    name = str(named[1]) if isinstance(named, list | tuple) and len(named) == 2 else ""
    kind = _scheduler_class(name, f"--pretrained_model_name_or_path {path!r}: its scheduler")
    try:
        return kind.from_pretrained(path, subfolder="scheduler", revision=args.revision)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r}: its scheduler cannot be loaded ({error})."
        ) from error


def _scheduler_class(name: str, what: str) -> Any:
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise UsageError(
            f"{what} is {name!r}, which is no scheduler of diffusers: give one such as "
            "DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler or "
            "EDMEulerScheduler."
        )
    return kind


def _sampling(args: argparse.Namespace, name: str, training: Any) -> Any:
    """The scheduler for sampling, if it can sample what is trained."""
    kind = _scheduler_class(name, "--sampling_scheduler")
    levels = NoiseLevels.from_scheduler(training)
    config = dict(training.config)
    if args.learned_variance == "vlb" and kind is DDPMScheduler:
        config["variance_type"] = "learned_range"
    try:
        scheduler = with_prediction_type(kind.from_config(config), levels.prediction_type)
        family = NoiseLevels.from_scheduler(scheduler).family
    except (ValueError, NotImplementedError, TypeError) as error:
        raise UsageError(f"--sampling_scheduler {name}: {error}") from error
    fault = _fault(scheduler)
    if family != levels.family or fault is not None:
        raise UsageError(
            f"--sampling_scheduler {name} cannot sample --formulation {args.formulation} with "
            f"prediction type {levels.prediction_type!r} ({fault or f'it is of family {family}'}): "
            "leave it out, or give one that can."
        )
    return scheduler


def _fault(scheduler: Any) -> str | None:
    """Why a scheduler cannot sample, or None; found by a few steps, as some refuse only then."""
    probe = type(scheduler).from_config(scheduler.config)
    learned = scheduler.config.get("variance_type") in LEARNED_VARIANCE
    try:
        denoise(
            lambda latents, timesteps, progress: torch.cat([latents] * (2 if learned else 1), 1),
            probe, torch.zeros(1, 4, 8, 8), 4, torch.Generator().manual_seed(0), tokens=64,
        )  # fmt: skip
    except Exception as error:  # whatever a scheduler raises, it would raise after hours too
        return f"{type(error).__name__}: {error}"
    return None
