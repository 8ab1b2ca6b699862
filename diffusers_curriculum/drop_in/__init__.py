"""Replacements for functions of ``diffusers.training_utils``, with the same signatures.

They take every density and loss weighting of this library by name, beside diffusers' own names,
which keep diffusers' meaning.  A name that is neither is refused.
"""

from diffusers_curriculum.drop_in.binding import (
    ForScheduler,
    compute_density_for_timestep_sampling,
    compute_snr,
    for_scheduler,
)
from diffusers_curriculum.drop_in.names import compute_loss_weighting_for_sd3

__all__ = [
    "ForScheduler",
    "compute_density_for_timestep_sampling",
    "compute_loss_weighting_for_sd3",
    "compute_snr",
    "for_scheduler",
]
