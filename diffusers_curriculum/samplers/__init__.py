"""Timestep samplers: which noise levels a training step trains on."""

from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSample, TimestepSampler
from diffusers_curriculum.samplers.curriculum import CurriculumTimestepSampler
from diffusers_curriculum.samplers.density import DensityTimestepSampler

__all__ = [
    "SAMPLERS",
    "CurriculumTimestepSampler",
    "DensityTimestepSampler",
    "TimestepSample",
    "TimestepSampler",
]
