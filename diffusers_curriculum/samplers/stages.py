"""Which clusters of noise levels each stage of a curriculum leaves open, what that leaves of a law,
and how far a curriculum has come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.checks import one_of
from diffusers_curriculum.noise_levels import to_device
from diffusers_curriculum.pacing import Pacing
from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.samplers.composition import are_finite, tables

ORDERS = ("easy_to_hard", "hard_to_easy", "random")
WITHIN = ("base", "balanced")


@dataclass(frozen=True, eq=False)
class Stages:
    """Clusters, in the order in which they open.

    Attributes:
        order: cluster numbers (0 = cleanest) in opening order.
        cluster_of: (T,) int64, cluster of each level.
        opened: (stages, T) float64, 1 where a level is open, else 0.
        balanced: whether each open cluster gets equal mass.
    """

    order: tuple[int, ...]
    cluster_of: Tensor
    opened: Tensor
    balanced: bool

    @classmethod
    def of(cls, starts: Sequence[int], levels: int, order: str, within: str, seed: int) -> Stages:
        """The stages of clusters that begin at ``starts``; ValueError for an unknown name."""
        one_of("order", order, ORDERS)
        one_of("within", within, WITHIN)
        opening = _opening_order(order, len(starts), seed)
        bounds = torch.tensor(starts[1:], dtype=torch.int64)
        cluster_of = torch.searchsorted(bounds, torch.arange(levels), right=True)
        rank = torch.tensor(opening).argsort()[cluster_of]
        opened = (rank[None, :] <= torch.arange(len(starts))[:, None]).double()
        return cls(tuple(opening), cluster_of, opened, within == "balanced")

    def __len__(self) -> int:
        return len(self.order)

    def spread(self, law: Tensor) -> Tensor:
        """(T,) the law with equal mass in each cluster if ``balanced``, else itself."""
        if not self.balanced:
            return law
        mass = self.cluster_masses(law)
        sizes = self.cluster_masses(torch.ones_like(law))
        law = torch.where(mass[self.cluster_of] > 0, law, 1.0)
        mass = torch.where(mass > 0, mass, sizes)
        return law / (mass[self.cluster_of] * len(self))

    def cluster_masses(self, law: Tensor) -> Tensor:
        """(stages,) mass of each cluster, cleanest first."""
        return law.new_zeros(len(self)).index_add(0, self.cluster_of, law)

    def without_mass(self, law: Tensor) -> list[int]:
        """The stages, counted from 1, that have no mass to draw from, or none to spread."""
        if self.balanced:
            mass = self.cluster_masses(law)[list(self.order)]
        else:
            mass = (self.opened * law).sum(1)
        return [stage + 1 for stage in (mass <= 0).nonzero().flatten().tolist()]


class StageTables(NamedTuple):
    """The (cdf, importance) of every stage, stacked and one by one."""

    stacked: tuple[Tensor, Tensor]
    single: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, stages: list[tuple[Tensor, Tensor]], device: torch.device) -> StageTables:
        rows = zip(*(tables(*stage) for stage in stages), strict=True)
        cdf, importance = (to_device(torch.stack(column), device) for column in rows)
        return cls((cdf, importance), list(zip(cdf, importance, strict=True)))

    def at(self, stage: int | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(stage, int):
            return self.single[stage - 1]
        cdf, importance = self.stacked
        return row(cdf, stage), row(importance, stage)


def row(rows: Tensor, stage: int | Tensor) -> Tensor:
    """The row of a stage, chosen on the device: a stage that a pacing learned there must not be
    read back to the host at every step."""
    if isinstance(stage, int):
        return rows[stage - 1]
    return rows.index_select(0, (stage - 1).reshape(1).to(rows.device))[0]


def restrict(law: Tensor, opened: Tensor) -> Tensor:
    """``law`` on the ``opened`` (0 or 1) levels, renormalised; itself, bit for bit, if all are."""
    return torch.where(opened.all(), law, renormalised(law, opened))


def renormalised(law: Tensor, opened: Tensor) -> Tensor:
    """``law`` on the ``opened`` (0 or 1) levels, divided by its sum there."""
    kept = law * opened
    # a learned law may have lost all mass there: then each open level is as good as another
    kept = torch.where(kept.sum() > 0, kept, opened)
    return kept / kept.sum()


def _opening_order(order: str, clusters: int, seed: int) -> list[int]:
    if order == "random":
        return host_generator(seed, purpose="curriculum order").permutation(clusters).tolist()
    return list(range(clusters)) if order == "hard_to_easy" else list(reversed(range(clusters)))


class Progress:
    """The state of a curriculum, kept where the losses are.

    Attributes:
        pace: the pacing's state: plain numbers while the losses are on the CPU, else tensors.
        cluster_counts: (stages,) int64, samples observed in each cluster, cleanest first.
        opened_at: (stages,) int64, the step from which each stage was drawn, -1 for those to come.
    """

    def __init__(self, pacing: Pacing, stages: int) -> None:
        self.pacing, self.stages = pacing, stages
        self.pace = _on(pacing.initial_state(), torch.device("cpu"))
        self.cluster_counts = torch.zeros(stages, dtype=torch.int64)
        self.opened_at = torch.full((stages,), -1)
        self._recorded = 0
        self._record_stage(0)

    def stage(self, step: int) -> int | Tensor:
        """The stage of optimizer step ``step``; a tensor where it is known to a device only."""
        return self.pacing.stage(self.pace, step, self.stages)

    def starts(self, steps: int) -> tuple[list[float], str]:
        """The step at which each stage opened (infinite: not yet), once losses were seen, else
        where it is planned in a run of ``steps``; and which of the two, in words."""
        if int(self.cluster_counts.sum()):
            opened = self.opened_at.tolist()
            return [math.inf if at < 0 else float(at) for at in opened], "stages as they opened"
        how = "on a loss plateau" if self.pacing.initial_state() else "planned"
        return self.pacing.planned_starts(self.stages, steps), f"stages as {how}"

    def observe(self, clusters: Tensor, losses: Tensor, step: int) -> None:
        """Take in optimizer step ``step``: unweighted losses (N,), and the cluster of each sample,
        (N,) int64, on one device."""
        self._move(losses.device)
        if self.pace:  # a schedule learns nothing
            self.pace = self.pacing.observe(self.pace, _mean(losses), self.stages)
        seen = are_finite(losses).to(clusters.dtype)
        self.cluster_counts = self.cluster_counts.index_add(0, clusters, seen)
        self._record_stage(step + 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors on the CPU, int64 or float64."""
        pace = {name: as_tensor(value).cpu() for name, value in self.pace.items()}
        seen = {"cluster_counts": self.cluster_counts, "opened_at": self.opened_at}
        return pace | {name: value.cpu() for name, value in seen.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state with the keys of :meth:`state_dict`; it goes where this one is."""
        device = self.opened_at.device
        tensors = {name: torch.as_tensor(value).to(device) for name, value in state.items()}
        self.cluster_counts = tensors.pop("cluster_counts")
        self.opened_at = tensors.pop("opened_at")
        self.pace, self._recorded = _on(tensors, device), 0

    def _move(self, device: torch.device) -> None:
        if self.opened_at.device != device:
            self.pace = _on(self.pace, device)
            self.cluster_counts = to_device(self.cluster_counts, device)
            self.opened_at = to_device(self.opened_at, device)

    def _record_stage(self, step: int) -> None:
        stage = self.stage(step)
        if isinstance(stage, int):
            if stage <= self._recorded:
                return
            self._recorded = stage
        numbers = torch.arange(1, self.stages + 1, device=self.opened_at.device)
        opened = (self.opened_at < 0) & (numbers <= stage)
        self.opened_at = torch.where(opened, step, self.opened_at)


def reads_freely(device: torch.device) -> bool:
    """Whether a number can be read from ``device`` without waiting for it."""
    return device.type == "cpu"


def as_tensor(value: Any) -> Tensor:
    """One entry of a pacing's state as a 0-dim tensor, int64 or float64 if it is a number."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _on(pace: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A pacing's state for losses on ``device``."""
    if reads_freely(device):
        return {k: v.item() if isinstance(v, Tensor) else v for k, v in pace.items()}
    return {k: to_device(as_tensor(v), device) for k, v in pace.items()}


def _mean(losses: Tensor) -> Tensor | float:
    """The mean in float64, or in float32 where a device has no float64."""
    if reads_freely(losses.device):
        return losses.mean(dtype=torch.float64).item()
    return losses.to(torch.float32 if losses.device.type == "mps" else torch.float64).mean()
