"""One view of any diffusers scheduler: a table of noise levels in log-SNR.

Everything that chooses, groups, weighs or reports noise levels is written against
:class:`NoiseLevels`.
"""

from diffusers_curriculum.noise_levels.levels import (
    OUTER_EDGES,
    NoiseLevels,
    cell_edges,
    to_device,
)
from diffusers_curriculum.noise_levels.schedulers import Clock

__all__ = ["OUTER_EDGES", "Clock", "NoiseLevels", "cell_edges", "to_device"]
