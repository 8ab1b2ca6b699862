"""A factorised, l2-normalised codebook that counts what is used and revives what is not."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from diffusers_curriculum.checks import not_negative, whole

_ROWS = 8192  # vectors compared at once: with 8,192 codes that is 256 MiB of similarities


class Quantised(NamedTuple):
    """What becomes of vectors (..., dim): the nearest normalised codes (..., dim), whose gradient
    goes to the vectors, their indices (...) int64, and the codebook and commitment loss ()."""

    codes: Tensor
    indices: Tensor
    loss: Tensor


class Usage(NamedTuple):
    """How evenly a codebook is used: the share in [0, 1] of the codes that were used at all, and
    exp of the entropy of their frequencies, in [1, codes]; 0 if nothing was seen."""

    used: float
    perplexity: float


class VectorQuantiser(nn.Module):
    """Replaces vectors by the nearest of ``codes`` learned unit vectors, each of ``dim`` numbers
    (arXiv 2110.04627, 3.2).

    With z and e both divided by their length, the nearest code is the one of the largest cosine and

        loss = mean (e - sg(z))^2 + beta mean (sg(e) - z)^2

    where sg stops the gradient. The output is e itself, and its gradient goes to the vector as it
    was before the division (straight-through). All of it is computed in float32.

    Attributes:
        idle: (codes,) int64, observed updates since each code was last used or revived.
        counts: (codes,) int64, uses since the statistics were last read.

    Raises:
        ValueError: fewer than two codes or one number, more than 2^20 codes, or a beta that is
            negative or not finite.
    """

    idle: Tensor
    counts: Tensor

    def __init__(self, codes: int, dim: int, beta: float = 0.25) -> None:
        super().__init__()
        whole("codes", codes, 2, 2**20)
        whole("dim", dim, 1, 65_536)
        not_negative("beta", beta)
        self.beta = beta
        self.embedding = nn.Embedding(codes, dim)  # starts as N(0, 1)
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(codes, dtype=torch.int64))

    def codebook(self) -> Tensor:
        """The codes as they are used: (codes, dim) float32 of length 1."""
        return normalize(self.embedding.weight.float(), dim=-1)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """The index (...) int64 of the code with the largest cosine to each vector (..., dim)."""
        with _full_precision(vectors):
            codes = self.codebook().T
            rows = vectors.float().reshape(-1, codes.shape[0]).split(_ROWS)
            # the length of a vector does not change which code is nearest
            found = torch.cat([(part @ codes).argmax(1) for part in rows])
        return found.reshape(vectors.shape[:-1])

    def forward(self, vectors: Tensor) -> Quantised:
        """Quantise vectors (..., dim) of any length."""
        with _full_precision(vectors):
            unit = normalize(vectors.float(), dim=-1)
            indices = self.nearest(unit)
            codes = self.codebook()[indices]
            loss = mse_loss(codes, unit.detach()) + self.beta * mse_loss(unit, codes.detach())
            straight: Any = _StraightThrough.apply(vectors, codes.detach().to(vectors.dtype))
        return Quantised(straight, indices, loss)

    @torch.no_grad()
    def observe(self, indices: Tensor, left_out: Tensor | None = None) -> None:
        """Count one update's codes: the indices of the whole global batch, of any shape.

        Args:
            left_out: () bool, whether the update was not made: then nothing is counted.
        """
        counts = torch.bincount(indices.flatten(), minlength=len(self.counts))
        made = torch.ones_like(counts[0]) if left_out is None else (~left_out).to(counts.dtype)
        self.counts += counts * made
        self.idle.add_(made).masked_fill_(counts * made > 0, 0)

    @torch.no_grad()
    def revive(self, vectors: Tensor, rng: np.random.Generator, patience: int) -> Tensor:
        """Give codes that were idle for ``patience`` updates the place of encoder outputs.

        Revived codes get the expected length of fresh ones, sqrt(dim), so that they learn as fast.
        Returns how many there are, () int64; nothing is read back from the device.

        Args:
            vectors: (..., dim) encoder outputs of the present update, the same on all processes;
                if any is not finite, no code is revived.
            rng: chooses among them, without repetition while there are enough.

        Raises:
            ValueError: a patience below 1, or no vectors.
        """
        weight = self.embedding.weight
        rows = vectors.reshape(-1, weight.shape[1])
        if patience < 1 or len(rows) == 0:
            raise ValueError(
                f"patience={patience} with {len(rows)} vectors: take at least 1 update and 1 vector"
            )
        # np.resize repeats the permutation where there are fewer vectors than codes
        picks = torch.from_numpy(np.resize(rng.permutation(len(rows)), len(weight)))
        fresh = normalize(rows[picks.to(rows.device)].float(), dim=-1) * math.sqrt(rows.shape[1])
        dead = (self.idle >= patience) & rows.isfinite().all()
        weight.copy_(torch.where(dead[:, None], fresh.to(weight.dtype), weight))
        self.idle.masked_fill_(dead, 0)
        return dead.sum()

    def read_usage(self) -> Usage:
        """Usage since the last reading, which also starts a new window."""
        usage = codebook_usage(self.counts)
        self.counts.zero_()
        return usage


def codebook_usage(counts: Tensor) -> Usage:
    """Usage from the counts (codes,) of each code: exp(-sum p log p) with p = counts / sum."""
    total = counts.sum()
    if int(total) == 0:
        return Usage(0.0, 0.0)
    share = counts.double().cpu() / float(total)
    entropy = -torch.special.xlogy(share, share).sum()
    return Usage(float((share > 0).double().mean()), float(entropy.exp()))


def _full_precision(like: Tensor) -> torch.autocast:
    """Autocast would compare in half precision and take neighbours for the nearest code."""
    return torch.autocast(like.device.type, enabled=False)


class _StraightThrough(torch.autograd.Function):
    """The second argument; its gradient goes to the first.

    The usual z + sg(e - z) is only nearly e: it would not decode as the code itself does.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, codes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None
