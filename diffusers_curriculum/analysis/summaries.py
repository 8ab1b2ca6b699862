"""Masses of noise levels as quantiles and as histograms over log-SNR."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffusers_curriculum.noise_levels import NoiseLevels

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Quantiles(NamedTuple):
    """The timestep and the log-SNR below which 5, 25, 50, 75 and 95 % of a mass lie."""

    timestep: tuple[float, ...]
    log_snr: tuple[float, ...]


def quantiles(levels: NoiseLevels, mass: np.ndarray) -> Quantiles:
    """The least timestep, and the least log-SNR, up to which a mass (T,) has come to each of
    ``QUANTILES``: values of the table, as those are what is drawn."""
    wanted = np.array(QUANTILES) - 1e-12  # a sum of tenths may end just below a half
    noisier = np.searchsorted(mass.cumsum(), wanted).clip(0, len(mass) - 1)
    cleaner = np.searchsorted(mass[::-1].cumsum(), wanted).clip(0, len(mass) - 1)
    log_snr = levels.log_snr.flip(0).numpy()[cleaner]
    return Quantiles(tuple(levels.timesteps.numpy()[noisier].tolist()), tuple(log_snr.tolist()))


def log_snr_histogram(
    levels: NoiseLevels, masses: np.ndarray, bins: int = 80
) -> tuple[np.ndarray, np.ndarray]:
    """Edges (bins + 1,) in log-SNR and densities (n, bins) of masses (n, T).

    Each level's mass is spread over its cell, as the levels of the clean end lie further apart than
    the bins; a level at infinity counts to the end bin.
    """
    cells = levels.edges.flip(0).numpy()
    finite = cells[np.isfinite(cells)]
    edges = np.linspace(finite[0], finite[-1], bins + 1)
    below = np.pad(masses[:, ::-1].cumsum(1), ((0, 0), (1, 0)))
    below = np.stack([np.interp(edges, cells.clip(edges[0], edges[-1]), row) for row in below])
    below[:, 0], below[:, -1] = 0, masses.sum(1)
    return edges, np.diff(below) / (edges[1] - edges[0])
