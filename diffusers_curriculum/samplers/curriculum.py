"""The easy-to-hard curriculum of denoising difficulty (arXiv 2403.10348)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.clustering import automatic, automatic_before, cluster_starts
from diffusers_curriculum.pacing import Pacing, make_pacing
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSampler
from diffusers_curriculum.samplers.composition import CPU, Cells, compose, copy_on, pick
from diffusers_curriculum.samplers.description import (
    Report,
    checked_config,
    clusters_in_words,
    describe_config,
    plain_config,
    upgraded_config,
)
from diffusers_curriculum.samplers.stages import (
    Progress,
    Stages,
    StageTables,
    as_tensor,
    renormalised,
    restrict,
    row,
)
from diffusers_curriculum.samplers.states import part_of, starts_of, upgraded_part


@SAMPLERS.register(
    "curriculum",
    formula="p_n(l) = p(l) on the clusters open at stage n, renormalised",
    source="arXiv 2403.10348",
    note="takes any sampler as its base; --curriculum difficulty",
)
class CurriculumTimestepSampler(TimestepSampler):
    """Restricts any sampler to the open clusters of noise levels; clusters open stage by stage.

    Stage n draws from the base law restricted to n clusters and renormalised, easiest (noisiest)
    first; stages accumulate, and from the last on the sampler is its base, bit for bit (with
    ``within="base"``). The floor and the importance refer to the restricted reference; that is also
    drawn from where a law that is learned has lost all its mass on the open levels.

    Args:
        base: the sampler to restrict, or its config. Its draw, floor, importance correction and
            seed hold for the curriculum, and so do continuous draws, which fill whole open cells.
        clusters: number of clusters.
        clustering: a method of :func:`clustering.cluster_starts`, or "auto": quantile, equal mass
            under the base law, so that about 1 / n of the draws of stage n are in its newest
            cluster; log_snr where a variance preserving schedule is drawn uniformly. (In configs
            that versions before stored, "auto" is log_snr on all variance preserving schedules.)
        clustering_args: further arguments of it: center, min_size, boundaries.
        pacing: "patience" (the paper's), "fixed", "linear", "cosine" or "root".
        pacing_args: its parameters.
        order: "easy_to_hard", "hard_to_easy" (anti-curriculum) or "random" (both controls).
        within: "base" (the base law over the union of the open clusters) or "balanced" (equal
            mass for each open cluster).

    Raises:
        ValueError: unknown names, impossible clusterings, numbers out of range, or a base law
            without mass on the clusters of a stage.
    """

    static_law = False
    pacing: Pacing

    def __init__(
        self,
        base: TimestepSampler | Mapping[str, Any],
        clusters: int = 20,
        clustering: str = "auto",
        clustering_args: Mapping[str, Any] | None = None,
        pacing: str = "patience",
        pacing_args: Mapping[str, Any] | None = None,
        order: str = "easy_to_hard",
        within: str = "base",
    ) -> None:
        if not isinstance(base, TimestepSampler):
            base = TimestepSampler.from_config(checked_config("base", base))
        self.base = base
        super().__init__(self.base.levels, **self.base.settings)
        law = self.base.law(0, CPU)
        method = automatic(self.levels, law) if clustering == "auto" else clustering
        self.starts = cluster_starts(
            self.levels, clusters, method, masses=law, **(clustering_args or {})
        )
        self.stages, self.learns = len(self.starts), self.base.learns
        self.order, self.within = order, within
        self.pacing = make_pacing(pacing, **(pacing_args or {}))
        stages = Stages.of(self.starts, len(self.levels), order, within, self.seed)
        self._stages_on = {CPU: stages}
        self._stage_tables: dict[torch.device, StageTables] = {}
        self._progress = Progress(self.pacing, self.stages)
        self._outer: Tensor | None = None  # what a curriculum around this one leaves open
        for stage in [s for first in self.base.first_laws() for s in stages.without_mass(first)]:
            low, high = self.open_range(stage)
            raise ValueError(
                f"the base law has no mass on stage {stage}, log-SNR {low:.1f}..{high:.1f}: choose "
                "a wider density, fewer clusters or clustering 'quantile'."
            )
        self.register_to_config(
            base=plain_config(self.base),
            clusters=clusters,
            # where versions before took another, "auto" would not say which it is
            clustering=clustering if method == automatic_before(self.levels) else method,
            clustering_args=dict(clustering_args or {}),
            pacing=pacing,
            pacing_args=dict(pacing_args or {}),
            order=order,
            within=within,
        )

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, base: Mapping[str, Any] | None = None, **config: Any
    ) -> CurriculumTimestepSampler:
        """A curriculum over a :class:`DensityTimestepSampler` of ``scheduler`` with the settings
        ``base`` (default: uniform over timesteps)."""
        default = {"_class_name": "DensityTimestepSampler", "density": "uniform"}
        settings = default | dict(base or {})
        return cls(TimestepSampler.from_config(settings, scheduler=scheduler), **config)

    @classmethod
    def upgraded_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        base = upgraded_config(config.get("base"))
        if not isinstance(base, Mapping):
            return dict(config)
        found = dict(config) | {"base": base}
        if config.get("clustering") == "auto":
            built = TimestepSampler.from_config(base)
            before = automatic_before(built.levels)
            if automatic(built.levels, built.law(0, CPU)) != before:
                found["clustering"] = before
        return found

    # -- the law ---------------------------------------------------------------------------------

    def law(self, step: int, device: torch.device) -> Tensor:
        return self._restrict(self._on(device).spread(self.base.law(step, device)), step)

    def first_laws(self) -> list[Tensor]:
        stages = self._on(CPU)
        laws = (stages.spread(law) for law in self.base.first_laws())
        return [renormalised(law, stages.opened[0]) for law in laws]

    def reference(self, step: int, device: torch.device) -> Tensor:
        return self._restrict(self.base.reference(step, device), step)

    def stage(self, step: int | None = None) -> int:
        """The stage (1 to ``stages``) of optimizer step ``step``; where the pacing learns, the
        present one, read back from the device."""
        return int(self._progress.stage(self._step(step)))

    @property
    def open_order(self) -> tuple[int, ...]:
        """Cluster numbers (0 = cleanest) in the order in which they open."""
        return self._on(CPU).order

    def open_levels(self, stage: int) -> Tensor:
        """(T,) bool: the levels open at ``stage``."""
        return self._on(CPU).opened[stage - 1].bool()

    def open_range(self, stage: int) -> tuple[float, float]:
        """(lowest, highest) log-SNR open at ``stage``."""
        opened = self.levels.log_snr[self.open_levels(stage)]
        return float(opened.min()), float(opened.max())

    def cells(self, step: int, device: torch.device) -> Cells:
        return self.base.cells(step, device)

    def version(self, step: int) -> Hashable:
        stage, base = self._progress.stage(step), self.base.version(step)
        return None if base is None or isinstance(stage, Tensor) else (stage, base)

    # -- learning --------------------------------------------------------------------------------

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        """Advance the pacing by the mean of the unweighted losses of one optimizer step; arguments
        as of :meth:`TimestepSampler.observe`. A base that learns does so on the open levels."""
        if self.learns:
            opened = row(self._on(losses.device).opened, self._progress.stage(step))
            self.base.tell_open(opened if self._outer is None else opened * self._outer)
        self.base.observe(indices, losses, step)
        self._progress.observe(pick(self._on(losses.device).cluster_of, indices), losses, step)

    def tell_open(self, opened: Tensor) -> None:
        self._outer = opened

    def metrics(self) -> dict[str, Tensor]:
        """Patience counter and best loss, as far as the pacing has them, on the device."""
        names, pace = {"counter": "patience_counter", "best": "best_loss"}, self._progress.pace
        return {new: as_tensor(pace[old]) for old, new in names.items() if old in pace}

    # -- what it tells of itself -----------------------------------------------------------------

    @classmethod
    def in_words(cls, config: Mapping[str, Any]) -> str:
        """The base in words, then its clusters: ``uniform; 9 clusters, easy_to_hard, patience``."""
        return f"{describe_config(config.get('base'))}; {clusters_in_words(config)}"

    def rows(self) -> dict[str, str]:
        told = self.base.rows()
        own, inner = clusters_in_words(self.config), told.get("Curriculum")
        return told | {"Curriculum": f"{own}; inside it {inner}" if inner else own}

    def report(self, step: int) -> Report:
        """Stage and open range of log-SNR, how far the pacing is, and the metrics of the base."""
        stage = self.stage(step)
        low, high = self.open_range(stage)
        found = {"stage": stage, "log_snr_low": low, "log_snr_high": high} | self.metrics()
        told = {f"curriculum/{name}": float(value) for name, value in found.items()}
        told |= {f"sampler/{name}": float(value) for name, value in self.base.metrics().items()}
        shown = {"stage": f"{stage}/{self.stages}", "log_snr": f"[{low:.1f}, {high:.1f}]"}
        return Report(told, shown, stage)

    def opening(self, stage: int) -> str:
        low, high = self.open_range(stage)
        told = f"{super().opening(stage)} since step {int(self.opened_at[stage - 1])}"
        return f"{told}: log-SNR {low:.2f} to {high:.2f}, new cluster {self.open_order[stage - 1]}"

    @property
    def inner(self) -> Sequence[TimestepSampler]:
        return (self.base,)

    @property
    def opened(self) -> TimestepSampler:
        return self.base.opened

    def at_stage(self, stage: int | None = None, step: int | None = None) -> tuple[Tensor, Tensor]:
        stages, at = self._on(CPU), 0 if step is None else step
        opened = stages.opened[(self.stages if stage is None else max(stage, 1)) - 1]
        law = restrict(stages.spread(self.base.law(at, CPU)), opened)
        reference = restrict(self.base.reference(at, CPU), opened)
        return compose(law, reference, self.floor, self.exponent)

    def stage_starts(self, steps: int) -> tuple[list[float], str]:
        """Where the stages opened, once losses were seen, else where they are planned."""
        starts, how = self._progress.starts(steps)
        inner = self.base.stage_starts(steps)[1] if self.base.learns else ""
        return starts, f"{how}; the base {inner}" if inner else how

    def moments(self, steps: int) -> list[int]:
        return self.base.moments(steps)

    def groups(self) -> tuple[str, Sequence[int]]:
        return "cluster", self.starts

    @property
    def cluster_counts(self) -> Tensor:
        """(stages,) int64: samples observed in each cluster so far, cleanest first."""
        return self._progress.cluster_counts.cpu()

    @property
    def opened_at(self) -> Tensor:
        """(stages,) int64: the step from which each stage was drawn, -1 for those to come."""
        return self._progress.opened_at.cpu()

    def state_dict(self) -> dict[str, Any]:
        state = {f"state.{k}": v for k, v in self._progress.state_dict().items()}
        base = {f"base.{k}": v for k, v in self.base.state_dict().items()}
        return super().state_dict() | state | base | {"starts": torch.tensor(self.starts)}

    def upgraded(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return dict(state) | upgraded_part(self.base, state, "base.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        starts = starts_of(state)
        if starts and tuple(starts) != self.starts:
            raise ValueError(
                f"the state has clusters starting at {starts}, this sampler at "
                f"{list(self.starts)}: build it from the same config and scheduler."
            )
        super().load_state_dict(state)
        self.base.load_state_dict(part_of(state, "base."))
        self._progress.load_state_dict(part_of(state, "state."))

    # -- internals -------------------------------------------------------------------------------

    def _on(self, device: torch.device) -> Stages:
        return copy_on(device, self._stages_on)

    def _restrict(self, law: Tensor, step: int) -> Tensor:
        stage = self._progress.stage(step)
        opened = row(self._on(law.device).opened, stage)
        if isinstance(stage, Tensor):
            return restrict(law, opened)
        return law if stage == self.stages else renormalised(law, opened)

    def _tables(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self.base.static_law:
            return super()._tables(step, device)
        if device not in self._stage_tables:
            stages = [self.at_stage(stage) for stage in range(1, self.stages + 1)]
            self._stage_tables[device] = StageTables.of(stages, device)
        return self._stage_tables[device].at(self._progress.stage(step))
