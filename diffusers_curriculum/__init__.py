"""Curricula and importance sampling over noise levels for training diffusers models."""

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.randomness import Slots
from diffusers_curriculum.samplers import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    GradientNormTimestepSampler,
    InformationRateTimestepSampler,
    LossProportionalTimestepSampler,
    LossSecondMomentTimestepSampler,
    SequenceTimestepSampler,
    TimestepSample,
    TimestepSampler,
)
from diffusers_curriculum.weighting import loss_weights
from diffusers_curriculum.weighting.learned import LearnedLossWeights, UncertaintyWeighting

__version__ = "0.1.0"

__all__ = [
    "CurriculumTimestepSampler",
    "DensityTimestepSampler",
    "GradientNormTimestepSampler",
    "InformationRateTimestepSampler",
    "LearnedLossWeights",
    "LossProportionalTimestepSampler",
    "LossSecondMomentTimestepSampler",
    "NoiseLevels",
    "Objective",
    "SequenceTimestepSampler",
    "Slots",
    "TimestepSample",
    "TimestepSampler",
    "UncertaintyWeighting",
    "loss_weights",
]
