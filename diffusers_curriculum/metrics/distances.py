"""Distances between two sets of feature vectors; the features are computed elsewhere.

All of it runs in float64 on the CPU, and no generator of the process is read or changed.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

SUBSET_SIZE = 1000  # as the KID's authors report it: the mean over 100 subsets of 1000
SUBSETS = 100
_ROWS = 1024  # of a matrix of distances held at once


class PrecisionRecall(NamedTuple):
    """The share in [0, 1] of generated samples that lie in the manifold of the real ones, and of
    real samples that lie in the manifold of the generated ones."""

    precision: float
    recall: float


class _AsItIs(nn.Identity):
    """Stands where torchmetrics expects the network: the features are there already."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.num_features = features.shape[1]


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), eq. 6 of arXiv 1706.08500, by torchmetrics, of
    features (N, D) and (M, D).

    Raises:
        ValueError: fewer than 2 samples of a kind, features of other numbers or not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, generated = _checked(real, generated, fewest=2, metric="Frechet distance")
    centre = real.mean(0)  # the distance does not change, and loses fewer digits
    metric = FrechetInceptionDistance(_AsItIs(real), sync_on_compute=False)
    metric.update(real - centre, real=True)
    metric.update(generated - centre, real=False)
    return max(0.0, float(metric.compute()))  # rounding can push the distance of equals below 0


def kernel_distance(real: Tensor, generated: Tensor, seed: int = 0) -> float:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3, arXiv 1801.01401 (section 4), of features
    (N, D) and (M, D).

    The mean over 100 random subsets of 1000 samples; with 1000 or fewer samples of a kind, and as
    many of the other, the one set of all of them. May be slightly negative, being unbiased.

    Raises:
        ValueError: fewer than 2 samples of a kind, features of other numbers or not finite.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = _checked(real, generated, fewest=2, metric="kernel distance")
    size = min(SUBSET_SIZE, len(real), len(generated))
    subsets = 1 if size == len(real) == len(generated) else SUBSETS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features are kept: they are ours
        metric = KernelInceptionDistance(
            _AsItIs(real), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws the subsets from the global one
        torch.manual_seed(seed)
        return float(metric.compute()[0])


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991, eq. 1 and 2) of features (N, D) and (M, D).

    The manifold of a set is the union of balls around its samples, each as large as the distance
    to the sample's nearest neighbour number k = ``neighbours`` in the set.

    Raises:
        ValueError: k or fewer samples of a kind, features of other numbers or not finite.
    """
    real, generated = _checked(real, generated, neighbours + 1, "precision and recall")
    centre = real.mean(0)  # cdist multiplies matrices, which loses digits far from the origin
    real, generated = real - centre, generated - centre
    precision = _share_inside(generated, real, neighbours)
    return PrecisionRecall(precision, _share_inside(real, generated, neighbours))


def _share_inside(points: Tensor, centres: Tensor, neighbours: int) -> float:
    # The nearest one to each centre is the centre itself, hence one more.
    own = (torch.cdist(rows, centres) for rows in centres.split(_ROWS))
    radii = torch.cat([distances.kthvalue(neighbours + 1, dim=1).values for distances in own])
    inside = [(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in points.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def _checked(real: Tensor, generated: Tensor, fewest: int, metric: str) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU."""
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(real.shape)} and {tuple(generated.shape)} cannot be "
            "compared: give (N, D) and (M, D) from the same network"
        )
    for name, features in (("real", real), ("generated", generated)):
        if len(features) < fewest:
            raise ValueError(
                f"{len(features)} {name} samples are too few for the {metric}: give at least "
                f"{fewest}, better thousands"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"the features of the {name} samples are not all finite")
    return real.detach().cpu().double(), generated.detach().cpu().double()
