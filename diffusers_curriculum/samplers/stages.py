"""Which clusters of noise levels each stage of a curriculum leaves open, and what it leaves of a
law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.checks import one_of
from diffusers_curriculum.noise_levels import to_device
from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.samplers.composition import tables

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
        """The stages of clusters that begin at ``starts``.

        Raises:
            ValueError: unknown ``order`` or ``within``.
        """
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
