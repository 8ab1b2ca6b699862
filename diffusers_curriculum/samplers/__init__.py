"""Timestep samplers: which noise levels a training step trains on."""

from diffusers_curriculum.samplers.adaptive import AdaptiveTimestepSampler
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSample, TimestepSampler
from diffusers_curriculum.samplers.curriculum import CurriculumTimestepSampler
from diffusers_curriculum.samplers.density import DensityTimestepSampler
from diffusers_curriculum.samplers.gradient import (
    GradientNormTimestepSampler,
    gradient_norm_samplers,
    per_sample_gradient_norms,
)
from diffusers_curriculum.samplers.information import InformationRateTimestepSampler
from diffusers_curriculum.samplers.loss_based import (
    LossProportionalTimestepSampler,
    LossSecondMomentTimestepSampler,
)
from diffusers_curriculum.samplers.sequence import SequenceTimestepSampler

__all__ = [
    "SAMPLERS",
    "AdaptiveTimestepSampler",
    "CurriculumTimestepSampler",
    "DensityTimestepSampler",
    "GradientNormTimestepSampler",
    "InformationRateTimestepSampler",
    "LossProportionalTimestepSampler",
    "LossSecondMomentTimestepSampler",
    "SequenceTimestepSampler",
    "TimestepSample",
    "TimestepSampler",
    "gradient_norm_samplers",
    "per_sample_gradient_norms",
]
