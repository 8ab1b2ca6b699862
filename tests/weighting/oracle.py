"""Every loss weighting written out a second time, for each target, in SNR and noise fraction.

S = SNR, t = 1 / (1 + sqrt S). Plain arithmetic, good at moderate SNR; the formulas share nothing
with the library's, which are one for each weighting, in log space, and converted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import integrate
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.weighting import loss_weights

Array = np.ndarray
KINDS = ("sample", "epsilon", "v_prediction", "flow")


def weights_of(name: str, levels: NoiseLevels, kind: str, **options: Any) -> Tensor:
    """The library's weights, which are not None."""
    weights = loss_weights(name, levels, kind, **options)
    assert weights is not None
    return weights


def _c(t: Array) -> Array:
    return 2 / (np.pi * (1 - 2 * t + 2 * t**2))


def _bell(t: Array) -> Array:
    """Bell-shaped, its least value taken away, mean 1 over t; the mean by adaptive quadrature."""
    rest = math.exp(-0.5)
    mean, _ = integrate.quad(lambda x: math.exp(-2 * (x - 0.5) ** 2) - rest, 0, 1)
    return (np.exp(-2 * (t - 0.5) ** 2) - rest) / mean


# name -> for each target (sample, epsilon, v_prediction, flow), None where it is not defined
FORMULAS: dict[str, tuple[Callable[..., Any] | None, ...]] = {
    "unit_sample": (
        lambda s, t: s * 0 + 1,
        lambda s, t: 1 / s,
        lambda s, t: 1 / (1 + s),
        lambda s, t: t**2,
    ),
    "unit_epsilon": (
        lambda s, t: s,
        lambda s, t: s * 0 + 1,
        lambda s, t: s / (1 + s),
        lambda s, t: (1 - t) ** 2,
    ),
    "unit_v": (
        lambda s, t: 1 + s,
        lambda s, t: 1 + 1 / s,
        lambda s, t: s * 0 + 1,
        lambda s, t: t**2 + (1 - t) ** 2,
    ),
    "unit_flow": (
        lambda s, t: (1 + np.sqrt(s)) ** 2,
        lambda s, t: (1 + np.sqrt(s)) ** 2 / s,
        lambda s, t: (1 + np.sqrt(s)) ** 2 / (1 + s),
        lambda s, t: s * 0 + 1,
    ),
    "min_snr": (
        lambda s, t, gamma=5: np.minimum(s, gamma),
        lambda s, t, gamma=5: np.minimum(s, gamma) / s,
        lambda s, t, gamma=5: np.minimum(s, gamma) / (1 + s),
        lambda s, t, gamma=5: t**2 * np.minimum(s, gamma),
    ),
    "min_snr_plus_one": (
        lambda s, t, gamma=5: np.minimum(s + 1, gamma),
        lambda s, t, gamma=5: np.minimum(s + 1, gamma) / s,
        lambda s, t, gamma=5: np.minimum(s + 1, gamma) / (s + 1),
        lambda s, t, gamma=5: t**2 * np.minimum(s + 1, gamma),
    ),
    "soft_min_snr": (
        lambda s, t, gamma=4: s * gamma / (s + gamma),
        lambda s, t, gamma=4: gamma / (s + gamma),
        lambda s, t, gamma=4: s * gamma / ((s + gamma) * (1 + s)),
        lambda s, t, gamma=4: t**2 * s * gamma / (s + gamma),
    ),
    "max_snr": (
        lambda s, t: np.maximum(s, 1),
        lambda s, t: np.maximum(1, 1 / s),
        lambda s, t: np.maximum(s, 1) / (1 + s),
        lambda s, t: np.maximum((1 - t) ** 2, t**2),
    ),
    "p2": (
        lambda s, t, k=1, gamma=1: s / (k + s) ** gamma,
        lambda s, t, k=1, gamma=1: 1 / (k + s) ** gamma,
        lambda s, t, k=1, gamma=1: s / ((1 + s) * (k + s) ** gamma),
        lambda s, t, k=1, gamma=1: (1 - t) ** 2 / (k + s) ** gamma,
    ),
    "debiased": (
        lambda s, t: np.sqrt(s),
        lambda s, t: 1 / np.sqrt(s),
        lambda s, t: np.sqrt(s) / (1 + s),
        lambda s, t: t * (1 - t),
    ),
    "edm": (
        lambda s, t, sigma_data=0.5: s + 1 / sigma_data**2,
        lambda s, t, sigma_data=0.5: 1 + 1 / (sigma_data**2 * s),
        lambda s, t, sigma_data=0.5: (s + 1 / sigma_data**2) / (1 + s),
        lambda s, t, sigma_data=0.5: t**2 * (s + 1 / sigma_data**2),
    ),
    "sigmoid": (
        lambda s, t, bias=0: np.exp(bias) * s / (s + np.exp(bias)),
        lambda s, t, bias=0: 1 / (1 + s * np.exp(-bias)),
        lambda s, t, bias=0: np.exp(bias) * s / ((s + np.exp(bias)) * (1 + s)),
        lambda s, t, bias=0: t**2 * np.exp(bias) * s / (s + np.exp(bias)),
    ),
    "sigma_sqrt": (
        lambda s, t, preconditioned=False: t**-2.0 if preconditioned else t**-4.0,
        lambda s, t, preconditioned=False: (1 - t) ** -2.0 if preconditioned else t**-4.0 / s,
        lambda s, t, preconditioned=False: t ** (-2.0 if preconditioned else -4.0) / (1 + s),
        lambda s, t, preconditioned=False: t * 0 + 1 if preconditioned else t**-2.0,
    ),
    "cosmap": (
        lambda s, t, preconditioned=False: _c(t) if preconditioned else _c(t) / t**2,
        lambda s, t, preconditioned=False: _c(t) / (s if preconditioned else (1 - t) ** 2),
        lambda s, t, preconditioned=False: (
            _c(t) / (1 + s) if preconditioned else math.pi / 2 * _c(t) ** 2
        ),
        lambda s, t, preconditioned=False: _c(t) * t**2 if preconditioned else _c(t),
    ),
    "bell": (
        lambda s, t: _bell(t) / t**2,
        lambda s, t: _bell(t) / (1 - t) ** 2,
        lambda s, t: _bell(t) / (t**2 + (1 - t) ** 2),
        lambda s, t: _bell(t),
    ),
    "debiased_kohya": (
        None,
        lambda s, t: 1 / np.sqrt(np.minimum(s, 1000)),
        lambda s, t: 1 / (1 + np.minimum(s, 1000)),
        None,
    ),
    "debiased_onetrainer": (
        None,
        lambda s, t: 1 / np.sqrt(np.minimum(s, 1000)),
        lambda s, t: 1 / np.sqrt(1 + np.minimum(s, 1000)),
        None,
    ),
    "p2_onetrainer": (None, None, lambda s, t, gamma=1: (2 + s) ** -float(gamma), None),
}

# (name, target) -> limits at SNR 0 and infinity at the default parameters; None is infinite
_LIMITS = """
    unit_sample          1 1              inf 0            1 0              1 0
    unit_epsilon         0 inf            1 1              0 1              0 1
    unit_v               1 inf            inf 1            1 1              1 1
    unit_flow            1 inf            inf 1            1 1              1 1
    min_snr              0 5              1 0              0 0              0 0
    min_snr_plus_one     1 5              inf 0            1 0              1 0
    soft_min_snr         0 4              1 0              0 0              0 0
    max_snr              1 inf            inf 1            1 1              1 1
    p2                   0 1              1 0              0 0              0 0
    debiased             0 inf            inf 0            0 0              0 0
    edm                  4 inf            inf 1            4 1              4 1
    sigmoid              0 1              1 0              0 0              0 0
    sigma_sqrt           1 inf            inf inf          1 inf            1 inf
    cosmap               0.6366198 inf    inf 0.6366198    0.6366198 0.6366198 0.6366198 0.6366198
    bell                 0 inf            inf 0            0 0              0 0
    debiased_kohya       - -              inf 0.031622777  1 0.000999000999 - -
    debiased_onetrainer  - -              inf 0.031622777  1 0.031606977    - -
    p2_onetrainer        - -              - -              0.5 0            - -
"""


def _limit(text: str) -> float | None:
    return None if text == "inf" else float(text)


LIMITS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    (name, kind): (_limit(row[2 * i]), _limit(row[2 * i + 1]))
    for name, *row in (line.split() for line in _LIMITS.strip().splitlines())
    for i, kind in enumerate(KINDS)
    if row[2 * i] != "-"
}


def expected(name: str, kind: str, snr: Any, **parameters: Any) -> Array | None:
    """Weight on one target at each SNR (moderate ones), or None where it is not defined."""
    formula = FORMULAS[name][KINDS.index(kind)]
    s = np.asarray(snr, dtype=np.float64)
    return None if formula is None else formula(s, 1 / (1 + np.sqrt(s)), **parameters)


def speed(levels: NoiseLevels, kind: str, contrast: float = 0.6, tau: float = 0.7) -> Array:
    """SpeeD's weight of every level of a schedule without infinite log-SNRs, by a plain loop."""
    snr = np.exp(levels.log_snr.numpy())
    noise, count = 1 / (1 + snr), len(snr)
    change = np.array(
        [
            (noise[min(i + 1, count - 1)] - noise[max(i - 1, 0)])
            / (min(i + 1, count - 1) - max(i - 1, 0))
            for i in range(count)
        ]
    )
    low, high = 1 - contrast, contrast
    scaled = (change - change.min()) / (change.max() - change.min())
    weight = np.where(
        np.arange(count) < (tau if tau > 1 else tau * count), low + (high - low) * scaled, 1.0
    )
    ratios = {"sample": snr, "epsilon": 1.0, "v_prediction": snr / (1 + snr)}
    return weight * ratios.get(kind, snr / (1 + np.sqrt(snr)) ** 2)
