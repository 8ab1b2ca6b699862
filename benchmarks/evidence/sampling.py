"""Samples of all seeds at once, through diffusers' inference schedulers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.evidence.network import SeededNetwork, predicted
from benchmarks.evidence.target import Target
from diffusers_curriculum.randomness import key

CHUNK = 200  # samples of a seed at a time: what fits the processor's cache


def generators(
    seeds: Sequence[int], purpose: str, device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One for each seed; the same for every method."""
    keys = [key(seed, purpose=f"evidence {purpose}") >> 65 for seed in seeds]
    return [torch.Generator(device).manual_seed(each) for each in keys]


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers, where the generator is."""
    return torch.randn(shape, generator=generator, device=generator.device)


@torch.no_grad()
def generate(
    network: SeededNetwork,
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
    network: SeededNetwork,
    target: Target,
    x: Tensor,
    labels: Tensor | None,
    steps: int,
    guidance: float,
) -> Tensor:
    scheduler, log_snrs = target.start_sampling(steps)
    x = x * scheduler.init_noise_sigma if target.levels.family == "edm" else x
    for t, log_snr in zip(scheduler.timesteps, log_snrs, strict=True):
        told = log_snr.to(x.device).expand(len(x), 1)
        given = scheduler.scale_model_input(x, t) if target.levels.family == "edm" else x
        output = predicted(network, given, told, labels)
        if guidance != 1 and labels is not None and network.nothing:
            nothing = torch.full_like(labels, network.nothing)
            without = predicted(network, given, told, nothing)
            output = without + guidance * (output - without)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x
