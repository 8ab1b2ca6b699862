"""What diffusers' schedulers call their noise levels: the only module that knows these names."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Clock(NamedTuple):
    """What a network is told of a noise level: ``scale`` times sigma, or its natural logarithm."""

    logarithmic: bool
    scale: float


def read_tables(scheduler: Any) -> tuple[str, Tensor, Tensor, Tensor]:
    """(family, alpha, sigma, timesteps), cleanest first."""
    config = getattr(scheduler, "config", {})
    if config.get("use_flow_sigmas"):
        return _flow_inference_tables(config)
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        return _variance_preserving_tables(scheduler.alphas_cumprod)
    if isinstance(getattr(scheduler, "discrete_sigmas", None), Tensor):
        return _exploding_tables(scheduler.discrete_sigmas, scheduler.discrete_sigmas)
    # set_timesteps overwrites sigmas and timesteps: read them from an unused copy.
    unused = (
        type(scheduler).from_config(config) if hasattr(type(scheduler), "from_config") else None
    )
    sigmas, timesteps = getattr(unused, "sigmas", None), getattr(unused, "timesteps", None)
    if isinstance(sigmas, Tensor) and isinstance(timesteps, Tensor) and len(timesteps) > 1:
        sigmas, timesteps = sigmas[: len(timesteps)].flip(0), timesteps.flip(0)
        if "shift" in config:
            return _flow_tables(sigmas, timesteps)
        if "sigma_data" in config or "sigma_max" in config:
            return _exploding_tables(sigmas, timesteps)
    raise ValueError(
        f"{type(scheduler).__name__} shows no table of training noise levels: it has neither "
        "`alphas_cumprod` nor `sigmas` with `timesteps` and one of the settings `shift` (flow "
        "matching), `sigma_data` or `sigma_max` (EDM). Pass the scheduler of the training."
    )


def _variance_preserving_tables(alphas_cumprod: Tensor) -> tuple[str, Tensor, Tensor, Tensor]:
    # diffusers' add_noise works in float32; the same float32 values, widened, give the corruption
    # that is really applied, and give it back bit for bit when narrowed again.
    power = alphas_cumprod.detach().cpu().float()
    alpha, sigma = power.double().sqrt(), (1.0 - power).double().sqrt()
    return "vp", alpha, sigma, torch.arange(len(power))


def _flow_tables(sigmas: Tensor, timesteps: Tensor) -> tuple[str, Tensor, Tensor, Tensor]:
    # a shift may round the noisiest sigma up to 1 + 1e-7
    sigmas = sigmas.detach().cpu().float().clamp_max(1.0)
    return "flow", (1.0 - sigmas).double(), sigmas.double(), timesteps.cpu()


def _flow_inference_tables(config: Any) -> tuple[str, Tensor, Tensor, Tensor]:
    """The flow-matching training grid of schedulers that do flow matching at inference only."""
    count, shift = config["num_train_timesteps"], config.get("flow_shift", config.get("shift", 1.0))
    uniform = torch.arange(1, count + 1, dtype=torch.float32) / count
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    return _flow_tables(sigmas, sigmas * count)


def _exploding_tables(sigmas: Tensor, timesteps: Tensor) -> tuple[str, Tensor, Tensor, Tensor]:
    sigmas = sigmas.detach().cpu().double()
    return "edm", torch.ones_like(sigmas), sigmas, timesteps.detach().cpu()


def clock_of(sigma: Tensor, timesteps: Tensor) -> Clock | None:
    """The clock that gives these timesteps, if there is one."""
    told = timesteps.double()
    for logarithmic in (False, True):
        coordinate = sigma.log() if logarithmic else sigma
        far = coordinate.abs().argmax()
        scale = float(f"{float(told[far] / coordinate[far]):.6g}")  # free of float32's rounding
        if torch.allclose(told, scale * coordinate, rtol=1e-5, atol=1e-6 * abs(scale)):
            return Clock(logarithmic, scale)
    return None
