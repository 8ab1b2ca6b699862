"""Every density of the catalogue, computed another way: by scipy, mpmath or brute force.

An oracle has ``pdf``, ``cdf``, ``sf`` and ``ppf`` of numpy arrays of log-SNR (or probability), and
``median()``, as scipy's frozen laws do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
from scipy import special, stats
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

DIGITS = 40  # of log-SNR up to 50 or so, by plain subtraction


def _each(function: Callable[[Any], Any], values: Any) -> np.ndarray:
    with mpmath.workdps(DIGITS):
        flat = [float(function(mpmath.mpf(float(v)))) for v in np.ravel(values)]
    return np.array(flat).reshape(np.shape(values))


@dataclass(frozen=True)
class FlowLaw:
    """A law of the noise fraction t of a flow, symmetric in t, and shifted by ``shift``.

    Attributes:
        density: p(t), mpmath.
        distribution: P(T <= t), mpmath.
        quantile: its inverse, mpmath.
    """

    density: Callable[[Any], Any]
    distribution: Callable[[Any], Any]
    quantile: Callable[[Any], Any]
    shift: float = 1.0

    def _noise_fraction(self, log_snr: Any) -> Any:
        """t before the shift."""
        return 1 / (1 + mpmath.exp(log_snr / 2 + mpmath.log(self.shift)))

    def _pdf(self, log_snr: Any) -> Any:
        if mpmath.isinf(log_snr):
            return 0
        t = self._noise_fraction(log_snr)
        return self.density(t) * t * (1 - t) / 2

    def _cdf(self, log_snr: Any) -> Any:
        if mpmath.isinf(log_snr):
            return 1 if log_snr > 0 else 0
        return 1 - self.distribution(self._noise_fraction(log_snr))

    def _ppf(self, p: Any) -> Any:
        t = self.quantile(1 - p)
        return 2 * mpmath.log((1 - t) / t) - 2 * mpmath.log(self.shift)

    def pdf(self, log_snr: Any) -> np.ndarray:
        return _each(self._pdf, log_snr)

    def cdf(self, log_snr: Any) -> np.ndarray:
        return _each(self._cdf, log_snr)

    def sf(self, log_snr: Any) -> np.ndarray:
        return _each(lambda x: 1 - self._cdf(x), log_snr)

    def ppf(self, p: Any) -> np.ndarray:
        return _each(self._ppf, p)

    def median(self) -> float:
        return float(-2 * np.log(self.shift))


def mode_map(u: Any, scale: float) -> Any:
    """The map of arXiv 2403.03206, as printed there: u uniform to t."""
    return 1 - u - scale * (mpmath.cos(mpmath.pi * u / 2) ** 2 - 1 + u)


def mode(scale: float, shift: float = 1.0) -> FlowLaw:
    """By the printed map, solved for u."""

    def position(t: Any) -> Any:
        """u with mode_map(u) = t."""
        near_end = min(t, 1 - t)
        if near_end < mpmath.mpf("1e-8"):  # the map is all but straight there
            guess = near_end / (1 + scale)
            u = mpmath.findroot(lambda v: 1 - mode_map(v, scale) - near_end, guess)
            return u if t > 0.5 else 1 - u
        wanted = float(t) - 1
        guess = brentq(lambda v: -v - scale * (np.cos(np.pi * v / 2) ** 2 - 1 + v) - wanted, 0, 1)
        return mpmath.findroot(lambda v: mode_map(v, scale) - t, mpmath.mpf(guess))

    def density(t: Any) -> Any:
        slope = -1 - scale + scale * mpmath.pi / 2 * mpmath.sin(mpmath.pi * position(t))
        return 1 / abs(slope)

    return FlowLaw(density, lambda t: 1 - position(t), lambda p: mode_map(1 - p, scale), shift)


def u_shaped(a: float) -> FlowLaw:
    """By the two exponentials of arXiv 2405.20320."""

    def density(t: Any) -> Any:
        both = mpmath.exp(a * t) + mpmath.exp(a * (1 - t))
        return a * both / (2 * (mpmath.exp(a) - 1))

    def distribution(t: Any) -> Any:
        rising, falling = mpmath.exp(a * t) - 1, mpmath.exp(a) - mpmath.exp(a * (1 - t))
        return (rising + falling) / (2 * (mpmath.exp(a) - 1))

    def quantile(p: Any) -> Any:
        # exp(a t) = y solves y^2 - (2 p - 1)(e^a - 1) y - e^a = 0
        b = (2 * p - 1) * (mpmath.exp(a) - 1)
        return mpmath.log((b + mpmath.sqrt(b * b + 4 * mpmath.exp(a))) / 2) / a

    return FlowLaw(density, distribution, quantile)


@dataclass(frozen=True)
class SplitNormal:
    """Two halves of scipy's normal laws, weighted so that they meet."""

    mu: float
    below: float
    above: float

    def _halves(self) -> tuple[Any, Any, float]:
        share = self.below / (self.below + self.above)
        return stats.norm(self.mu, self.below), stats.norm(self.mu, self.above), share

    def pdf(self, x: Any) -> np.ndarray:
        low, high, share = self._halves()
        return np.where(x <= self.mu, 2 * share * low.pdf(x), 2 * (1 - share) * high.pdf(x))

    def cdf(self, x: Any) -> np.ndarray:
        low, high, share = self._halves()
        x = np.asarray(x)
        above = share + (1 - share) * (2 * high.cdf(x) - 1)
        return np.where(x <= self.mu, 2 * share * low.cdf(x), above)

    def sf(self, x: Any) -> np.ndarray:
        low, high, share = self._halves()
        x = np.asarray(x)
        below = (1 - share) + share * (2 * low.sf(x) - 1)
        return np.where(x > self.mu, 2 * (1 - share) * high.sf(x), below)

    def ppf(self, p: Any) -> np.ndarray:
        low, high, share = self._halves()
        p = np.asarray(p)
        lower = low.ppf(np.minimum(p / (2 * share), 0.5))
        upper = high.isf(np.minimum((1 - p) / (2 * (1 - share)), 0.5))
        return np.where(p <= share, lower, upper)

    def median(self) -> float:
        return float(self.ppf(0.5))


class MixFlowLaw(FlowLaw):
    """1 - t = sqrt(u), by the density and the distribution of t."""

    @classmethod
    def of(cls, shift: float = 1.0) -> MixFlowLaw:
        return cls(
            lambda t: 2 * (1 - t), lambda t: t * (2 - t), lambda p: 1 - mpmath.sqrt(1 - p), shift
        )

    def median(self) -> float:
        clean = np.sqrt(0.5)
        return float(2 * np.log(clean / (1 - clean)) - 2 * np.log(self.shift))


# (name, parameters, the same law computed otherwise): laws of log-SNR whose tails never end
LAWS: list[tuple[str, dict[str, Any], Any]] = [
    ("laplace", {"mu": 0.0, "b": 0.5}, stats.laplace(0, 0.5)),
    ("laplace", {"mu": 0.0, "b": 0.75}, stats.laplace(0, 0.75)),
    ("laplace", {"mu": 1.0, "b": 2.0}, stats.laplace(1, 2)),
    ("cauchy", {}, stats.cauchy(0, 1)),
    ("cauchy", {"mu": -1.5, "gamma": 0.3}, stats.cauchy(-1.5, 0.3)),
    ("cosine", {}, stats.hypsecant(0, 2)),
    ("cosine_shifted", {"mu": 1.25}, stats.hypsecant(1.25, 2)),
    ("cosine_scaled", {}, stats.hypsecant(0, 1)),
    ("cosine_scaled", {"s": 0.5}, stats.hypsecant(0, 4)),
    ("normal", {}, stats.norm(0, 2)),
    ("normal", {"mean": 2.4, "std": 2.4}, stats.norm(2.4, 2.4)),
    ("logistic", {}, stats.logistic(0, 2)),
    ("logistic", {"mu": 1.5, "s": 0.7}, stats.logistic(1.5, 0.7)),
    ("split_normal", {}, stats.norm(0, 2)),
    ("split_normal", {"mu": 0.5, "std_noisy": 3, "std_clean": 1.5}, SplitNormal(0.5, 3, 1.5)),
    ("logit_normal", {}, stats.norm(0, 2)),
    ("logit_normal", {"mean": 0.8, "std": 0.9}, stats.norm(-1.6, 1.8)),
    ("logit_normal", {"mean": -1.0, "shift": 3.0}, stats.norm(2 - 2 * np.log(3), 2)),
    ("logit_normal", {"tokens": 4096}, stats.norm(-2 * 1.15, 2)),
    ("flow_uniform", {}, stats.logistic(0, 2)),
    ("flow_uniform", {"pixels": 4 * 65536, "base_pixels": 65536}, stats.logistic(-np.log(4), 2)),
    ("cosmap", {}, stats.hypsecant(0, 2)),
    ("cosmap", {"tokens": 256}, stats.hypsecant(-1, 2)),
    ("mode", {}, mode(1.29)),
    ("mode", {"scale": 0.81, "shift": 3.0}, mode(0.81, 3.0)),
    ("mode", {"scale": -0.5}, mode(-0.5)),
    ("heavy_tail", {"scale": 1.0}, mode(1.0)),
    ("edm", {}, stats.norm(2.4, 2.4)),
    ("edm", {"p_mean": -0.8, "p_std": 1.6}, stats.norm(1.6, 3.2)),
    ("edm2", {}, stats.norm(0.8, 2)),
    ("style_friendly", {}, stats.norm(-6, 2)),
    ("style_friendly", {"mean": -5.0, "std": 3.0}, stats.norm(-5, 3)),
    ("mixflow", {}, MixFlowLaw.of()),
    ("mixflow", {"shift": 3.0}, MixFlowLaw.of(3.0)),
    ("shifted", {"density": "laplace", "shift": 3.0}, stats.laplace(-2 * np.log(3), 0.5)),
    ("shifted", {"density": "normal", "dimensions": 589824}, stats.norm(-np.log(144), 2)),
    ("shifted", {"density": "mixflow", "shift": 2.0}, MixFlowLaw.of(2.0)),
    ("u_shaped", {}, u_shaped(4.0)),
    ("u_shaped", {"a": 0.5}, u_shaped(0.5)),
]


class TimeLaw:
    """A law of the time fraction on a schedule: 0 = cleanest timestep, straight in each cell."""

    def __init__(self, edges: Any, distribution: Callable[[np.ndarray], Any]) -> None:
        self.edges, self.distribution = np.asarray(edges, float), distribution

    def cdf(self, log_snr: Any) -> np.ndarray:
        return 1 - self.sf(log_snr)

    def sf(self, log_snr: Any) -> np.ndarray:
        count = len(self.edges) - 1
        finite = np.isfinite(self.edges)
        times = np.arange(count + 1) / count
        tau = np.interp(-np.asarray(log_snr), -self.edges[finite], times[finite])
        tau = np.where(np.isneginf(log_snr), 1.0, np.where(np.isposinf(log_snr), 0.0, tau))
        return np.asarray(self.distribution(tau))

    def median(self) -> float:
        return 0.0  # only ever used to choose between cdf and sf, which agree here


def shares(weights: Sequence[float]) -> Callable[[np.ndarray], Any]:
    """The distribution of a time fraction with these weights per timestep."""
    total = np.concatenate([[0.0], np.cumsum(weights)]) / np.sum(weights)
    times = np.arange(len(total)) / (len(total) - 1)
    return lambda tau: np.interp(tau, times, total)


class TableLaw:
    """Straight lines through points, integrated by numpy on the points themselves."""

    def __init__(self, log_snr: Sequence[float], density: Sequence[float]) -> None:
        x, y = np.array(log_snr, float), np.array(density, float)
        self.x, self.y = x[np.argsort(x)], y[np.argsort(x)]
        self.total = np.trapezoid(self.y, self.x)

    def pdf(self, x: Any) -> np.ndarray:
        return np.interp(x, self.x, self.y, left=0, right=0) / self.total

    def cdf(self, x: Any) -> np.ndarray:
        return np.vectorize(self._below)(x)

    def sf(self, x: Any) -> np.ndarray:
        return 1 - self.cdf(x)

    def _below(self, x: float) -> float:
        grid = np.append(self.x[self.x < x], min(max(x, self.x[0]), self.x[-1]))
        return float(np.trapezoid(np.interp(grid, self.x, self.y), grid) / self.total)

    def median(self) -> float:
        return 0.0


class SplineLaw:
    """scipy's monotone cubic, integrated by scipy."""

    def __init__(self, points: Sequence[Sequence[float]]) -> None:
        x, y = np.array(sorted(points, key=lambda point: point[0])).T
        self.x, self.curve = x, PchipInterpolator(x, y)
        self.total = self.curve.integrate(x[0], x[-1])

    def pdf(self, x: Any) -> np.ndarray:
        inside = (x >= self.x[0]) & (x <= self.x[-1])
        return np.where(inside, self.curve(x), 0) / self.total

    def cdf(self, x: Any) -> np.ndarray:
        clipped = np.clip(x, self.x[0], self.x[-1])
        return np.vectorize(lambda v: self.curve.integrate(self.x[0], v))(clipped) / self.total

    def sf(self, x: Any) -> np.ndarray:
        return 1 - self.cdf(x)

    def median(self) -> float:
        return 0.0


@dataclass(frozen=True)
class MixtureLaw:
    """Weighted mean of oracles."""

    parts: Sequence[tuple[float, Any]]

    def _mean(self, method: str, x: Any) -> np.ndarray:
        total = sum(weight for weight, _ in self.parts)
        return np.asarray(sum(w * getattr(p, method)(x) for w, p in self.parts)) / total

    def pdf(self, x: Any) -> np.ndarray:
        return self._mean("pdf", x)

    def cdf(self, x: Any) -> np.ndarray:
        return self._mean("cdf", x)

    def sf(self, x: Any) -> np.ndarray:
        return self._mean("sf", x)

    def median(self) -> float:
        return 0.0


@dataclass(frozen=True)
class ConditionalLaw:
    """An oracle between two levels."""

    whole: Any
    low: float
    high: float

    def _share(self) -> float:
        return float(self.whole.cdf(self.high) - self.whole.cdf(self.low))

    def pdf(self, x: Any) -> np.ndarray:
        inside = (np.asarray(x) >= self.low) & (np.asarray(x) <= self.high)
        return np.where(inside, self.whole.pdf(x), 0) / self._share()

    def cdf(self, x: Any) -> np.ndarray:
        clipped = np.clip(x, self.low, self.high)
        return (self.whole.cdf(clipped) - self.whole.cdf(self.low)) / self._share()

    def sf(self, x: Any) -> np.ndarray:
        return 1 - self.cdf(x)

    def median(self) -> float:
        return 0.0


@dataclass(frozen=True)
class StretchedLaw:
    """An oracle whose noise fractions are shifted by s, then stretched to end at ``terminal``."""

    whole: Any
    shift: float
    terminal: float

    def _original(self, x: Any) -> np.ndarray:
        noise, clean = special.expit(-np.asarray(x) / 2), special.expit(np.asarray(x) / 2)
        with np.errstate(divide="ignore"):
            rest = np.log(np.maximum(noise - self.terminal, 0))
            return 2 * (np.log(clean) - rest) + 2 * np.log(self.shift)

    def cdf(self, x: Any) -> np.ndarray:
        return self.whole.cdf(self._original(x))

    def sf(self, x: Any) -> np.ndarray:
        return self.whole.sf(self._original(x))

    def median(self) -> float:
        return -2 * float(np.log(self.shift))


def qinglong(tokens: float) -> MixtureLaw:
    """musubi's shares, with FLUX's line through (256, 0.5) and (4096, 1.15)."""
    mu = 0.5 + (tokens - 256) * 0.65 / 3840
    laws = stats.norm(-2 * mu, 2), stats.norm(-6, 2), stats.norm(5.36, 1)
    return MixtureLaw(list(zip((0.8, 0.075, 0.125), laws, strict=True)))


def speed_weights(count: int, tau: float, k: float) -> list[float]:
    return [k if i < tau else 1.0 for i in range(count)]


def bias_weights(count: int, chosen: range, multiplier: float) -> list[float]:
    return [multiplier if i in chosen else 1.0 for i in range(count)]


@np.vectorize
def mode_cdf(tau: float) -> float:
    """w of tau = w + cos^2(pi w / 2) - 1 + w, diffusers' mode law of scale 1 seen from clean."""
    found: Any = brentq(lambda w: 2 * w - np.sin(np.pi * w / 2) ** 2 - tau, 0, 1, xtol=1e-15)
    return found


POINTS = [[-6.0, 0.0], [-2.0, 1.0], [0.0, 0.4], [3.0, 0.8], [7.0, 0.0]]
TABLE = ([5.0, -4.0, 0.0, 1.0], [0.2, 0.1, 1.0, 0.9])

# name -> (parameters, edges -> oracle): laws that end, or that depend on the schedule
ON_SCHEDULE: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], Any]]] = {
    "uniform": ({}, lambda e: TimeLaw(e, lambda tau: tau)),
    "log_snr_uniform": ({"low": -6.0, "high": 5.5}, lambda e: stats.uniform(-6, 11.5)),
    "beta": ({"alpha": 0.5, "beta": 3.0}, lambda e: TimeLaw(e, stats.beta(0.5, 3).cdf)),
    "speed": (
        {"tau": 0.6, "k": 3.0},
        lambda e: TimeLaw(e, lambda t: np.interp(t, [0, 0.6, 1], [0, 1.8 / 2.2, 1])),
    ),
    "timestep_bias": (
        {"strategy": "range", "begin": 100, "end": 300, "multiplier": 4.0},
        lambda e: TimeLaw(e, shares(bias_weights(len(e) - 1, range(100, 300), 4.0))),
    ),
    "scheme_logit_normal": (
        {"mean": 0.4, "std": 0.8},
        lambda e: TimeLaw(e, lambda t: stats.norm.cdf((special.logit(t) + 0.4) / 0.8)),
    ),
    "scheme_mode": ({"scale": 1.0}, lambda e: TimeLaw(e, mode_cdf)),
    "spline": ({"points": POINTS}, lambda e: SplineLaw(POINTS)),
    "tabulated": ({"log_snr": TABLE[0], "density": TABLE[1]}, lambda e: TableLaw(*TABLE)),
    "mixture": (
        {
            "components": [
                {"density": "laplace", "weight": 3, "mu": -2.0},
                {"density": "uniform", "weight": 1},
                {"density": "cosmap", "weight": 1.5, "density_args": {"shift": 2.0}},
            ]
        },
        lambda e: MixtureLaw(
            [
                (3, stats.laplace(-2, 0.5)),
                (1, TimeLaw(e, lambda tau: tau)),
                (1.5, stats.hypsecant(-2 * np.log(2), 2)),
            ]
        ),
    ),
    "qinglong": ({"tokens": 4096}, lambda e: qinglong(4096)),
    "shifted": (
        {"density": "logit_normal", "mean": 0.5, "preset": "qwen-image", "tokens": 4096},
        lambda e: StretchedLaw(stats.norm(-1, 2), np.exp(0.5 + 3840 * 0.4 / 7936), 0.02),
    ),
    "truncated": (
        {"density": "normal", "mean": 1.0, "low": -3.0, "high": 2.0},
        lambda e: ConditionalLaw(stats.norm(1, 2), -3.0, 2.0),
    ),
    "grid": (
        {"timesteps": [300, 0, 160], "weights": [1.0, 2.0, 4.0]},
        lambda e: TimeLaw(e, shares([{0: 2, 160: 4, 300: 1}.get(i, 0) for i in range(len(e) - 1)])),
    ),
}
