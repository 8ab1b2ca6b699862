"""Noise levels drawn from a density over log-SNR."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.densities import DENSITIES, make_density, on_clock, portable_parameters
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
        density_args: its parameters, in log-SNR. Laws of the noise fraction (``logit_normal``, ...)
            move with the shift of the schedule unless they name one; the config then does.
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
        parameters = on_clock(density, density_args or {}, levels.shift)
        self.density = make_density(density, levels.edges, **parameters)
        masses = self.density.masses(levels.edges)
        if not float(masses.sum()) > 0:
            raise ValueError(f"density {self.density} has no mass on this schedule: move it.")
        self._law = masses / masses.sum() if density != "uniform" else masses
        if continuous and density != "uniform":
            self._cells = {CPU: Cells.of_density(levels, self.density)}
        as_published = levels.family == "edm" and density in ("edm", "edm2")  # with no floor
        if self.floor == 0 and density != "uniform" and not as_published:
            warn_of_untrained_ends(self.density, levels)
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
            density_args=portable_parameters(density, parameters),
            draw=draw,
            floor=floor,
            importance_correction=importance_correction,
            outer_edges=outer_edges,
            seed=seed,
            continuous=continuous,
        )

    @classmethod
    def upgraded_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return upgraded_law(config, "density", "density_args")

    def law(self, step: int, device: torch.device) -> Tensor:
        return to_device(self._law, device)


def upgraded_law(config: Mapping[str, Any], name: str, args: str) -> dict[str, Any]:
    """A stored config whose law, under the key ``name``, names the shift that it has: once a law of
    the noise fraction did not move with its schedule."""
    scheduler, law = config.get("scheduler"), config.get(name, "")
    if not isinstance(scheduler, Mapping) or law not in DENSITIES:
        return dict(config)
    if NoiseLevels.from_scheduler(build_scheduler(scheduler)).shift is None:
        return dict(config)
    return dict(config) | {args: on_clock(law, config.get(args) or {}, 1.0)}


def warn_of_untrained_ends(density: Any, levels: NoiseLevels) -> None:
    """Warn of a law without a floor that hardly ever trains one of the schedule's ends."""
    central = density.icdf(torch.tensor([0.0005, 0.9995], dtype=torch.float64))
    finite = levels.log_snr[levels.finite]
    if bool(finite[-1] < central[0]) or bool(finite[0] > central[1]):
        logger.warning(
            "floor=0 with %s: inference visits log-SNR %.1f..%.1f, but 99.9%% of the draws lie in "
            "%.1f..%.1f; a floor of 0.1 keeps the rest trained.",
            density,
            *(float(end) for end in (finite[-1], finite[0], *central)),
        )
