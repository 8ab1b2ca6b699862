"""Samplers that the tests of pictures and previews share."""

from __future__ import annotations

from typing import Any

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from tests.floors_fixtures import SCHEDULERS


def laplace(scheduler: str = "sd", **config: Any) -> TimestepSampler:
    """A wide Laplace law without a floor."""
    settings = {"density": "laplace", "density_args": {"mu": 1.0, "b": 2.0}, "floor": 0.0}
    return DensityTimestepSampler.from_scheduler(SCHEDULERS[scheduler](), **(settings | config))


def curriculum(pacing: str = "fixed", **numbers: Any) -> CurriculumTimestepSampler:
    """Four clusters of it."""
    return CurriculumTimestepSampler(laplace(), clusters=4, pacing=pacing, pacing_args=numbers)
