"""Pipelines for what diffusers' own do not do: any network, latents and scheduler."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_curriculum.pipelines.class_conditional import ClassConditionalPipeline
    from diffusers_curriculum.pipelines.fitting import fitting_pipeline
    from diffusers_curriculum.pipelines.image_tokens import ImageTokenPipeline
    from diffusers_curriculum.pipelines.unconditional import UnconditionalPipeline

__all__ = [
    "ClassConditionalPipeline",
    "ImageTokenPipeline",
    "UnconditionalPipeline",
    "fitting_pipeline",
]

_MODULES = {
    "ClassConditionalPipeline": "class_conditional",
    "ImageTokenPipeline": "image_tokens",
    "UnconditionalPipeline": "unconditional",
    "fitting_pipeline": "fitting",
}


def __getattr__(name: str) -> Any:
    """Import a pipeline when it is asked for: it takes seconds, and `denoising` needs none."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
