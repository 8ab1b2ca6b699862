"""Laws of fine-tuning, of log-SNR or of a flow's noise fraction t; l = 2 ln((1 - t) / t)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.checks import above_zero, checked, not_negative, one_of
from diffusers_curriculum.densities.base import Density, positive, register
from diffusers_curriculum.densities.laws import Normal
from diffusers_curriculum.densities.nested import WeightedMean
from diffusers_curriculum.densities.published import FLUX_LINE, shift_from_tokens
from diffusers_curriculum.densities.shifted import SHIFT_PRESETS

_WITH_LINE = tuple(name for name, preset in SHIFT_PRESETS.items() if preset.line)


@register(
    "style_friendly",
    formula="N(mean, std^2)",
    source="arXiv 2411.14793: mean = -6, std = 2 (3 for some models)",
    families="flow",
    note="Made for fine-tuning on a style, which lies in noisy levels; not for plain training.",
)
@dataclass(frozen=True)
class StyleFriendly(Normal):
    """The normal law of log-SNR, far on the noisy side."""

    mean: float = -6.0
    std: float = positive(2.0)


@register(
    "mixflow",
    formula="t = 1 - sqrt(u), u uniform in (0, 1); F(l) = sig((l + 2 ln shift) / 2)^2",
    source="arXiv 2512.19311: 1 - t ~ Beta(2, 1); fudan-generative-vision/MixFlow",
    families="flow",
    note="One half of the method: the other is the input's slower noise level, the flag "
    "mixflow_gamma, Objective.slowed().",
)
@dataclass(frozen=True)
class MixFlow(Density):
    """The law of MixFlow's post-training of a flow: density 2 (1 - t) of the noise fraction before
    a ``shift``, that of the schedule unless one is given."""

    shift: float | None = checked(above_zero, default=None)

    @classmethod
    def on_clock(cls, parameters: dict[str, Any], shift: float) -> dict[str, Any]:
        return {"shift": shift} | {k: v for k, v in parameters.items() if v is not None}

    def pdf(self, log_snr: Tensor) -> Tensor:
        x = self._unshifted(log_snr)
        return torch.sigmoid(x / 2).square() * torch.sigmoid(-x / 2)

    def cdf(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(self._unshifted(log_snr) / 2).square()

    def sf(self, log_snr: Tensor) -> Tensor:
        noise = torch.sigmoid(-self._unshifted(log_snr) / 2)
        return noise * (2 - noise)

    def icdf(self, probability: Tensor) -> Tensor:
        clean = probability.sqrt()
        noise = (1 - probability) / (1 + clean)  # 1 - sqrt(p), with its digits
        return 2 * (clean.log() - noise.log()) - 2 * math.log(self.shift or 1.0)

    def _unshifted(self, log_snr: Tensor) -> Tensor:
        return log_snr + 2 * math.log(self.shift or 1.0)


@register(
    "qinglong",
    formula="0.8 N(-2 mu, (2 std)^2) + 0.075 N(style_mean, style_std^2) + 0.125 N(detail_mean, "
    "detail_std^2), mu = ln s of the tokens",
    source="kohya-ss/musubi-tuner, qinglong_flux and qinglong_qwen (pull request 407)",
    families="flow",
    note="A shifted logit-normal law, some of style_friendly and some of the cleanest levels. "
    "Ports of an earlier version have shares of 0.79, 0.11 and 0.1.",
    example={"tokens": 4096},
)
@dataclass(frozen=True)
class Qinglong(WeightedMean):
    """A mixture of three laws for fine-tuning flows, drawn through its own cdf.

    Args:
        tokens: image tokens, which the middle law's shift follows along the line of ``preset``.
        preset: a name of ``SHIFT_PRESETS`` that has such a line.
        middle, style, detail: shares of the three, relative to their sum.
        std: of the logit of the noise fraction in the middle law (musubi's sigmoid_scale).
        style_mean, style_std, detail_mean, detail_std: of log-SNR in the others.

    Raises:
        ValueError: a number out of range, or a preset whose shift does not depend on tokens.
    """

    tokens: float = checked(above_zero)
    preset: str = checked(one_of, _WITH_LINE, default="flux")
    middle: float = positive(0.8)
    style: float = checked(not_negative, default=0.075)
    detail: float = checked(not_negative, default=0.125)
    std: float = positive(1.0)
    style_mean: float = -6.0
    style_std: float = positive(2.0)
    detail_mean: float = 5.36
    detail_std: float = positive(1.0)

    @cached_property
    def _parts(self) -> list[tuple[float, Density]]:
        line = SHIFT_PRESETS[self.preset].line or FLUX_LINE
        log_shift = math.log(shift_from_tokens(self.tokens, line))
        return [
            (self.middle, Normal(-2 * log_shift, 2 * self.std)),
            (self.style, Normal(self.style_mean, self.style_std)),
            (self.detail, Normal(self.detail_mean, self.detail_std)),
        ]
