"""A density that moves from noise to detail over a run, and then widens."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.checks import above_zero
from diffusers_curriculum.densities import Density, make_density, placement_of
from diffusers_curriculum.noise_levels import NoiseLevels, to_device
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSampler
from diffusers_curriculum.samplers.composition import CPU, Cells, compose, copy_on, tables
from diffusers_curriculum.samplers.course import (
    WAY,
    Course,
    checked_scales,
    move_pacing,
    other_parameters,
    steps_of_run,
    way_in_words,
)
from diffusers_curriculum.samplers.density import warn_of_untrained_ends
from diffusers_curriculum.samplers.description import Report, build_scheduler, plain_config
from diffusers_curriculum.samplers.stages import Progress, row
from diffusers_curriculum.samplers.states import part_of

Tables = tuple[Tensor, ...]


@SAMPLERS.register(
    "moving",
    formula="p(l) = f((l - m) / b) / b, m moves from noise to detail, then b grows",
    source="laws: arXiv 2407.03297; easy to hard: arXiv 2403.10348; wide at last: arXiv 2603.12517",
    note="takes a density with a location; log-SNR -1 to 2 is meant for data of unit scale, and "
    "move_steps depends on the task",
)
class MovingTimestepSampler(TimestepSampler):
    """Draws from a density of log-SNR whose location moves from noise to detail, and whose scale
    then grows: a curriculum in its smooth form, easy levels first (arXiv 2403.10348), by importance
    sampling in log-SNR (arXiv 2407.03297).

    The way is walked in ``positions`` places at equal distances, so that a law is computed that
    often and not at every step; location and scale lag behind by less than one of them. At each the
    law has the masses that :class:`DensityTimestepSampler` has there.

    Args:
        scheduler: a diffusers scheduler, or its config with its ``_class_name``.
        density: a law with a location: laplace, cauchy, normal, logistic, logit_normal, edm, ...
        density_args: its other parameters.
        location_start, location_end: of its centre, in the log-SNR of data of standard deviation 1;
            from noisy to clean is easy to hard.
        scale_start: of its width in log-SNR, the law's own parameter (of edm, edm2 and logit_normal
            twice that); default 1. Nothing of a law without one.
        scale_end: once it has widened; default twice ``scale_start``.
        move_steps: optimizer steps in which the location moves; the default, 10000, fits few runs.
            Nothing with a pacing by stages.
        widen_steps: optimizer steps in which the scale then grows, evenly; 0: it does not.
        pacing: "root" (fast at first), "linear" or "cosine" over ``move_steps``; or "patience" or
            "fixed", one position further at each stage.
        pacing_args: other parameters of the pacing.
        positions: of the location, and then of the scale, 2 to 256; default 64, by stages 20.
        data_std: standard deviation c of the data: the location is moved by -2 ln c.
        draw, floor, importance_correction, seed, continuous: see :class:`TimestepSampler`.
        outer_edges: see :meth:`NoiseLevels.from_scheduler`.

    Raises:
        ValueError: unknown names, a density without a location, numbers out of range, settings
            without effect, or no mass on the schedule.
    """

    static_law = False

    def __init__(
        self,
        scheduler: Any,
        density: str = "laplace",
        density_args: Mapping[str, Any] | None = None,
        location_start: float = -1.0,
        location_end: float = 2.0,
        scale_start: float | None = None,
        scale_end: float | None = None,
        move_steps: int | None = None,
        widen_steps: int = 0,
        pacing: str = "root",
        pacing_args: Mapping[str, Any] | None = None,
        positions: int | None = None,
        data_std: float = 1.0,
        draw: str = "stratified",
        floor: float = 0.1,
        importance_correction: str | float = "none",
        outer_edges: str = "half",
        seed: int = 0,
        continuous: bool = False,
    ) -> None:
        scheduler, shared = build_scheduler(scheduler), {"draw": draw, "floor": floor, "seed": seed}
        shared |= {"importance_correction": importance_correction, "continuous": continuous}
        super().__init__(NoiseLevels.from_scheduler(scheduler, outer_edges), **shared)
        above_zero("data_std", data_std)
        location, scale = (location_start, location_end), (scale_start, scale_end)
        rule = move_pacing(pacing, pacing_args or {}, move_steps)
        scales = checked_scales(density, scale, widen_steps)
        self.course = course = Course.of(location, scales, rule, positions, widen_steps)
        self._law_name, self._moved = density, -2 * math.log(data_std)
        self._law_args = other_parameters(density, density_args or {})
        self.learns = bool(rule.initial_state())
        self._progress = Progress(rule, course.positions)
        self._present: dict[tuple[str, torch.device], tuple[int, Tables]] = {}
        self._all: dict[str, dict[torch.device, Tables]] = {}
        self._check_ends()
        self.register_to_config(
            scheduler=plain_config(scheduler),
            density=density,
            density_args=self._law_args,
            location_start=location_start,
            location_end=location_end,
            scale_start=None if scales is None else scales[0],
            scale_end=scales[1] if scales is not None and widen_steps else None,
            move_steps=course.move_steps,
            widen_steps=widen_steps,
            pacing=pacing,
            pacing_args=dict(pacing_args or {}),
            positions=course.positions,
            data_std=data_std,
            outer_edges=outer_edges,
            **shared,
        )

    @classmethod
    def of_run(cls, arguments: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
        """With ``move_share`` and ``widen_share`` of a run as ``move_steps`` and ``widen_steps``;
        errors as of :func:`course.steps_of_run`."""
        return steps_of_run(arguments, steps)

    # -- the law ---------------------------------------------------------------------------------

    def density_at(self, step: int) -> Density:
        """The density, before the floor, of optimizer step ``step``; where the pacing learns, of
        the present stage, read back from the device."""
        return self._density(int(self._place(step)))

    def law(self, step: int, device: torch.device) -> Tensor:
        return self._of_place("law", self._law, step, device)[0]

    def first_laws(self) -> list[Tensor]:
        return [self._law(place)[0] for place in self.course.ends]

    def cells(self, step: int, device: torch.device) -> Cells:
        (knots,) = self._of_place("cells", self._knots, step, device)
        return Cells(knots, self.levels.family)

    def _tables(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        cdf, importance = self._of_place("tables", self._drawn, step, device)
        return cdf, importance

    def version(self, step: int) -> Hashable:
        place = self._place(step)
        return None if isinstance(place, Tensor) else place

    def _place(self, step: int) -> int | Tensor:
        """Where the course is; a tensor where that is known to a device only."""
        stage = self._progress.stage(step)
        if not self.learns:
            return self.course.place(stage, step - self.course.arrival)
        arrived = self._progress.opened_at[-1]
        since = torch.where(arrived < 0, -1, step - arrived)
        return self.course.place(stage, since if isinstance(stage, Tensor) else int(since))

    def _of_place(
        self, what: str, make: Callable[[int], Tables], step: int, device: torch.device
    ) -> Tables:
        """Tables of the place at ``step``, made when it is a new one; those of all places where a
        device alone knows which it is, which must not be read back at every step."""
        place = self._place(step)
        if isinstance(place, Tensor):
            if what not in self._all:
                columns = zip(*map(make, range(len(self.course))), strict=True)
                self._all[what] = {CPU: tuple(torch.stack(column) for column in columns)}
            return tuple(row(table, place + 1) for table in copy_on(device, self._all[what]))
        found = self._present.get((what, device))
        if found is None or found[0] != place:
            found = self._present[what, device] = place, to_device(make(place), device)
        return found[1]

    def _density(self, place: int) -> Density:
        location, scale = self.course.at(place)
        placed = placement_of(self._law_name).parameters(location + self._moved, scale)
        return make_density(self._law_name, self.levels.edges, **self._law_args, **placed)

    def _law(self, place: int) -> Tables:
        masses = self._density(place).masses(self.levels.edges)
        return (masses / masses.sum(),)

    def _drawn(self, place: int) -> Tables:
        (law,) = self._law(place)
        return tables(*compose(law, self.reference(0, CPU), self.floor, self.exponent))

    def _knots(self, place: int) -> Tables:
        return (Cells.of_density(self.levels, self._density(place)).knots,)

    def _check_ends(self) -> None:
        densities = [self._density(place) for place in self.course.ends]
        for density in densities:
            if not float(density.masses(self.levels.edges).sum()) > 0:
                raise ValueError(f"density {density} has no mass on this schedule: move it.")
        if self.floor == 0:
            warn_of_untrained_ends(densities[-1], self.levels)

    # -- learning and state ----------------------------------------------------------------------

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        """Advance a pacing that learns by the mean of the unweighted losses of one optimizer step;
        arguments as of :meth:`TimestepSampler.observe`."""
        if self.learns:
            stage = self._progress.stage(step)
            self._progress.observe(torch.zeros_like(indices) + (stage - 1), losses, step)

    def state_dict(self) -> dict[str, Any]:
        state = self._progress.state_dict() if self.learns else {}
        return super().state_dict() | {f"state.{name}": value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.learns:
            self._progress.load_state_dict(part_of(state, "state."))

    # -- what it tells of itself -----------------------------------------------------------------

    @classmethod
    def in_words(cls, config: Mapping[str, Any]) -> str:
        """Its law, then its way: ``moving laplace, floor=0.1; location -1 to 2 in 1500 steps
        (root), then scale 1 to 2 in 12000``."""
        own = {key: value for key, value in config.items() if key not in WAY}
        told = super().in_words(own | {"density": f"moving {config.get('density')}"})
        return f"{told}; {way_in_words(config)}"

    def report(self, step: int) -> Report:
        """Location and scale, in log-SNR."""
        location, scale = self.course.at(int(self._place(step)))
        told = {"location": location + self._moved} | ({} if scale is None else {"scale": scale})
        shown = {"centre": f"{told['location']:.2f}"}
        return Report({f"sampler/{name}": value for name, value in told.items()}, shown)

    def at_stage(self, stage: int | None = None, step: int | None = None) -> tuple[Tensor, Tensor]:
        if not self.learns:
            return super().at_stage(stage, step)
        place = len(self.course) - 1 if stage is None else stage - 1
        return compose(self._law(place)[0], self.reference(0, CPU), self.floor, self.exponent)

    def stage_starts(self, steps: int) -> tuple[list[float], str]:
        """Where a pacing that learns takes its places: as it did, or as they are planned."""
        if not self.learns:
            return super().stage_starts(steps)
        starts, how = self._progress.starts(steps)
        return [*starts, *self.course.widening_starts(starts[-1])], how

    def moments(self, steps: int) -> list[int]:
        if self.learns:
            return [0]
        telling = {min(self.course.arrival, steps - 1), steps - 1}
        return sorted({*super().moments(steps), *telling})
