"""A plain pre-norm vision transformer over a square grid of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from diffusers_curriculum.checks import whole


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, N, dim), heads of dim / heads numbers each."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        split = self.to_qkv(tokens).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(query, key, value)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """x + attention(norm x), then x + W2 tanh(W1 norm x): tanh as in arXiv 2110.04627."""

    def __init__(self, dim: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.feed_forward = nn.Sequential(nn.Linear(dim, mlp), nn.Tanh(), nn.Linear(mlp, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.feed_forward(self.norm2(tokens))


def check_sizes(dim: int, depth: int, heads: int, mlp: int) -> None:
    """Raise ValueError for sizes that :class:`Transformer` cannot have: a depth that is none of 1
    to 1024, widths or heads that are none of 1 to 65536, a dim that is no multiple of 4 and of the
    heads."""
    whole("depth", depth, 1, 1024)
    for name, size in (("dim", dim), ("heads", heads), ("mlp", mlp)):
        whole(name, size, 1, 65_536)
    if dim % heads or dim % 4:
        raise ValueError(
            f"dim={dim} with {heads} heads: dim must be a multiple of 4 and of the heads."
        )


class Transformer(nn.Module):
    """Blocks over tokens (B, side, side, dim), with a learned table of positions.

    The table starts as sines and cosines of row and column, so that it means something before it
    has learned anything. A ValueError refuses the sizes that :func:`check_sizes` does.
    """

    def __init__(self, side: int, dim: int, depth: int, heads: int, mlp: int) -> None:
        super().__init__()
        check_sizes(dim, depth, heads, mlp)
        self.gradient_checkpointing = False
        # diffusers' enable_gradient_checkpointing puts its own function here
        self._gradient_checkpointing_func: Callable[..., Any] = checkpoint
        self.positions = nn.Parameter(sin_cos_positions(side, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, mlp) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        shape = tokens.shape
        tokens = tokens.flatten(1, 2) + self.positions
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens)
            else:
                tokens = block(tokens)
        return self.norm(tokens).reshape(shape)


def sin_cos_positions(side: int, dim: int) -> Tensor:
    """A table (side^2, dim): for row and column each sin and cos of p / 10000^(4 k / dim)."""
    place = torch.arange(side, dtype=torch.float64)
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = place[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows = waves[:, None].expand(side, side, dim // 2)
    columns = waves[None].expand(side, side, dim // 2)
    return torch.cat([rows, columns], -1).reshape(side * side, dim).float()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
