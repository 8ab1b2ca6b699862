"""Schedulers and small tables of noise levels that many tests share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels, cell_edges

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

SCHEDULERS: dict[str, Callable[..., Any]] = {
    "linear": lambda **kwargs: diffusers.DDPMScheduler(**kwargs),
    "sd": lambda **kwargs: diffusers.DDPMScheduler(**SD, **kwargs),
    "cosine": lambda **kwargs: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", **kwargs),
    "sd_zero_terminal": lambda **kwargs: diffusers.DDPMScheduler(
        **SD, rescale_betas_zero_snr=True, **kwargs
    ),
    "flow": lambda **kwargs: diffusers.FlowMatchEulerDiscreteScheduler(**kwargs),
    "flow_shift_3": lambda **kwargs: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **kwargs),
    "edm": lambda **kwargs: diffusers.EDMEulerScheduler(**kwargs),
}
VARIANCE_PRESERVING = ("linear", "sd", "cosine", "sd_zero_terminal")


def levels_of(name: str, outer_edges: str = "half", **kwargs: Any) -> NoiseLevels:
    """The noise levels of one of ``SCHEDULERS``."""
    return NoiseLevels.from_scheduler(SCHEDULERS[name](**kwargs), outer_edges)


def table(log_snr: list[float] | Tensor, family: str = "vp", **kwargs: Any) -> NoiseLevels:
    """A table of noise levels written by hand (log-SNR decreasing, infinite ends allowed)."""
    lam = torch.as_tensor(log_snr, dtype=torch.float64)
    if family == "flow":
        alpha, sigma = torch.sigmoid(lam / 2), torch.sigmoid(-lam / 2)
    elif family == "edm":
        alpha, sigma = torch.ones_like(lam), torch.exp(-lam / 2)
    else:
        alpha, sigma = torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt()
    finite = int(lam.isfinite().sum())
    edges = cell_edges(lam) if finite > 1 else torch.full((len(lam) + 1,), torch.nan)
    defaults: dict[str, Any] = {
        "timesteps": torch.arange(len(lam)),
        "edges": edges,
        "prediction_type": "epsilon",
        "family": family,
    }
    return NoiseLevels(lam, alpha, sigma, **(defaults | kwargs))


@contextmanager
def untouched_global_generators() -> Iterator[None]:
    """Fail if the block reads or changes the global generators of torch, numpy or Python."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    yield
    after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
