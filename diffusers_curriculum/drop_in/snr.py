"""``compute_snr`` for every scheduler."""

from __future__ import annotations

from typing import Any

from diffusers import training_utils
from torch import Tensor

from diffusers_curriculum.drop_in.binding import bound
from diffusers_curriculum.noise_levels import NoiseLevels


def compute_snr(noise_scheduler: Any, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio (alpha / sigma)^2 at timesteps of a scheduler.

    On variance preserving schedules it is diffusers' own function; on flow matching and EDM
    schedules the timestep is looked up in the scheduler's table of training timesteps.

    Args:
        noise_scheduler: any diffusers scheduler with a table of noise levels.
        timesteps: any shape, as the scheduler's ``timesteps`` have them, before any rescaling.

    Returns:
        float32, the shape of ``timesteps``, on their device; 0 at zero terminal SNR.

    Raises:
        ValueError: a timestep that is not one of the scheduler's, or a scheduler without a table.
    """
    levels = bound(noise_scheduler).levels
    index = _indices(levels, timesteps)
    if levels.family == "vp":
        return training_utils.compute_snr(noise_scheduler, index.to(timesteps.device))
    snr = (levels.alpha / levels.sigma).square().float()
    return snr[index].to(timesteps.device)


def _indices(levels: NoiseLevels, timesteps: Tensor) -> Tensor:
    """Position of each timestep in the table, on the CPU."""
    wanted, known = timesteps.detach().cpu().double(), levels.timesteps.double()
    distance, index = (wanted[..., None] - known).abs().min(-1)
    # hundredths of the narrowest step: rounding to float32 passes, another schedule's do not
    strange = ~(distance <= 0.01 * known.diff().abs().min())
    if bool(strange.any()):
        raise ValueError(
            f"timestep {wanted[strange].flatten()[0].item()!r} is not one of the scheduler's "
            f"{len(known)} ({known.min().item():g} to {known.max().item():g}): pass timesteps as "
            "they come from the scheduler's table, before they are divided or cast."
        )
    return index
