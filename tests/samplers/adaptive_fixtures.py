"""Adaptive samplers of every kind, and losses to feed them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.samplers import (
    AdaptiveTimestepSampler,
    GradientNormTimestepSampler,
    InformationRateTimestepSampler,
    LossProportionalTimestepSampler,
    LossSecondMomentTimestepSampler,
    TimestepSampler,
)
from tests.floors_fixtures import SCHEDULERS

KINDS: dict[str, Callable[..., AdaptiveTimestepSampler]] = {
    "second_moment": LossSecondMomentTimestepSampler,
    "published": lambda scheduler, **kwargs: LossSecondMomentTimestepSampler(
        scheduler, **{"bins": scheduler.config.num_train_timesteps, "min_observations": 2} | kwargs
    ),
    "proportional": LossProportionalTimestepSampler,
    "information": InformationRateTimestepSampler,
    "gradient_surrogate": lambda scheduler, **kwargs: GradientNormTimestepSampler(
        scheduler, mode="loss", **kwargs
    ),
}
# few steps, few observations
QUICK: dict[str, Any] = {"refresh_every": 5, "warm_up": 0, "min_observations": 1}


def build(kind: str, schedule: str = "sd", **kwargs: Any) -> AdaptiveTimestepSampler:
    """A sampler that learns quickly, on one of the schedules of the floors."""
    return KINDS[kind](SCHEDULERS[schedule](), **QUICK | kwargs)


def teach(
    sampler: TimestepSampler, profile: Tensor, *, repeats: int = 1, steps: int | None = None
) -> None:
    """Show the loss ``profile`` (T,) at every level, ``repeats`` times per step, from step 0 until
    a law was learned from it."""
    indices = torch.arange(len(profile)).repeat(repeats)
    for step in range(steps or 10):
        sampler.observe(indices, profile[indices], step)


def loss_profile(levels: int, seed: int = 0) -> Tensor:
    """(T,) positive losses, smooth in the level."""
    phase = np.random.default_rng(seed).random(3)
    x = np.linspace(0, 1, levels)
    waves = sum(np.sin(2 * np.pi * (k * x + p)) for k, p in enumerate(phase, 1))
    return torch.tensor(np.exp(waves))


def random_losses(step: int, size: int) -> Tensor:
    """(size,) float32, a function of the step alone."""
    rng = np.random.default_rng(1000 + step)
    return torch.tensor(rng.lognormal(size=size), dtype=torch.float32)


def state_hash(sampler: TimestepSampler) -> str:
    """A digest of every byte of the state."""
    digest = hashlib.sha256()
    for name, value in sorted(sampler.state_dict().items()):
        digest.update(name.encode())
        digest.update(torch.as_tensor(value).contiguous().numpy().tobytes())
    return digest.hexdigest()
