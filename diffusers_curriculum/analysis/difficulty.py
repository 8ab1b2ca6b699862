"""How difficult each noise level is, for a data set and for networks that learn it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.analysis.convergence import Curves
from diffusers_curriculum.analysis.gradients import Gradients
from diffusers_curriculum.analysis.mixtures import Mixture, mixture_entropy, mixture_rate
from diffusers_curriculum.analysis.probes import UNITS, Grid, Probe, make_grid
from diffusers_curriculum.analysis.relative_entropy import (
    Estimate,
    entropy_bound,
    gaussian_entropy,
    gaussian_rate,
    principal_variances,
    rate_bound,
    spectrum,
)
from diffusers_curriculum.analysis.score_rate import ScoreRate
from diffusers_curriculum.analysis.suggestion import (
    Profile,
    Suggestion,
    beyond_linear,
    emergence,
    half_known,
    half_known_of_data,
    least_variance,
    progress,
    suggest,
)
from diffusers_curriculum.noise_levels import NoiseLevels

_FINITE = 256  # samples of a data set whose relative entropy is estimated
_DRAWS = 512  # of that estimate, for each level


@dataclass(frozen=True, eq=False)
class DataDifficulty:
    """What a data set alone says, at the levels of a grid; K of the step that ends there.

    Attributes:
        samples, dimension: how many, and of how many numbers.
        std: standard deviation of all their numbers.
        variances: (D,) along principal directions.
        entropy, rate: K and J by name: "gaussian" (covariance alone), "finite" (these very samples)
            and "bound" (the most there can be).
        finite_samples: how many samples "finite" is of.
    """

    grid: Grid
    samples: int
    dimension: int
    std: float
    variances: Tensor
    entropy: Mapping[str, Estimate]
    rate: Mapping[str, Estimate]
    finite_samples: int


@dataclass(frozen=True, eq=False)
class Difficulty:
    """Everything that was found; what was not looked at is None or empty.

    Attributes:
        scheduler: that adds noise in training.
        data: of the data set.
        probes: of networks, by name, the earliest checkpoint first and what is suggested for last.
        network_rate: J by the last network.
        gradients: of the last network.
        convergence: curves by name.
        clusters: of suggested curricula.
    """

    scheduler: Any
    data: DataDifficulty
    probes: Mapping[str, Probe] = field(default_factory=dict)
    network_rate: ScoreRate | None = None
    gradients: Gradients | None = None
    convergence: Mapping[str, Curves] = field(default_factory=dict)
    clusters: int = 5

    @property
    def profiles(self) -> list[Profile]:
        """What speaks for noise levels, best founded first."""
        found = []
        *earlier, last = [None, None, *self.probes.values()][-2:]
        if earlier[0] is not None and last is not None:
            found.append(progress(last, earlier[0]))
        if last is not None:
            found.append(half_known(last, float(self.data.variances.mean())))
            found.append(beyond_linear(last))
        if self.gradients is not None:
            found.append(least_variance(self.gradients))
        levels, variances = self.data.grid.levels, self.data.variances
        if last is None:
            found.append(half_known_of_data(levels, variances))
        found.append(emergence(levels, variances))
        return [profile for profile in found if not profile.empty]

    @cached_property
    def suggestions(self) -> list[Suggestion]:
        """Samplers to try, best founded first."""
        return suggest(self.scheduler, self.profiles, self.clusters)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values for ``json.dumps``; what is not known is None."""
        data = self.data
        return {
            "levels": {
                "log_snr": _plain(data.grid.log_snr),
                "index": data.grid.indices.tolist(),
                "edges": _plain(data.grid.edges),
                "family": data.grid.levels.family,
            },
            "data": {
                "samples": data.samples,
                "dimension": data.dimension,
                "std": data.std,
                "finite_samples": data.finite_samples,
                "relative_entropy": {k: _estimate(v) for k, v in data.entropy.items()},
                "rate": {k: _estimate(v) for k, v in data.rate.items()},
            },
            "networks": {name: _probe(probe) for name, probe in self.probes.items()},
            "network_rate": None if self.network_rate is None else _score_rate(self.network_rate),
            "gradients": None if self.gradients is None else _gradients(self.gradients),
            "convergence": {name: curves.to_json() for name, curves in self.convergence.items()},
            "suggestions": {
                each.name: {"reason": each.reason, "config": dict(each.sampler.config)}
                for each in self.suggestions
            },
        }


def analyse_data(
    samples: Tensor,
    levels: NoiseLevels,
    bins: int = 24,
    *,
    seed: int = 0,
    each: Callable[[], object] = lambda: None,
) -> DataDifficulty:
    """Relative entropy and its rate of samples (N, ...): of a Gaussian with their covariance, of at
    most 256 of them as a finite set, and the bound.

    Args:
        each: is called after each of the two estimates.

    Raises:
        ValueError: fewer than two samples, samples that are all the same, or no grid.
    """
    grid = make_grid(levels, bins)
    variances, squared_means = spectrum(samples)
    flat, std = samples.flatten(1).double().cpu(), std_of(samples)
    finite = Mixture.of_samples(flat[:_FINITE])
    steps = grid.indices.clamp_min(1)  # the cleanest level ends no step
    mean_square = float(flat.square().sum(1).mean())
    entropy = mixture_entropy(levels, finite, steps, samples=_DRAWS, seed=seed)
    each()
    rate = mixture_rate(levels, finite, grid.indices, samples=_DRAWS, seed=seed)
    each()
    known = variances.cpu(), squared_means.cpu()
    dimension = flat.shape[1]
    return DataDifficulty(
        grid=grid,
        samples=len(samples),
        dimension=dimension,
        std=std,
        variances=principal_variances(samples),
        entropy={
            "gaussian": _exact(gaussian_entropy(levels, *known)[steps - 1]),
            "finite": entropy,
            "bound": _exact(entropy_bound(levels, dimension, mean_square)[steps - 1]),
        },
        rate={
            "gaussian": _exact(gaussian_rate(levels, *known)[grid.indices]),
            "finite": rate,
            "bound": _exact(rate_bound(levels, dimension, mean_square)[grid.indices]),
        },
        finite_samples=len(finite.means),
    )


def std_of(samples: Tensor) -> float:
    """Standard deviation of all numbers of samples (N, ...); ValueError where they are the same."""
    flat = samples.flatten().double().cpu()
    if not (std := float(flat.std(unbiased=False))) > 0:
        raise ValueError(
            f"all numbers of the {len(samples)} samples are {float(flat[0]):.4g}: there is "
            "nothing to learn."
        )
    return std


def _exact(values: Tensor) -> Estimate:
    return Estimate(values, torch.zeros_like(values))


# -- plain values ----------------------------------------------------------------------------------


def _plain(values: Tensor) -> list[Any]:
    """Lists of numbers, None where one is not finite."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [x if x == x and abs(x) != float("inf") else None for x in values.tolist()]


def _estimate(estimate: Estimate) -> dict[str, list[Any]]:
    return {"value": _plain(estimate.value), "error": _plain(estimate.error)}


def _probe(probe: Probe) -> dict[str, Any]:
    errors = {unit: _estimate(probe.error(unit)) for unit in UNITS}
    return {
        "samples": probe.x0_errors.shape[1],
        "log_snr": _plain(probe.grid.log_snr),
        "error": errors,
        "linear_x0_error": _plain(probe.linear),
        "relative_to_linear": _estimate(probe.relative),
        "information_rate": _estimate(probe.information_rate),
        "information": _plain(probe.information),
    }


def _score_rate(rate: ScoreRate) -> dict[str, Any]:
    return {"rate": _estimate(rate.rate), "mean_of_s": _estimate(rate.mean)}


def _gradients(gradients: Gradients) -> dict[str, Any]:
    return {
        "log_snr": _plain(gradients.grid.log_snr),
        "second_moment": _estimate(gradients.second_moment),
        "squared_norm_of_mean": _plain(gradients.squared_norm),
        "variance": _plain(gradients.variance),
        "cluster_sizes": list(gradients.groups),
        "affinity": _plain(gradients.affinity),
    }


def cluster_names(grid: Grid, groups: Sequence[int]) -> list[str]:
    """Log-SNRs between which each group of neighbouring levels lies, noisiest first."""
    ends = torch.tensor([0, *groups]).cumsum(0)
    edges = grid.edges[ends].tolist()
    return [f"{low:.1f} to {high:.1f}" for low, high in pairwise(edges)]
