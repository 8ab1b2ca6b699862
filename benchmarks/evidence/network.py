"""Residual networks of several seeds at once: every parameter has a leading dimension of seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOWEST, HIGHEST = -14.0, 14.0  # log-SNR as the network is told it; schedules end at infinity
FREQUENCIES = 32


class StackedLinear(nn.Module):
    """y = x W + b for each seed, (S, N, inputs) to (S, N, outputs); with an adapter of low rank,
    y = x W + b + x A B, where W and b rest."""

    def __init__(self, seeds: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seeds, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(seeds, 1, outputs))
        self.down: Tensor | None = None
        self.up: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.bias, x, self.weight)
        if self.down is None or self.up is None:
            return y
        return torch.baddbmm(y, torch.bmm(x, self.down), self.up)

    def initialise(self, row: int, generator: torch.Generator) -> None:
        """Draw the weights of one seed."""
        bound = 1 / math.sqrt(self.weight.shape[1])  # as torch.nn.Linear has it
        with torch.no_grad():
            self.weight[row].uniform_(-bound, bound, generator=generator)

    def adapt(self, rank: int, generators: Sequence[torch.Generator]) -> None:
        """Freeze the weights and add an adapter that changes nothing yet."""
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        seeds, inputs, outputs = self.weight.shape
        rows = [torch.randn(inputs, rank, generator=g) / math.sqrt(inputs) for g in generators]
        self.down = nn.Parameter(torch.stack(rows))
        self.up = nn.Parameter(torch.zeros(seeds, rank, outputs))


class SeededNetwork(nn.Module):
    """Networks of several seeds: (S, N, size) from x, log-SNRs (S, N) or (S, 1), classes (S, N).

    Attributes:
        seeds: how many.
        nothing: the class that tells none; 0 where there are no classes.
    """

    def __init__(self, seeds: int, nothing: int) -> None:
        super().__init__()
        self.seeds, self.nothing = seeds, nothing

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class StackedMlp(SeededNetwork):
    """What is trained: ``blocks`` residual blocks of two layers, told the log-SNR and the class.

    Args:
        seeds: one network for each; a seed's weights are a function of it alone.
        size: numbers of a sample.
        width: of the layers.
        blocks: their number.
        classes: 0 for none; class number ``classes`` means that none is told.
        words: (classes, W) where classes are captions, which are told as the sum of their words.
    """

    frequencies: Tensor
    words: Tensor | None

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        size: int,
        width: int,
        blocks: int,
        classes: int,
        words: Tensor | None = None,
    ) -> None:
        super().__init__(len(seeds), classes)
        count, told = self.seeds, classes if words is None else words.shape[1]
        self.register_buffer("words", None if words is None else with_nothing(words))
        self.register_buffer("frequencies", torch.logspace(-3, -0.5, FREQUENCIES))
        self.entry = StackedLinear(count, size, width)
        self.level = StackedLinear(count, 2 * FREQUENCIES, width)
        self.labels = nn.Parameter(torch.empty(count, told + 1, width)) if classes else None
        self.firsts = nn.ModuleList(StackedLinear(count, width, width) for _ in range(blocks))
        self.lasts = nn.ModuleList(StackedLinear(count, width, width) for _ in range(blocks))
        self.exit = StackedLinear(count, width, size)
        for row, seed in enumerate(seeds):
            self._initialise(row, torch.Generator().manual_seed(seed))

    def _initialise(self, row: int, generator: torch.Generator) -> None:
        for layer in self.linears():
            layer.initialise(row, generator)
        if self.labels is not None:
            with torch.no_grad():
                self.labels[row].normal_(generator=generator)

    def linears(self) -> list[StackedLinear]:
        """All layers, in a fixed order."""
        return [module for module in self.modules() if isinstance(module, StackedLinear)]

    def adapt(self, rank: int, seeds: Sequence[int]) -> None:
        """From here on train adapters of ``rank`` on every layer, and the classes' vectors."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for layer in self.linears():
            layer.adapt(rank, generators)

    def forward(self, x: Tensor, log_snr: Tensor, labels: Tensor | None) -> Tensor:
        """(S, N, size) from x, log-SNRs (S, N) or (S, 1), and classes (S, N)."""
        told = log_snr.float().clamp(LOWEST, HIGHEST)[..., None] * self.frequencies
        known = self.level(torch.cat([told.sin(), told.cos()], -1))
        if self.labels is not None and labels is not None:
            known = known + self._told(self.labels, labels)
        known, h = F.silu(known), self.entry(x)
        for first, last in zip(self.firsts, self.lasts, strict=True):
            h = h + last(F.silu(first(h + known)))
        return self.exit(h)

    def _told(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """(S, N, width) what classes or captions (S, N) add."""
        if self.words is None:
            return vectors[torch.arange(len(labels), device=labels.device)[:, None], labels]
        return torch.bmm(self.words[labels], vectors)


def with_nothing(words: Tensor) -> Tensor:
    """(C + 1, W + 1) the words of captions (C, W); the last one, that none is told, is of a caption
    of its own."""
    return torch.block_diag(words, torch.ones(1))


def predicted(network: SeededNetwork, x: Tensor, log_snr: Tensor, labels: Tensor | None) -> Tensor:
    """What the network gives for tensors that need not be where it is, at the place of ``x``."""
    told = None if labels is None else labels.to(network.device)
    return network(x.to(network.device), log_snr.to(network.device), told).to(x.device)


def parameters_of(network: nn.Module) -> list[nn.Parameter]:
    """Those that are trained."""
    return [p for p in network.parameters() if p.requires_grad]


def flops(network: Mapping[str, Any], size: int) -> float:
    """Floating point operations of one sample's way forward, roughly."""
    width, blocks = network["width"], network["blocks"]
    return 2.0 * width * (2 * size + 2 * blocks * width)
