"""Samples of all seeds at once, through diffusers' inference schedulers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.evidence.network import StackedMlp
from benchmarks.evidence.target import Target
from diffusers_curriculum.randomness import key

CHUNK = 200  # samples of a seed at a time: what fits the processor's cache


def generators(seeds: Sequence[int], purpose: str) -> list[torch.Generator]:
    """One for each seed; the same for every method."""
    return [
        torch.Generator().manual_seed(key(s, purpose=f"evidence {purpose}") >> 65) for s in seeds
    ]


@torch.no_grad()
def generate(
    network: StackedMlp,
    target: Target,
    noise: Tensor,
    labels: Tensor | None,
    *,
    steps: int,
    guidance: float,
) -> Tensor:
    """(S, N, size) samples from noise (S, N, size) for classes (N,)."""
    parts = []
    for start in range(0, noise.shape[1], CHUNK):
        some = slice(start, start + CHUNK)
        told = None if labels is None else labels[some].expand(len(noise), -1)
        parts.append(_chunk(network, target, noise[:, some], told, steps, guidance))
    return torch.cat(parts, 1)


def _chunk(
    network: StackedMlp,
    target: Target,
    x: Tensor,
    labels: Tensor | None,
    steps: int,
    guidance: float,
) -> Tensor:
    scheduler, log_snrs = target.start_sampling(steps)
    x = x * scheduler.init_noise_sigma if target.levels.family == "edm" else x
    for t, log_snr in zip(scheduler.timesteps, log_snrs, strict=True):
        told = log_snr.expand(len(x), 1)
        given = scheduler.scale_model_input(x, t) if target.levels.family == "edm" else x
        output = network(given, told, labels)
        if guidance != 1 and labels is not None and network.labels is not None:
            nothing = torch.full_like(labels, network.nothing)
            without = network(given, told, nothing)
            output = without + guidance * (output - without)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x
