"""A positive curve through points: cubic on each interval, integrated exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Curve:
    """A cubic on each of the K - 1 intervals between knots, 0 outside."""

    knots: Tensor  # (K,) float64, increasing
    values: Tensor  # (K,) at the knots, 0 or more
    left: Tensor  # (K-1,) slope at the beginning of each interval
    right: Tensor  # (K-1,) slope at its end

    def __call__(self, x: Tensor) -> Tensor:
        inside = (x >= self.knots[0]) & (x <= self.knots[-1])
        return torch.where(inside, self._on(self._interval(x), x), 0.0)

    def below(self, x: Tensor) -> Tensor:
        """Integral up to x, a sum of terms none of which is negative."""
        x, i = x.clamp(self.knots[0], self.knots[-1]), self._interval(x)
        return self._shares[0][i] + self._integral(i, self.knots[i], x)

    def above(self, x: Tensor) -> Tensor:
        """Integral from x on."""
        x, i = x.clamp(self.knots[0], self.knots[-1]), self._interval(x)
        return self._shares[1][i + 1] + self._integral(i, x, self.knots[i + 1])

    @cached_property
    def total(self) -> float:
        """Integral over all intervals."""
        return float(self._shares[0][-1])

    @cached_property
    def _shares(self) -> tuple[Tensor, Tensor]:
        """(K,) integral below and above each knot."""
        each = torch.arange(len(self.left))
        parts = self._integral(each, self.knots[:-1], self.knots[1:])
        zero = torch.zeros_like(parts[:1])
        above = parts.flip(0).cumsum(0).flip(0)
        return torch.cat([zero, parts.cumsum(0)]), torch.cat([above, zero])

    def _integral(self, interval: Tensor, low: Tensor, high: Tensor) -> Tensor:
        # two Gauss points are exact for a cubic, and add nothing negative
        middle, half = (low + high) / 2, (high - low) / 2
        offset = half / math.sqrt(3)
        return half * (self._on(interval, middle - offset) + self._on(interval, middle + offset))

    def _on(self, interval: Tensor, x: Tensor) -> Tensor:
        """The cubic of an interval at x, in Hermite's form."""
        start, end = self.knots[interval], self.knots[interval + 1]
        width = end - start
        s, r = ((x - start) / width).clamp(0, 1), ((end - x) / width).clamp(0, 1)
        first = r.square() * ((1 + 2 * s) * self.values[interval] + s * width * self.left[interval])
        second = s.square() * (
            (1 + 2 * r) * self.values[interval + 1] - r * width * self.right[interval]
        )
        return (first + second).clamp_min(0.0)

    def _interval(self, x: Tensor) -> Tensor:
        return torch.searchsorted(self.knots[1:-1], x.contiguous(), right=True)


def straight_lines(knots: Tensor, values: Tensor) -> Curve:
    """Straight lines from point to point."""
    slopes = values.diff() / knots.diff()
    return Curve(knots, values, slopes, slopes)


def monotone_cubic(knots: Tensor, values: Tensor) -> Curve:
    """The smooth curve that rises and falls only where the points do (Fritsch and Butland, 1984,
    SIAM J. Sci. Stat. Comput. 5, 300): never below the lower of two neighbouring points."""
    if len(knots) == 2:
        return straight_lines(knots, values)
    widths = knots.diff()
    secants = values.diff() / widths
    before, after = widths[:-1], widths[1:]
    first, second = secants[:-1], secants[1:]
    # a weighted harmonic mean, at most three times the smaller secant; 0 at a turn
    weight_first, weight_second = before + 2 * after, 2 * before + after
    mean = (weight_first + weight_second) / (weight_first / first + weight_second / second)
    inner = torch.where(first.sign() * second.sign() > 0, mean, 0.0)
    start = _end_slope(widths[0], widths[1], secants[0], secants[1])
    end = _end_slope(widths[-1], widths[-2], secants[-1], secants[-2])
    slopes = torch.cat([start, inner, end])
    return Curve(knots, values, slopes[:-1], slopes[1:])


def _end_slope(near: Tensor, far: Tensor, secant: Tensor, next_secant: Tensor) -> Tensor:
    """(1,) slope of the parabola through three points at their end, kept monotone."""
    slope = ((2 * near + far) * secant - near * next_secant) / (near + far)
    turns = secant.sign() != next_secant.sign()
    slope = torch.where(turns & (slope.abs() > 3 * secant.abs()), 3 * secant, slope)
    return torch.where(slope.sign() == secant.sign(), slope, 0.0).reshape(1)
