"""Networks of diffusers, one for each seed: they fill a GPU one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evidence.cells import PLACE, config
from benchmarks.evidence.network import HIGHEST, LOWEST, SeededNetwork, with_nothing
from diffusers_curriculum.models.networks import build_network, null_class

TIMESTEPS = 1000  # as which the network is told the log-SNR, the cleanest first


class CaptionTable(nn.Embedding):
    """Looks captions (N,) up as the sums of the vectors of their words (C, W)."""

    words: Tensor

    def __init__(self, words: Tensor, width: int) -> None:
        super().__init__(words.shape[1], width)
        self.register_buffer("words", words)

    def forward(self, input: Tensor) -> Tensor:
        return self.words[input] @ self.weight


class SeveralNetworks(SeededNetwork):
    """The network of a file of ``networks`` for square pictures of one channel, for each seed; on a
    GPU under autocast in bfloat16.

    Args:
        seeds, size, classes, words: as of :class:`network.StackedMlp`.
        name: of the file.

    Raises:
        ConfigError: there is no such file.
        ValueError: it does not fit the pictures.
    """

    def __init__(
        self, seeds: Sequence[int], *, size: int, name: str, classes: int, words: Tensor | None
    ) -> None:
        self.side = math.isqrt(size)
        made = [built(name, self.side, classes, words, seed) for seed in seeds]
        super().__init__(len(seeds), null_class(made[0]) if words is None else classes)
        self.networks = nn.ModuleList(made)

    def forward(self, x: Tensor, log_snr: Tensor, labels: Tensor | None) -> Tensor:
        """(S, N, size) from x, log-SNRs (S, N) or (S, 1), and classes (S, N)."""
        share = (HIGHEST - log_snr.float().clamp(LOWEST, HIGHEST)) / (HIGHEST - LOWEST)
        times = (share * (TIMESTEPS - 1)).expand(x.shape[:2])
        told = torch.full_like(times, self.nothing).long() if labels is None else labels
        pictures = x.unflatten(2, (1, self.side, self.side))
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            parts = zip(self.networks, pictures, times, told, strict=True)
            found = [
                network(rows, at, class_labels=classes, return_dict=False)[0]
                for network, rows, at, classes in parts
            ]
        return torch.stack(found).flatten(2).float()


def built(name: str, side: int, classes: int, words: Tensor | None, seed: int) -> Any:
    """The network of one seed; its tables of classes are of words where these are captions."""
    file = network_file(name)
    network = build_network(file, channels=1, sample_size=side, num_classes=classes, seed=seed)
    if words is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _tell_words(network, with_nothing(words))
    return network


def network_file(name: str) -> str:
    """Where the config of a network is; ConfigError where it is not."""
    config("networks", name)
    return str(PLACE / "networks" / f"{name}.json")


def _tell_words(network: nn.Module, words: Tensor) -> None:
    for path, table in [*network.named_modules()]:
        if isinstance(table, nn.Embedding):
            parent, _, own = path.rpartition(".")
            told = CaptionTable(words, table.embedding_dim)
            nn.init.normal_(told.weight, std=0.02)
            setattr(network.get_submodule(parent), own, told)


@cache
def forward_flops(name: str, size: int) -> float:
    """Floating point operations of one sample's way forward, counted by torch."""
    network = SeveralNetworks([0], size=size, name=name, classes=1, words=None)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, size), torch.zeros(1, 1), None)
    return float(counter.get_total_flops())
