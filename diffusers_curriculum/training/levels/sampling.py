"""The scheduler of pictures and pipelines, and whether it can sample what is trained."""

from __future__ import annotations

import inspect
import math
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.pipelines.denoising import LEARNED_VARIANCE, denoise
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError

# What the levels of a variance preserving process come from; classes differ in their defaults, and
# diffusers hands a default value on as "the default".
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def scheduler_class(name: str, what: str) -> Any:
    kind = getattr(diffusers, name, None)
    known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not known or kind is SchedulerMixin:
        raise UsageError(
            f"{what} is {name!r}, which is no scheduler of diffusers: give one such as "
            "DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler or "
            "EDMEulerScheduler."
        )
    return kind


def sampling_scheduler(args: Arguments, name: str, training: Any) -> Any:
    """The scheduler for sampling, if it can sample what is trained."""
    kind = scheduler_class(name, "--sampling_scheduler")
    levels = NoiseLevels.from_scheduler(training)
    settings = schedule_settings(training)
    if args.learned_variance == "vlb" and kind is DDPMScheduler:
        settings["variance_type"] = "learned_range"
    settings |= _own_settings(kind, args.sampling_scheduler_args)
    try:
        scheduler = kind.from_config(dict(training.config), **settings)
        scheduler = with_prediction_type(scheduler, levels.prediction_type)
        found = NoiseLevels.from_scheduler(scheduler)
    except (ValueError, NotImplementedError, TypeError, ImportError) as error:
        raise UsageError(
            f"--sampling_scheduler {name}: {error}. Give another --sampling_scheduler, such as "
            f"{type(training).__name__}, or change what it refuses."
        ) from error
    fault = _fault(scheduler) or _difference(levels, found)
    if fault is not None:
        raise UsageError(
            f"--sampling_scheduler {name} cannot sample --formulation {args.formulation} with "
            f"prediction type {levels.prediction_type!r} ({fault}): leave it out, or give one that "
            "can."
        )
    return scheduler


def _own_settings(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """--sampling_scheduler_args, if the class takes them and the training does not say them."""
    known = inspect.signature(kind.__init__).parameters
    for name, value in given.items():
        if name not in known or name in (*_SCHEDULE, "prediction_type", "self"):
            reason = "what is trained says it" if name in known else "it has no such setting"
            raise UsageError(
                f"--sampling_scheduler_args has {name}={value}, which {kind.__name__} cannot take: "
                f"{reason}. Drop it."
            )
    return given


def with_prediction_type(scheduler: Any, prediction_type: str | None) -> Any:
    """A copy of ``scheduler`` that knows what the network was trained to predict.

    Args:
        prediction_type: None leaves the scheduler's own.

    Raises:
        ValueError: the scheduler can only take another kind of prediction.
    """
    if prediction_type is None:
        return type(scheduler).from_config(scheduler.config)
    if "prediction_type" in scheduler.config:
        # diffusers' words
        words = {"flow": "flow_prediction", "edm": "epsilon"}
        name = words.get(prediction_type, prediction_type)
        return type(scheduler).from_config(scheduler.config, prediction_type=name)
    if not prediction_type.startswith("flow"):
        raise ValueError(
            f"{type(scheduler).__name__} has no prediction_type, so it cannot take "
            f"{prediction_type!r}; use a scheduler that has one, or a flow model"
        )
    return type(scheduler).from_config(scheduler.config)


def sampling_fault(scheduler: Any) -> str | None:
    """Why StableDiffusionPipeline cannot draw with a scheduler, or None; found by one step.

    Some schedulers refuse a prediction type only when they sample, and flow matching ones lack what
    this pipeline asks for.
    """
    probe = type(scheduler).from_config(scheduler.config)
    try:
        with torch.random.fork_rng(devices=[]):
            probe.set_timesteps(4)
            sample = torch.zeros(1, 4, 8, 8) * probe.init_noise_sigma
            at = probe.timesteps[0]
            probe.step(probe.scale_model_input(sample, at), at, sample)
    except Exception as error:  # whatever a scheduler raises, it would raise after hours too
        return f"{type(error).__name__}: {error}"
    return None


def schedule_settings(scheduler: Any) -> dict[str, Any]:
    """The settings that the noise levels of ``scheduler`` come from, by their values."""
    if scheduler is None or NoiseLevels.from_scheduler(scheduler).family != "vp":
        return {}
    return {name: scheduler.config[name] for name in _SCHEDULE if name in scheduler.config}


def most_steps(scheduler: Any) -> float:
    """Denoising steps that a scheduler can do; only a table of noise levels has an end."""
    levels = NoiseLevels.from_scheduler(scheduler)
    return len(levels) if levels.family == "vp" else math.inf


def check_steps(scheduler: Any, steps: int, flag: str) -> None:
    """Raise UsageError where a scheduler cannot do that many, or that few, denoising steps."""
    probe = type(scheduler).from_config(scheduler.config)
    shift = {"mu": 0.0} if probe.config.get("use_dynamic_shifting") else {}
    most = most_steps(probe)
    try:
        if steps > most:
            raise ValueError(f"it knows {most} noise levels")
        probe.set_timesteps(steps, **shift)
    except (ValueError, IndexError, RuntimeError) as error:
        raise UsageError(
            f"{flag} is {steps}, which {type(probe).__name__} cannot do ({error}): give another "
            "number of denoising steps."
        ) from error


def _difference(trained: NoiseLevels, sampled: NoiseLevels) -> str | None:
    """Why a network trained on one schedule is not asked right on another, or None."""
    if sampled.family != trained.family:
        return f"it is of family {sampled.family}"
    if trained.family != "vp":  # there the network is told the noise level itself
        return None
    # A terminal SNR of zero is a very small one where a scheduler divides by it.
    both = [levels.log_snr.clamp(min=-16.0) for levels in (trained, sampled)]
    same = len(trained) == len(sampled) and torch.allclose(*both, rtol=1e-3, atol=1e-3)
    return None if same else "it makes other noise levels of the same settings"


def _fault(scheduler: Any) -> str | None:
    """Why a scheduler cannot sample, or None; found by a few steps, as some refuse only then."""
    probe = type(scheduler).from_config(scheduler.config)
    learned = scheduler.config.get("variance_type") in LEARNED_VARIANCE
    try:
        denoise(
            lambda latents, timesteps, progress: torch.cat([latents] * (2 if learned else 1), 1),
            probe,
            torch.zeros(1, 4, 8, 8),
            4,
            torch.Generator().manual_seed(0),
            tokens=64,
        )
    except Exception as error:  # whatever a scheduler raises, it would raise after hours too
        return f"{type(error).__name__}: {error}"
    return None
