"""A sampler from a file: as ``save_pretrained`` writes it, or written by hand."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import SAMPLERS, TimestepSampler
from diffusers_curriculum.training.errors import UsageError


def sampler_of_file(path: str, scheduler: Any, seed: int) -> TimestepSampler:
    """The sampler whose config a file holds, for a run with this scheduler and seed.

    A file by hand may name the sampler by ``type``, as the catalogue does, and leave out the
    scheduler and the seed, which are then those of the run.

    Raises:
        UsageError: the file cannot be read, holds no config, or one for another schedule.
        ValueError: an unknown sampler or setting.
    """
    sampler = TimestepSampler.from_config(completed(_read(path), scheduler, seed))
    levels = NoiseLevels.from_scheduler(scheduler)
    mine, theirs = levels.log_snr, sampler.levels.log_snr
    if mine.shape != theirs.shape or not torch.allclose(mine, theirs, atol=1e-6, equal_nan=True):
        raise UsageError(
            f"--timestep_sampler {path} is for a schedule of {len(theirs)} levels, log-SNR "
            f"{float(theirs[-1]):.3f} to {float(theirs[0]):.3f}; the model's has {len(mine)}, "
            f"{float(mine[-1]):.3f} to {float(mine[0]):.3f}: make the file for this scheduler."
        )
    return sampler


def completed(config: Mapping[str, Any], scheduler: Any, seed: int) -> dict[str, Any]:
    """A config with its class by name, and with the scheduler and the seed where it leaves them
    out, in all samplers that it is made of; ValueError for an unknown name."""
    found = dict(config)
    if "type" in found:
        found.setdefault("_class_name", SAMPLERS.look_up(found.pop("type")).__name__)
    if isinstance(found.get("base"), Mapping):
        return found | {"base": completed(found["base"], scheduler, seed)}
    if isinstance(found.get("laws"), list):
        return found | {"laws": [completed(each, scheduler, seed) for each in found["laws"]]}
    if isinstance(found.get("phases"), list):
        return found | {"phases": [_phase(each, scheduler, seed) for each in found["phases"]]}
    takes = inspect.signature(TimestepSampler.kind_of(found)).parameters
    left_out = {"scheduler": scheduler, "seed": seed}
    return {name: value for name, value in left_out.items() if name in takes} | found


def _phase(phase: Any, scheduler: Any, seed: int) -> Any:
    if not isinstance(phase, Mapping) or not isinstance(phase.get("sampler"), Mapping):
        return phase  # the sequence says what is wrong with it
    return {**phase, "sampler": completed(phase["sampler"], scheduler, seed)}


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--timestep_sampler {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"--timestep_sampler {path} is no JSON file: {error}.") from error
    if not isinstance(content, dict) or not content.keys() & {"_class_name", "type"}:
        raise UsageError(
            f"--timestep_sampler {path} names no sampler: it must hold an object with its "
            '"_class_name", or with a "type" of the catalogue, such as {"type": "moving"}.'
        )
    return content
