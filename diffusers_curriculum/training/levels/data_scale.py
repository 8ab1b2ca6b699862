"""The scale of what is trained on: log-SNR counts coefficients only, and a network that sees data
of standard deviation c at log-SNR l sees what unit data are at l + 2 ln c, the normalised log-SNR.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from diffusers_curriculum.analysis.advice import normalised
from diffusers_curriculum.training.errors import UsageError

SAMPLES = 32  # that are looked at before the first step
FACT = "data_scale"  # of a run


class DataScale(NamedTuple):
    """Standard deviation and mean of all values of the first samples."""

    std: float
    mean: float
    samples: int


def measure(batches: Iterable[tuple[Tensor, Tensor | None]]) -> DataScale:
    """The scale of batches of data, each the mean and the deviation (None: 0) of what noise is
    added to; in float64 on the host.

    Raises:
        UsageError: the values are all the same, or not finite.
    """
    count, samples, first, second = 0, 0, 0.0, 0.0
    for mean, deviation in batches:
        values = mean.double().cpu()
        spread = 0.0 if deviation is None else float(deviation.double().cpu().square().sum())
        count, samples = count + values.numel(), samples + len(values)
        first, second = first + float(values.sum()), second + float(values.square().sum()) + spread
    average = first / count
    variance = second / count - average**2
    if not 0 < variance < math.inf:
        raise UsageError(
            f"the first {samples} samples have a variance of {variance:.3g}, so that noise has "
            "nothing to be measured against: look at the images and the autoencoder, or give "
            "--data_scale NUMBER."
        )
    return DataScale(math.sqrt(variance), average, samples)


def kept(facts: Mapping[str, Any] | None) -> DataScale | None:
    """What an earlier session measured, from the facts of a checkpoint or of run.json."""
    told = (facts or {}).get(FACT)
    return None if told is None else DataScale(**told)


def told(scale: DataScale, quartiles: Sequence[float]) -> str:
    """The scale in words, and where the ``quartiles`` of log-SNR that are drawn lie for it."""
    return (
        f"the first {scale.samples} samples have a mean of {scale.mean:.3g}; "
        f"{normalised(quartiles, scale.std)}"
    )
