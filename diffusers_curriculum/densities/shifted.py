"""A law moved towards noise as a flow's schedule is: by a number, a number of image tokens or of
latent values, or the preset of a family of models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusers_curriculum.checks import above_zero, checked, finite, inside, refuse
from diffusers_curriculum.densities.base import DENSITIES, Density, make_density, register
from diffusers_curriculum.densities.nested import Nested
from diffusers_curriculum.densities.published import (
    FLUX_LINE,
    Line,
    shift_from_pixels,
    shift_from_tokens,
)

_KINDS = ("preset", "shift", "tokens", "pixels", "dimensions")
_BASE_DIMENSIONS = 4096
_LINE_FORM = "two points [tokens, mu], such as [[256,0.5],[4096,1.15]]"


class Preset(NamedTuple):
    """How a family of models is trained: one shift, or a line of mu = ln(shift) in image tokens.

    Attributes:
        source: the code that trains so.
        shift: where it is one for all sizes.
        line: two points (image tokens, mu).
        terminal: noise fraction of the cleanest level that is trained.
    """

    source: str
    shift: float | None = None
    line: Line | None = None
    terminal: float = 0.0


# Shifts of training; those that pipelines sample with may be others.
SHIFT_PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "flux": Preset("kohya-ss/musubi-tuner, kohya-ss/sd-scripts: flux_shift", line=FLUX_LINE),
        "flux2": Preset("kohya-ss/musubi-tuner: flux2_shift", line=FLUX_LINE),
        "qwen-image": Preset(
            "kohya-ss/musubi-tuner: qwen_shift; DiffSynth-Studio, with the terminal",
            line=((256, 0.5), (8192, 0.9)),
            terminal=0.02,
        ),
        "krea2": Preset("kohya-ss/musubi-tuner: krea2_shift", line=((256, 0.5), (6400, 1.15))),
        "ltx-2": Preset("DiffSynth-Studio", line=((1024, 0.95), (4096, 2.05)), terminal=0.1),
        "sd3": Preset("the scheduler of SD3's pipelines", shift=3.0),
        "wan-musubi": Preset("kohya-ss/musubi-tuner", shift=3.0),
        "wan-diffsynth": Preset("DiffSynth-Studio", shift=5.0),
        "z-image-musubi": Preset("kohya-ss/musubi-tuner", shift=2.0),
        "z-image-diffsynth": Preset("DiffSynth-Studio", shift=3.0),
    }
)
"""The shift that each family of models is trained with, by its name."""


def shift_from_dimensions(dimensions: float, base: float = _BASE_DIMENSIONS) -> float:
    """s = sqrt(dimensions / base), of the number of values in a latent, channels x height x width
    (bytetriper/RAE); ValueError for a number that is not positive."""
    above_zero("dimensions", dimensions)
    above_zero("base_dimensions", base)
    return math.sqrt(dimensions / base)


@register(
    "shifted",
    formula="t' = 1 - (1 - terminal) (1 - t_s), t_s = s t / (1 + (s - 1) t); without terminal l - "
    "2 ln s",
    source="arXiv 2403.03206; diffusers, FlowMatchEulerDiscreteScheduler; bytetriper/RAE",
    note="s is shift, e^mu with mu on a line in image tokens, sqrt(pixels / base_pixels) or "
    "sqrt(dimensions / 4096). A law with a shift of its own is taken without it.",
    example={"density": "logit_normal", "preset": "qwen-image", "tokens": 4096},
)
@dataclass(frozen=True, eq=False)
class ShiftedLaw(Nested):
    """Another law, with the noise fraction t of its levels moved as a schedule's is; the same in
    log-SNR on every family of schedules, whatever shift the schedule has itself.

    Args:
        density: name of a density; its parameters stand beside, or under ``density_args``.
        preset: a name of ``SHIFT_PRESETS``, with ``tokens`` where its shift depends on them.
        shift: s itself.
        tokens: image tokens, after the network has joined pixels to patches.
        line: two points [tokens, mu], mu = ln s; default FLUX's, 256 -> 0.5 and 4096 -> 1.15.
        pixels, base_pixels: s = sqrt(pixels / base_pixels).
        dimensions: values in a latent, s = sqrt(dimensions / 4096).
        terminal: noise fraction that the cleanest level is stretched to, as diffusers'
            ``shift_terminal``, for a schedule of many steps; default the preset's, else 0.

    Raises:
        ValueError: no shift, two, one that a preset says already, or what the density refuses.
    """

    preset: str | None = checked(None, default=None)
    shift: float | None = checked(above_zero, default=None)
    tokens: float | None = checked(above_zero, default=None)
    line: list[list[float]] | None = checked(None, default=None)
    pixels: float | None = checked(above_zero, default=None)
    base_pixels: float | None = checked(above_zero, default=None)
    dimensions: float | None = checked(above_zero, default=None)
    terminal: float | None = checked(inside, 0, 1, "[)", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_one_shift()
        _ = self.log_shift, self._inner

    @property
    def support(self) -> tuple[float, float]:
        ends = torch.tensor(self._inner.support, dtype=torch.float64)
        low, high = self._moved(ends).tolist()
        return low, high

    def pdf(self, log_snr: Tensor) -> Tensor:
        inner = self._inner.pdf(self._original(log_snr))
        if not self._terminal:
            return inner
        noise = torch.sigmoid(-log_snr / 2)
        slope = noise * (1 - self._terminal) / (noise - self._terminal)
        return torch.where(noise > self._terminal, inner * slope, 0.0)

    def cdf(self, log_snr: Tensor) -> Tensor:
        return self._inner.cdf(self._original(log_snr))

    def sf(self, log_snr: Tensor) -> Tensor:
        return self._inner.sf(self._original(log_snr))

    def icdf(self, probability: Tensor) -> Tensor:
        return self._moved(self._inner.icdf(probability))

    def masses(self, edges: Tensor) -> Tensor:
        return self._inner.masses(self._original(edges))

    @cached_property
    def log_shift(self) -> float:
        """ln s."""
        preset = self._preset
        if preset is not None and preset.shift is not None:
            return math.log(preset.shift)
        if self.tokens is not None:
            line = preset.line if preset is not None and preset.line else _line(self.line)
            return math.log(shift_from_tokens(self.tokens, line))
        if self.pixels is not None and self.base_pixels is not None:
            return math.log(shift_from_pixels(self.pixels, self.base_pixels))
        if self.dimensions is not None:
            return math.log(shift_from_dimensions(self.dimensions))
        return math.log(self.shift or 1.0)

    def _moved(self, log_snr: Tensor) -> Tensor:
        """Where a level of the inner law lies."""
        x = log_snr - 2 * self.log_shift
        if not self._terminal:
            return x
        kept = 1 - self._terminal
        noise = torch.sigmoid(-x / 2) + self._terminal * torch.sigmoid(x / 2)
        return 2 * (logsigmoid(x / 2) + math.log(kept) - noise.log())

    def _original(self, log_snr: Tensor) -> Tensor:
        """The level of the inner law that lies at ``log_snr``; infinity beyond the cleanest."""
        x = log_snr
        if self._terminal:
            noise = (torch.sigmoid(-x / 2) - self._terminal).clamp_min(0.0)
            x = 2 * (logsigmoid(x / 2) - noise.log())
        return x + 2 * self.log_shift

    @cached_property
    def _inner(self) -> Density:
        arguments = dict(self.density_args or {})
        if "shift" in {f.name for f in fields(DENSITIES.look_up(self.density))}:
            twice = sorted({"shift", "tokens", "pixels"} & arguments.keys())
            if twice:
                raise ValueError(
                    f"density_args has {twice[0]}={arguments[twice[0]]!r}, a shift of its own: say "
                    "once how far the law moves."
                )
            arguments["shift"] = 1.0
        return make_density(self.density, self.edges, **arguments)

    @property
    def _preset(self) -> Preset | None:
        if self.preset is None:
            return None
        if self.preset not in SHIFT_PRESETS:
            refuse(f"preset={self.preset!r}", self.preset, SHIFT_PRESETS)
        return SHIFT_PRESETS[self.preset]

    @property
    def _terminal(self) -> float:
        if self.terminal is not None:
            return self.terminal
        return 0.0 if self._preset is None else self._preset.terminal

    def _check_one_shift(self) -> None:
        preset = self._preset
        given = [name for name in _KINDS if getattr(self, name) is not None]
        allowed = ["preset", "tokens"] if preset is not None and preset.line else given[:1]
        if given != allowed and preset is not None and preset.line and given == ["preset"]:
            raise ValueError(f"preset={self.preset!r} needs tokens, the number of image tokens.")
        if given != allowed or (not given and self.terminal is None):
            shown = " and ".join(f"{name}={getattr(self, name)!r}" for name in given) or "nothing"
            raise ValueError(
                f"{shown} says how far the law moves: give one of {', '.join(_KINDS)}."
            )
        if self.line is not None and given != ["tokens"]:
            raise ValueError(f"line={self.line!r} has no effect without tokens alone: drop it.")
        if (self.pixels is None) != (self.base_pixels is None):
            raise ValueError(
                f"pixels={self.pixels!r} and base_pixels={self.base_pixels!r} go together."
            )


def _line(points: Any) -> Line:
    """A line through two points, FLUX's by default."""
    if points is None:
        return FLUX_LINE
    pairs = points if isinstance(points, Sequence) and not isinstance(points, str) else ()
    if len(pairs) != 2 or not all(isinstance(p, Sequence) and len(p) == 2 for p in pairs):
        raise ValueError(f"line={points!r} is not a line: write {_LINE_FORM}.")
    (first, low), (last, high) = pairs
    for name, number in (
        ("line[0]", first),
        ("line[0]", low),
        ("line[1]", last),
        ("line[1]", high),
    ):
        finite(name, number)
    if first == last:
        raise ValueError(
            f"line={points!r} has both points at {first!r} tokens: write {_LINE_FORM}."
        )
    return (first, low), (last, high)
