"""From the command line to noise schedulers: variance preserving, flow matching or EDM."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers

from diffusers_curriculum.models.network_config import TWO_TIMES_NAMES
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.sampling import (
    sampling_scheduler,
    schedule_settings,
    scheduler_class,
)
from diffusers_curriculum.training.process.foreign_code import refuse_foreign_code
from diffusers_curriculum.training.process.pipeline_files import check_classes

logger = logging.getLogger(__name__)

FAMILIES = {"ddpm": "vp", "flow": "flow", "edm": "edm", "mean_flow": "flow"}
# Standard deviation of the data that EDM's preconditioning assumes: in pixels, and in latents,
# whose scaling factor makes it about 1.
SIGMA_DATA = {True: 0.5, False: 1.0}
# The scheduler's setting for each flag.
SCHEDULE = {
    "ddpm": {"ddpm_num_steps": "num_train_timesteps", "ddpm_beta_schedule": "beta_schedule"},
    "flow": {"flow_shift": "shift"},
    "mean_flow": {"flow_shift": "shift"},
    "edm": {"sigma_min": "sigma_min", "sigma_max": "sigma_max", "sigma_data": "sigma_data"},
}


def pipeline_index(args: Arguments) -> dict[str, Any]:
    """The model_index.json of --pretrained_model_name_or_path, empty without one.

    Raises:
        UsageError: it cannot be read, brings code of its own, or contradicts the parts' configs.
    """
    path = args.pretrained_model_name_or_path
    if path is None:
        return {}
    read = _read_index if Path(path).exists() else _ask_for_index
    return dict(read(path, args.revision))


def _read_index(path: str, revision: str | None) -> Mapping[str, Any]:
    if not Path(path).is_dir() and Path(path).exists():
        raise UsageError(f"--pretrained_model_name_or_path {path!r} is a file: give its folder.")
    refuse_foreign_code(path, revision)
    try:
        index: Any = diffusers.DiffusionPipeline.load_config(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r} cannot be read "
            f"({' '.join(str(error).split())}). Give a folder or Hub id of a saved pipeline."
        ) from error
    check_classes(path, revision)
    return index


# wanted several times at the start, each time a request to the Hub
_ask_for_index = lru_cache(maxsize=4)(_read_index)


def sigma_data_of(args: Arguments) -> float:
    """The standard deviation of the data that EDM's preconditioning assumes."""
    if args.sigma_data is not None:
        return args.sigma_data
    own = None if args.pretrained_model_name_or_path is None else own_scheduler(args)
    assumed = None if own is None else NoiseLevels.from_scheduler(own).sigma_data
    if assumed is not None:
        return assumed
    vae = args.pretrained_vae_model_name_or_path or any(pipeline_index(args).get("vae") or ())
    return SIGMA_DATA[not vae]


def formulation_of(args: Arguments) -> str:
    """The formulation of a pretrained pipeline; its network tells that it knows two times."""
    named = pipeline_index(args).values()
    if any(isinstance(part, list | tuple) and part[-1] in TWO_TIMES_NAMES for part in named):
        return "mean_flow"
    family = NoiseLevels.from_scheduler(own_scheduler(args)).family
    return next(name for name, kind in FAMILIES.items() if kind == family)


def build_schedulers(args: Arguments, *, pixels: bool, default_vp: str) -> tuple[Any, Any]:
    """The scheduler that adds noise in training, and the one of pictures and pipeline.

    A pretrained pipeline's own, with what the flags change, if it has the formulation asked for.

    Args:
        pixels: whether images are trained on, and not latents.
        default_vp: class for sampling a variance preserving process.
    """
    own = None if args.pretrained_model_name_or_path is None else own_scheduler(args)
    if own is not None and NoiseLevels.from_scheduler(own).family != FAMILIES[args.formulation]:
        logger.warning(
            "--formulation %s replaces the noise levels of the pretrained pipeline, and what its "
            "network predicts",
            args.formulation,
        )
        own = None
    settings = schedule_settings(own) | _settings(args, own is None, pixels)
    kinds = {
        "vp": diffusers.DDPMScheduler,
        "flow": diffusers.FlowMatchEulerDiscreteScheduler,
        "edm": diffusers.EDMEulerScheduler,
    }
    kind: Any = kinds[FAMILIES[args.formulation]]
    base = {} if own is None else dict(own.config)
    try:
        training = kind.from_config(base, **settings)
        NoiseLevels.from_scheduler(training)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"--formulation {args.formulation}: {error}") from error
    fresh = default_vp if args.formulation == "ddpm" else kind.__name__
    name = args.sampling_scheduler or (fresh if own is None else type(own).__name__)
    return training, sampling_scheduler(args, name, training)


def _settings(args: Arguments, fresh: bool, pixels: bool) -> dict[str, Any]:
    """Settings of the training scheduler: all for a fresh one, else those that a flag gives."""
    settings = {
        name: args[flag]
        for flag, name in SCHEDULE[args.formulation].items()
        if fresh or flag in args.given
    }
    if args.formulation == "edm" and fresh:
        # Its range of noise is meant for data of standard deviation 0.5; other data have other
        # noise, unless the flags say which.
        data = args.sigma_data or SIGMA_DATA[pixels]
        ends = [name for name in ("sigma_min", "sigma_max") if name not in args.given]
        settings |= {"sigma_data": data} | {name: args[name] * data / 0.5 for name in ends}
    if args.formulation == "ddpm":
        if args.prediction_type is not None:
            settings["prediction_type"] = args.prediction_type
        if fresh:
            settings["clip_sample"] = pixels
    return settings


def own_scheduler(args: Arguments) -> Any:
    """The scheduler of a pretrained pipeline, of the class that its model_index.json says, as
    diffusers loads it."""
    path, index = args.pretrained_model_name_or_path, pipeline_index(args)
    named = index.get("scheduler")
    name = str(named[1]) if isinstance(named, list | tuple) and len(named) == 2 else ""
    kind = scheduler_class(name, f"--pretrained_model_name_or_path {path!r}: its scheduler")
    try:
        own = kind.from_pretrained(path, subfolder="scheduler", revision=args.revision)
        NoiseLevels.from_scheduler(own)
        return own
    except (OSError, TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r}: its scheduler cannot be loaded ({error}). "
            "Give a saved pipeline's folder or Hub id, and check --revision."
        ) from error
