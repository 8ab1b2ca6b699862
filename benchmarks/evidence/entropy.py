"""How much more the marginals of a task differ at clean levels: no training is needed for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.kinds import task_of
from benchmarks.evidence.sampling import generators
from benchmarks.evidence.target import Target
from diffusers_curriculum.analysis.relative_entropy import gaussian_entropy, gaussian_rate, spectrum

SAMPLES, MOST = 1500, 8.0  # for each seed; log-SNR at each end


def entropy_ratios(config: Mapping[str, Any], between_timesteps: bool) -> Sequence[float]:
    """For samples of each seed, the mean over log-SNR from 0 to 8 / that over -8 to 0 of the
    relative entropy of Gaussian data with their covariance: between consecutive timesteps, or for
    equal steps in log-SNR."""
    settings = config["settings"]
    task, target = task_of(config["task"], settings, Path()), Target(config["target"])
    seeds = range(settings["first_seed"], settings["first_seed"] + settings["seeds"])
    return [
        _ratio(target, task.batch(SAMPLES, generator)[0], between_timesteps)
        for generator in generators(seeds, "entropy")
    ]


def _ratio(target: Target, samples: Tensor, between_timesteps: bool) -> float:
    levels, (variances, squared_means) = target.levels, spectrum(samples)
    entropy = (gaussian_entropy if between_timesteps else gaussian_rate)(
        levels, variances, squared_means
    )
    log_snr = levels.positions[-len(entropy) :]
    weights = torch.ones_like(entropy) if between_timesteps else -levels.edges.diff()
    clean, noisy = (log_snr > 0) & (log_snr < MOST), (log_snr < 0) & (log_snr > -MOST)
    means = [(entropy * weights)[part].sum() / weights[part].sum() for part in (clean, noisy)]
    return float(means[0] / means[1])
