"""Tiny pipelines of every family of models."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.parts.families.flow import FlowFamily

# of all families, those that the installed diffusers is new enough for
PRESENT = {name: f for name, f in families().items() if f.is_supported}
FLOWS = {name: f for name, f in PRESENT.items() if isinstance(f, FlowFamily)}
RESOLUTION = 16


@cache
def pipeline_of(name: str) -> Path:
    """The tiny pipeline of a family, made once; tests leave it as it is."""
    if name not in PRESENT:
        pytest.skip(f"{families()[name].pipeline} needs a newer diffusers")
    folder = Path(mkdtemp(prefix=f"tiny-{name}-")) / "pipeline"
    families()[name].save_tiny(folder)
    return folder
