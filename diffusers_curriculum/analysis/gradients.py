"""Gradients level by level: how large, how noisy, and whether clusters of levels pull together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_curriculum.analysis.probes import Denoiser, Grid, noised
from diffusers_curriculum.analysis.relative_entropy import Estimate
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.randomness import host_generator

_KEPT = 2**16  # numbers of a gradient that are kept; longer ones are folded to as many


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of the unweighted loss of the network's own target, at the levels of a grid.

    Attributes:
        grid: noisiest level first.
        second_moment: (L,) E||g||^2 of single samples.
        squared_norm: (L,) ||E g||^2, without the bias of its noise, so that it may be below 0.
        variance: (L,) E||g - E g||^2.
        groups: how many neighbouring levels of the grid make each cluster, noisiest first.
        affinity: (C, C) cosine between the mean gradients of clusters; NaN where they are lost in
            noise.
    """

    grid: Grid
    second_moment: Estimate
    squared_norm: Tensor
    variance: Tensor
    groups: tuple[int, ...]
    affinity: Tensor


@dataclass(frozen=True, eq=False)
class _Level:
    """Of N samples: squared norms (N,), and mean gradients (2, K) of the even and the odd ones."""

    squares: Tensor
    halves: Tensor

    @property
    def variance(self) -> float:
        count = len(self.squares)
        whole = self.halves.double().mean(0).square().sum()
        return float((self.squares.double().sum() - count * whole) / (count - 1))


def gradient_statistics(
    denoiser: Denoiser,
    parameters: Iterable[Tensor],
    objective: Objective,
    samples: Tensor,
    grid: Grid,
    *,
    clusters: int = 5,
    seed: int = 0,
    each_level: Callable[[], object] = lambda: None,
) -> Gradients:
    """Statistics of the gradient by the parameters: one backward pass for each sample and level.

    Products of means are taken between two halves of the samples, whose noise is independent: a
    product of one half with itself would count the noise as signal. Gradients of more than 65,536
    numbers are folded by random signs to as many, which keeps products in expectation.

    Args:
        samples: (N, ...), an even number of them.
        clusters: into how many neighbouring groups the grid is divided, as far as it has levels.

    Raises:
        ValueError: fewer than four samples or an odd number, or no parameter to differentiate.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if len(samples) < 4 or len(samples) % 2 or not wanted:
        raise ValueError(
            f"gradients need an even number of at least 4 samples and trainable parameters: got "
            f"{len(samples)} and {len(wanted)}."
        )
    levels = []
    for index in grid.indices.tolist():
        levels.append(_one_level(denoiser, wanted, objective, samples, index, seed))
        each_level()
    sizes = tuple(map(len, torch.arange(len(levels)).tensor_split(min(clusters, len(levels)))))
    squares = torch.stack([level.squares for level in levels]).double()
    halves = torch.stack([level.halves for level in levels]).double()
    return Gradients(
        grid=grid,
        second_moment=Estimate(squares.mean(1), squares.std(1) / squares.shape[1] ** 0.5),
        squared_norm=(halves[:, 0] * halves[:, 1]).sum(1),
        variance=torch.tensor([level.variance for level in levels], dtype=torch.float64),
        groups=sizes,
        affinity=_cosines(torch.stack([part.mean(0) for part in halves.split(sizes)])),
    )


def _one_level(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    objective: Objective,
    samples: Tensor,
    index: int,
    seed: int,
) -> _Level:
    squares, sums = [], torch.zeros(2, _length(parameters))
    for x, at, where, target in noised(objective, samples, index, seed, batch_size=1):
        error = denoiser(x, at, where).float() - target.float()
        found = torch.autograd.grad(error.square().mean(), parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        squares.append(flat.float().square().sum())
        sums[len(squares) % 2] += _folded(flat.float(), seed).cpu()
    return _Level(torch.stack(squares).cpu(), sums / (len(squares) / 2))


def _length(parameters: Sequence[Tensor]) -> int:
    return min(_KEPT, sum(p.numel() for p in parameters))


def _folded(vector: Tensor, seed: int) -> Tensor:
    """(K,) numbers whose products are in expectation over signs those of whole vectors."""
    if len(vector) <= _KEPT:
        return vector
    padded = torch.nn.functional.pad(vector, (0, -len(vector) % _KEPT)).view(-1, _KEPT)
    signs = host_generator(seed, len(padded), purpose="fold").choice([-1.0, 1.0], len(padded))
    return torch.from_numpy(signs).to(padded) @ padded


def _cosines(halves: Tensor) -> Tensor:
    """(C, C) cosines of mean gradients known by two independent halves (C, 2, K)."""
    products = halves[:, 0] @ halves[:, 1].T
    products = (products + products.T) / 2
    squares = products.diagonal()
    norms = torch.where(squares > 0, squares, torch.nan).sqrt()
    return (products / (norms[:, None] * norms)).clamp(-1, 1)
