"""Pipelines for what diffusers' own do not do: any network, latents and scheduler."""

from diffusers_curriculum.pipelines.class_conditional import ClassConditionalPipeline
from diffusers_curriculum.pipelines.fitting import fitting_pipeline
from diffusers_curriculum.pipelines.unconditional import UnconditionalPipeline

__all__ = ["ClassConditionalPipeline", "UnconditionalPipeline", "fitting_pipeline"]
