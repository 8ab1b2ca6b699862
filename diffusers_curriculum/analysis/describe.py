"""A sampler in words, for titles."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers_curriculum.samplers import CurriculumTimestepSampler, TimestepSampler
from diffusers_curriculum.samplers.sequence import SequenceTimestepSampler

_SILENT = {"scheduler", "seed", "density", "density_args", "base", "phases"}


def describe_sampler(sampler: TimestepSampler) -> str:
    """One line: ``laplace(mu=0, b=1), floor=0.1; 20 clusters, easy_to_hard, patience``."""
    if isinstance(sampler, CurriculumTimestepSampler):
        clusters = f"{sampler.stages} clusters, {sampler.order}, {sampler.pacing.name}"
        balanced = ", balanced" if sampler.within == "balanced" else ""
        return f"{describe_sampler(sampler.base)}; {clusters}{balanced}"
    if isinstance(sampler, SequenceTimestepSampler):
        pairs = zip(sampler.starts, sampler.samplers, strict=True)
        phases = [f"{describe_sampler(phase)} from step {start}" for start, phase in pairs]
        return ", then ".join(phases)
    config = dict(getattr(sampler, "config", {}))
    name = str(config.get("density") or _name(type(sampler)))
    arguments = _arguments(config.get("density_args") or {})
    return ", ".join([name + arguments, *_told(type(sampler), config)])


def _told(kind: type[TimestepSampler], config: Mapping[str, Any]) -> Iterator[str]:
    """The settings that are not the class's own defaults; the floor unless it is 0."""
    parameters = inspect.signature(kind).parameters
    for key, value in config.items():
        if key in _SILENT or key not in parameters or not isinstance(value, int | float | str):
            continue
        default = 0 if key == "floor" else parameters[key].default
        if default is not None and value != default:
            yield f"{key}={value}"


def _arguments(arguments: Mapping[str, Any]) -> str:
    shown = [f"{k}={v if len(str(v)) < 24 else '...'}" for k, v in arguments.items()]
    return f"({', '.join(shown)})" if shown else ""


def _name(kind: type[TimestepSampler]) -> str:
    entry = getattr(kind, "entry", None)
    return entry.name if entry is not None else kind.__name__
