"""A loss weight that is learned beside the model: the log-variance of the loss at each log-SNR."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusers_curriculum.catalogue import Entry
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.randomness import host_generator


class UncertaintyWeighting(nn.Module):
    """EDM2's uncertainty weighting: loss e^(-z) + z with a learned z(log_snr) (arXiv
    2312.02696; NVlabs/edm2).

    z is linear in random Fourier features sqrt(2) cos(2 pi (f x + p)) of x = ln(sigma) / 4 =
    -log_snr / 8 (f normal, p uniform), scaled by 1 / sqrt(features), without a bias. Its weights
    start at 0, where the loss is the unweighted one (this library's choice: NVlabs/edm2
    starts at random weights of unit norm).

    At one level the minimum over z is z* = ln E[loss], of value 1 + z*: every level ends up with
    the same mean weighted loss, 1. A fixed weighting W of the losses only adds ln W to z*; what it
    changes is the start. Which levels are drawn still matters.

    Train the parameters with the model (they are of the optimizer's group of choice, without
    weight decay), keep them in float32, and drop them for inference. The losses must be means over
    the elements of a sample: of a sum over D elements, D z would have to be added.

    Args:
        levels: the noise levels; one at infinite log-SNR counts as one more step of its neighbours'
            spacing away.
        features: number of Fourier features.
        seed: of the features.

    Raises:
        ValueError: fewer than one feature.
    """

    entry: ClassVar[Entry]

    coordinate: Tensor
    frequencies: Tensor
    phases: Tensor

    def __init__(self, levels: NoiseLevels, *, features: int = 128, seed: int = 0) -> None:
        super().__init__()
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ValueError(f"features={features!r} must be a whole number of at least 1.")
        rng = host_generator(seed, purpose="uncertainty features")
        frequencies, phases = rng.standard_normal(features), rng.random(features)
        self.register_buffer("frequencies", torch.from_numpy(2 * math.pi * frequencies).float())
        self.register_buffer("phases", torch.from_numpy(2 * math.pi * phases).float())
        coordinate = (-_finite(levels.log_snr.cpu()) / 8).float()
        self.register_buffer("coordinate", coordinate, persistent=False)  # the levels say it
        self.weight = nn.Parameter(torch.zeros(features))

    def log_variance(self, indices: Tensor | None = None) -> Tensor:
        """z at the levels ``indices`` (B,), by default at all of them; float32.

        Raises:
            ValueError: the module was cast to another dtype.
        """
        if self.weight.dtype != torch.float32:
            raise ValueError(
                f"the uncertainty weighting was cast to {self.weight.dtype}, where z loses its "
                "digits: keep it in float32 and leave mixed precision to autocast."
            )
        at = self.coordinate if indices is None else self.coordinate[indices]
        # no matmul, which autocast would carry out in half precision
        features = math.sqrt(2) * torch.cos(at[:, None] * self.frequencies + self.phases)
        return (features * self.weight).sum(1) / math.sqrt(len(self.weight))

    def forward(self, losses: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """What to average and differentiate, and z.

        Args:
            losses: (B,) mean squared error of each sample, already times a fixed weight if any.
            indices: (B,) int64, position of each sample's noise level, 0 = cleanest.

        Returns:
            (B,) float32 loss e^(-z) + z, and (B,) float32 z.

        Raises:
            ValueError: losses and indices of different shapes.
        """
        if losses.shape != indices.shape:
            raise ValueError(
                f"losses {tuple(losses.shape)} and indices {tuple(indices.shape)} must both have "
                "shape (batch,): reduce the squared errors to one mean per sample."
            )
        z = self.log_variance(indices)
        return losses.float() * torch.exp(-z) + z, z


UncertaintyWeighting.entry = Entry(
    name="uncertainty",
    make=UncertaintyWeighting,
    formula="loss e^-z + z, z(l) learned",
    source="arXiv 2312.02696; NVlabs/edm2",
    note="cancels any fixed weighting in the end; 128 Fourier features, drawn from a seed",
)


def _finite(log_snr: Tensor) -> Tensor:
    log_snr = log_snr.double().clone()
    for end, inner in ((0, (1, 2)), (-1, (-2, -3))):
        if bool(log_snr[end].isinf()):
            log_snr[end] = 2 * log_snr[inner[0]] - log_snr[inner[1]]
    return log_snr
