"""Noise levels drawn from a density over log-SNR."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.densities import make_density, portable_parameters
from diffusers_curriculum.noise_levels import NoiseLevels, to_device
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSampler
from diffusers_curriculum.samplers.composition import CPU, Cells
from diffusers_curriculum.samplers.description import build_scheduler, plain_config

logger = logging.getLogger(__name__)


@SAMPLERS.register(
    "density",
    formula="p_i = F(edge_i) - F(edge_i+1), normalised",
    source="arXiv 2407.03297, with the Jacobian on every schedule",
    note="takes any density of this catalogue",
)
class DensityTimestepSampler(TimestepSampler):
    """Draws timesteps whose log-SNR follows a density (arXiv 2407.03297 for "laplace"): their mass
    is its integral over their cell of log-SNR, ``cdf(edge_i) - cdf(edge_{i+1})``, normalised.

    Args:
        scheduler: a diffusers scheduler, or its config with its ``_class_name``.
        density: a name of ``densities.DENSITIES``; "uniform" is uniform over timesteps.
        density_args: its parameters, in log-SNR.
        draw, floor, importance_correction, seed, continuous: see :class:`TimestepSampler`. Laws
            that decay fast hardly ever train the ends of the schedule, where inference starts:
            hence the default floor.
        outer_edges: end of the first and last cell: "half", "clip" or "inf", see
            :meth:`NoiseLevels.from_scheduler`.

    Raises:
        ValueError: unknown names or parameters, numbers out of range, or a density without mass
            on the schedule.
    """

    def __init__(
        self,
        scheduler: Any,
        density: str = "laplace",
        density_args: dict[str, Any] | None = None,
        draw: str = "stratified",
        floor: float = 0.1,
        importance_correction: str | float = "none",
        outer_edges: str = "half",
        seed: int = 0,
        continuous: bool = False,
    ) -> None:
        scheduler = build_scheduler(scheduler)
        levels = NoiseLevels.from_scheduler(scheduler, outer_edges)
        super().__init__(
            levels,
            draw=draw,
            floor=floor,
            importance_correction=importance_correction,
            seed=seed,
            continuous=continuous,
        )
        self.density = make_density(density, levels.edges, **(density_args or {}))
        masses = self.density.masses(levels.edges)
        if not float(masses.sum()) > 0:
            raise ValueError(f"density {self.density} has no mass on this schedule: move it.")
        self._law = masses / masses.sum() if density != "uniform" else masses
        if continuous and density != "uniform":
            self._cells = {CPU: Cells.of_density(levels, self.density)}
        as_published = levels.family == "edm" and density in ("edm", "edm2")  # with no floor
        if self.floor == 0 and density != "uniform" and not as_published:
            _warn_of_untrained_ends(self.density, levels)
        if self.floor > 0 and not bool(masses.all()):
            logger.warning(
                "%s has no mass on %d of %d levels, but floor=%s draws them too: floor=0 does not.",
                density,
                int((masses == 0).sum()),
                len(levels),
                self.floor,
            )
        self.register_to_config(
            scheduler=plain_config(scheduler),
            density=density,
            density_args=portable_parameters(density, density_args or {}),
            draw=draw,
            floor=floor,
            importance_correction=importance_correction,
            outer_edges=outer_edges,
            seed=seed,
            continuous=continuous,
        )

    def law(self, step: int, device: torch.device) -> Tensor:
        return to_device(self._law, device)


def _warn_of_untrained_ends(density: Any, levels: NoiseLevels) -> None:
    central = density.icdf(torch.tensor([0.0005, 0.9995], dtype=torch.float64))
    finite = levels.log_snr[levels.finite]
    if bool(finite[-1] < central[0]) or bool(finite[0] > central[1]):
        logger.warning(
            "floor=0 with %s: inference visits log-SNR %.1f..%.1f, but 99.9%% of the draws lie in "
            "%.1f..%.1f; a floor of 0.1 keeps the rest trained.",
            density,
            *(float(end) for end in (finite[-1], finite[0], *central)),
        )
