"""The shift of flow matching: the noise fraction t becomes s t / (1 + (s - 1) t).

In log-SNR that is l - 2 ln s, for every law and every family of schedules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusers_curriculum.checks import above_zero, checked
from diffusers_curriculum.densities.base import SymmetricDensity

# FLUX: mu = ln s is a line through these two points of (image tokens, mu), and is not clamped.
_FLUX = (256, 0.5), (4096, 1.15)


def shift_from_pixels(pixels: float, base_pixels: float) -> float:
    """s = sqrt(pixels / base_pixels), the resolution rule of arXiv 2403.03206 (numbers of pixels,
    1024 * 1024, not lengths).

    Raises:
        ValueError: a number is not positive.
    """
    above_zero("pixels", pixels)
    above_zero("base_pixels", base_pixels)
    return math.sqrt(pixels / base_pixels)


def log_shift_from_tokens(tokens: float) -> float:
    """mu = ln s, linear in the number of image tokens: 0.5 at 256, 1.15 at 4096 (FLUX; diffusers'
    ``calculate_shift``), not clamped.

    Raises:
        ValueError: the number is not positive.
    """
    above_zero("tokens", tokens)
    (first, low), (last, high) = _FLUX
    return low + (tokens - first) * (high - low) / (last - first)


def shift_from_tokens(tokens: float) -> float:
    """s = e^mu, see :func:`log_shift_from_tokens`: 1.6487 at 256 image tokens, 3.1582 at 4096.

    Raises:
        ValueError: the number is not positive.
    """
    return math.exp(log_shift_from_tokens(tokens))


@dataclass(frozen=True, kw_only=True)
class Shifted(SymmetricDensity):
    """A law of the unshifted noise fraction, moved to l - 2 ln s.

    At most one of ``shift``, ``tokens`` and ``pixels`` with ``base_pixels`` says what s is; without
    them it is 1. A schedule that is shifted itself does not move the law: pass its shift here to
    sample as its authors do.

    Raises:
        ValueError: more than one of them, or pixels without base_pixels.
    """

    shift: float | None = checked(above_zero, default=None)
    tokens: float | None = checked(above_zero, default=None)
    pixels: float | None = checked(above_zero, default=None)
    base_pixels: float | None = checked(above_zero, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("shift", "tokens", "pixels")
        given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say what the shift is: give one of them.")
        if (self.pixels is None) != (self.base_pixels is None):
            raise ValueError(
                f"pixels={self.pixels!r} and base_pixels={self.base_pixels!r} go together: the "
                "shift is sqrt(pixels / base_pixels)."
            )

    @property
    def log_shift(self) -> float:
        """ln s."""
        if self.tokens is not None:
            return log_shift_from_tokens(self.tokens)
        if self.pixels is not None and self.base_pixels is not None:
            return math.log(shift_from_pixels(self.pixels, self.base_pixels))
        return math.log(self.shift) if self.shift is not None else 0.0

    @property
    def _centre(self) -> float:
        return -2 * self.log_shift
