"""Tiny pipelines of every family of models."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.parts.families.flow import FlowFamily

FLOWS = {name: f for name, f in families().items() if isinstance(f, FlowFamily)}
RESOLUTION = 16


@cache
def pipeline_of(name: str) -> Path:
    """The tiny pipeline of a family, made once; tests leave it as it is."""
    folder = Path(mkdtemp(prefix=f"tiny-{name}-")) / "pipeline"
    families()[name].save_tiny(folder)
    return folder
