"""The phases of a sequence of samplers, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from diffusers_curriculum.samplers.adaptive_checks import check_choice, check_whole
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSampler

MIXES = ("hard", "linear")
SHARED = ("draw", "floor", "exponent", "seed", "continuous")


def phase_sampler(number: int, phase: Mapping[str, Any]) -> TimestepSampler:
    """The sampler of a phase, built if it is a config.

    Raises:
        ValueError: other keys than "sampler" and "until".
    """
    unknown = sorted(phase.keys() - {"until", "sampler"})
    if unknown or "sampler" not in phase:
        raise ValueError(
            f"phase {number} has {', '.join(sorted(phase)) or 'nothing'}: it takes 'sampler' and "
            "'until' (None for the last phase)."
        )
    given = phase["sampler"]
    return given if isinstance(given, TimestepSampler) else TimestepSampler.from_config(given)


def sampler_for(scheduler: Any, settings: Any) -> TimestepSampler:
    """The sampler for ``scheduler`` with ``settings``, by default a density sampler; a sampler is
    returned as it is.

    Raises:
        ValueError: "_class_name" names no sampler.
    """
    if isinstance(settings, TimestepSampler):
        return settings
    arguments = {k: v for k, v in settings.items() if k not in ("_class_name", "scheduler")}
    name = settings.get("_class_name", "DensityTimestepSampler")
    if name not in SAMPLERS:
        raise ValueError(f"_class_name={name!r} is no sampler: choose from {', '.join(SAMPLERS)}.")
    return SAMPLERS[name].from_scheduler(scheduler, **arguments)


def check_ends(ends: Sequence[Any]) -> None:
    """Raise ValueError unless the steps at which phases end increase, and the last is None."""
    if not ends:
        raise ValueError("phases=[] draws from nothing: give at least one phase.")
    if ends[-1] is not None:
        raise ValueError(f"until={ends[-1]!r} of the last phase must be None: it never ends.")
    for number, (before, end) in enumerate(pairwise([0, *ends[:-1]]), 1):
        check_whole(f"until (of phase {number})", end, before + 1)


def check_alike(first: TimestepSampler, other: TimestepSampler, number: int) -> None:
    """Raise ValueError unless phase ``number`` can follow the first one."""
    for name in SHARED:
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            label = "importance_correction" if name == "exponent" else name
            raise ValueError(
                f"phase {number} has {label}={theirs!r} and phase 1 {mine!r}: give all phases the "
                "same draw, floor, importance_correction, seed and continuous."
            )
    a, b = first.levels, other.levels
    if len(a) != len(b) or not torch.equal(a.log_snr, b.log_snr):
        raise ValueError(f"phase {number} is of another schedule than phase 1: use one scheduler.")


def check_mix(mix: str, mix_steps: int, starts: Sequence[int]) -> None:
    """Raise ValueError for an unknown ``mix``, or a mixture that outlasts a phase."""
    check_choice("mix", mix, MIXES)
    if mix == "hard" and mix_steps != 0:
        raise ValueError(f"mix_steps={mix_steps!r} has no effect with mix='hard': use 'linear'.")
    if mix == "linear":
        check_whole("mix_steps", mix_steps, 1)
        for start, end in pairwise(starts[1:]):
            if mix_steps > end - start:
                raise ValueError(
                    f"mix_steps={mix_steps} is longer than the phase of steps {start} to "
                    f"{end - 1}: three laws would be mixed; choose at most {end - start}."
                )
