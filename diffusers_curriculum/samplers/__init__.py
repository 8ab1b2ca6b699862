"""Timestep samplers: which noise levels a training step trains on.

A sampler is one file here, or of one's own: a class with ``@SAMPLERS.register("name", ...)``.
"""

import pkgutil
from importlib import import_module

from diffusers_curriculum.samplers.adaptive import AdaptiveTimestepSampler
from diffusers_curriculum.samplers.auto import AutoTimestepSampler
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSample, TimestepSampler
from diffusers_curriculum.samplers.curriculum import CurriculumTimestepSampler
from diffusers_curriculum.samplers.density import DensityTimestepSampler
from diffusers_curriculum.samplers.description import Report, describe_config
from diffusers_curriculum.samplers.gradient import (
    GradientNormTimestepSampler,
    gradient_norm_samplers,
    per_sample_gradient_norms,
)
from diffusers_curriculum.samplers.information import InformationRateTimestepSampler
from diffusers_curriculum.samplers.interval import IntervalTimestepSampler
from diffusers_curriculum.samplers.loss_based import (
    LossProportionalTimestepSampler,
    LossSecondMomentTimestepSampler,
)
from diffusers_curriculum.samplers.moving import MovingTimestepSampler
from diffusers_curriculum.samplers.sequence import SequenceTimestepSampler
from diffusers_curriculum.samplers.sources import PerSourceTimestepSampler

__all__ = [
    "SAMPLERS",
    "AdaptiveTimestepSampler",
    "AutoTimestepSampler",
    "CurriculumTimestepSampler",
    "DensityTimestepSampler",
    "GradientNormTimestepSampler",
    "InformationRateTimestepSampler",
    "IntervalTimestepSampler",
    "LossProportionalTimestepSampler",
    "LossSecondMomentTimestepSampler",
    "MovingTimestepSampler",
    "PerSourceTimestepSampler",
    "Report",
    "SequenceTimestepSampler",
    "TimestepSample",
    "TimestepSampler",
    "describe_config",
    "gradient_norm_samplers",
    "learning_samplers",
    "named_samplers",
    "per_sample_gradient_norms",
    "sampler_named",
]


def import_all() -> None:
    """Import every module of this folder, so that what they register is known."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def learning_samplers() -> dict[str, type[AdaptiveTimestepSampler]]:
    """The registered samplers that learn their law from losses, by name."""
    kinds = SAMPLERS.items()
    return {name: kind for name, kind in kinds if issubclass(kind, AdaptiveTimestepSampler)}


def named_samplers() -> tuple[str, ...]:
    """The registered names that :func:`sampler_named` knows."""
    return tuple(name for name in SAMPLERS if sampler_named(name) is not None)


def sampler_named(name: str) -> type[TimestepSampler] | None:
    """The registered sampler that is made of a schedule and settings alone; None for other names,
    and for what is made of a density or of other samplers.

    Raises:
        ValueError: an installed package that should register it is broken.
    """
    several = (CurriculumTimestepSampler, SequenceTimestepSampler, PerSourceTimestepSampler)
    kind = SAMPLERS.get(name)
    made_of = (DensityTimestepSampler, IntervalTimestepSampler, *several)
    return None if kind in made_of else kind


import_all()
