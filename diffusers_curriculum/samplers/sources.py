"""A law of its own for each source of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.noise_levels import to_device
from diffusers_curriculum.randomness import Slots
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSample, TimestepSampler
from diffusers_curriculum.samplers.composition import SourceOrder, pick
from diffusers_curriculum.samplers.description import (
    Report,
    checked_config,
    describe_config,
    plain_config,
    upgraded_config,
)
from diffusers_curriculum.samplers.sequence import check_alike, sampler_for
from diffusers_curriculum.samplers.states import part_of, upgraded_part


@SAMPLERS.register(
    "per_source",
    formula="p(l | s) = p_k(s)(l), k(s) the law of source s",
    source="a law of your own for each data set",
    note="takes laws; --data_config",
)
class PerSourceTimestepSampler(TimestepSampler):
    """Draws each sample's noise level by the law of its source: p(l | s) = p_k(s)(l).

    One number u is drawn for each slot of the global batch, as ever, and put through the inverse
    cdf of the slot's law, so that a sample gets the level that its law alone would give that slot.
    Its importance is that of its law, which observes the losses of its own samples and no others.

    Which source a slot is of is told to :meth:`sample` and :meth:`observe`, or by an order of the
    samples (:meth:`take_order`), as training scripts have it.

    Args:
        laws: samplers, or their configs; the first one is for what is of no source, too.
        of_source: (S,) the law of each source, by its place in ``laws``.

    The laws must agree on draw, seed and continuous draws, and be of the same schedule.

    Raises:
        ValueError: no laws, laws that disagree, or a source whose law there is not.
    """

    def __init__(
        self, laws: Sequence[TimestepSampler | Mapping[str, Any]], of_source: Sequence[int]
    ) -> None:
        self.parts = tuple(map(_built, laws))
        if not self.parts:
            raise ValueError("laws=[] draws from nothing: give at least one law.")
        if {*of_source, 0} != {*range(len(self.parts))}:
            raise ValueError(
                f"of_source={list(of_source)} must name each of {len(self.parts)} laws by its "
                f"place from 0 to {len(self.parts) - 1}; only the first one may be left out."
            )
        first = self.parts[0]
        for number, law in enumerate(self.parts[1:], 2):
            names = "law 1", f"law {number}"
            check_alike(first, law, names, ("draw", "seed", "continuous"))
        super().__init__(first.levels, **first.settings)
        self.exponent = max(law.exponent for law in self.parts)
        self.static_law = all(law.static_law for law in self.parts)
        self.learns = any(law.learns for law in self.parts)
        self.stages, self.pacing = first.stages, first.pacing
        self.of_source = tuple(of_source)
        self._law_of = np.array([*of_source, 0])  # the last one is that of source -1
        self._order: SourceOrder | None = None
        self.register_to_config(
            laws=[plain_config(law) for law in self.parts], of_source=list(of_source)
        )

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, laws: Sequence[Any] = (), of_source: Sequence[int] = ()
    ) -> PerSourceTimestepSampler:
        """Laws for ``scheduler``; their configs need none, and are of a
        :class:`DensityTimestepSampler` where they name no class."""
        return cls([sampler_for(scheduler, law) for law in laws], of_source)

    @classmethod
    def upgraded_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        laws = config.get("laws", ())
        return dict(config) | {"laws": [upgraded_config(law) for law in laws]}

    def take_order(self, order: SourceOrder) -> None:
        self._order = order

    @property
    def inner(self) -> Sequence[TimestepSampler]:
        return self.parts

    @property
    def laws(self) -> dict[str, TimestepSampler]:
        return dict(zip(_names(self.of_source), self.parts, strict=True))

    # -- drawing ---------------------------------------------------------------------------------

    def sample(
        self,
        batch: int | Slots | None = None,
        *,
        u: Tensor | None = None,
        step: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        tokens: int | None = None,
        arrangement: str = "independent",
        sources: Sequence[int] | np.ndarray | None = None,
    ) -> TimestepSample:
        """Draw noise levels for a batch; arguments as of :meth:`TimestepSampler.sample`.

        Args:
            sources: (B,) the source of each sample; default: as the order of the samples says.

        Raises:
            ValueError: neither or both of ``batch`` and ``u``, or sources that are not known.
        """
        at, order = self._step(step), self._order
        if sources is None:
            if order is None or not isinstance(batch, Slots):
                raise ValueError("sample() needs to know of which source each sample is: sources.")
            sources = order.sources_at(at, batch)
        u = self._numbers(batch, u, at, generator, tokens, arrangement)
        if step is None:
            self._calls += 1
        own = self._slots_of_laws(sources, len(u))
        parts = {number: pick(u, _indices(slots, u.device)) for number, slots in own.items()}
        drawn = [self.parts[k].sample(u=part, step=at, device=device) for k, part in parts.items()]
        if len(drawn) == 1:
            return drawn[0]
        place = _indices(np.argsort(np.concatenate([*own.values()])), drawn[0].indices.device)
        columns: Any = (
            None if column[0] is None else pick(torch.cat(column), place)
            for column in zip(*drawn, strict=True)
        )
        return TimestepSample(*columns)

    def observe(
        self,
        indices: Tensor,
        losses: Tensor,
        step: int,
        sources: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Let each law learn from the losses of its own samples.

        Args:
            sources: (N,) the source of each sample; default: as the order of the samples says.

        Raises:
            ValueError: sources that are not known, or not one for each loss.
        """
        if sources is None:
            if self._order is None:
                raise ValueError("observe() needs to know of which source each loss is: sources.")
            sources = self._order.sources_observed(step)
        for number, samples in self._slots_of_laws(sources, len(losses)).items():
            own = _indices(samples, losses.device)  # from the host: nothing is waited for
            self.parts[number].observe(indices[own], losses[own], step)

    def _slots_of_laws(self, sources: Sequence[int] | np.ndarray, count: int) -> dict[int, Any]:
        """(n,) the places of the samples of each law that has some."""
        sources = np.asarray(sources)
        known = sources.shape == (count,) and np.isin(sources, range(-1, len(self.of_source))).all()
        if not known:
            raise ValueError(
                f"sources={sources.tolist()} must be {count} numbers from -1 (of none) to "
                f"{len(self.of_source) - 1}, one for each sample."
            )
        laws = self._law_of[sources]
        return {int(number): np.flatnonzero(laws == number) for number in np.unique(laws)}

    # -- the law ---------------------------------------------------------------------------------

    @property
    def shares(self) -> list[float]:
        """Of the laws among all draws; as if all sources were alike until their order is told."""
        count = len(self.of_source)
        told = [1 / count] * count if self._order is None else self._order.shares_of_sources
        found = [0.0] * len(self.parts)
        for law, share in zip(self.of_source, told, strict=True):
            found[law] += share
        found[0] += 1 - sum(found)  # of what is of no source
        return found

    def law(self, step: int, device: torch.device) -> Tensor:
        means = zip(self.shares, self.parts, strict=True)
        return torch.stack([share * part.law(step, device) for share, part in means]).sum(0)

    def first_laws(self) -> list[Tensor]:
        return [law for part in self.parts for law in part.first_laws()]

    def at_stage(self, stage: int | None = None, step: int | None = None) -> tuple[Tensor, Tensor]:
        """In a stage of the first law, the others as they are at that step."""
        first, *others = self.parts
        now = [None if stage is None else other.stage(step) for other in others]
        pairs = [part.at_stage(at, step) for part, at in zip(others, now, strict=True)]
        return self._joined([first.at_stage(stage, step), *pairs])

    @property
    def opened(self) -> TimestepSampler:
        found = PerSourceTimestepSampler([part.opened for part in self.parts], self.of_source)
        found._order = self._order
        return found

    def _mass_and_importance(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return self._joined([part._mass_and_importance(step, device) for part in self.parts])

    def _joined(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The mean mass, and the mean importance of a draw at each level."""
        weighted = list(zip(self.shares, pairs, strict=True))
        mass = torch.stack([share * mass for share, (mass, _) in weighted]).sum(0)
        moved = torch.stack([share * m * importance for share, (m, importance) in weighted]).sum(0)
        return mass, torch.where(mass > 0, moved / mass, 1.0)

    # -- what it tells of itself -----------------------------------------------------------------

    @classmethod
    def in_words(cls, config: Mapping[str, Any]) -> str:
        """Its laws in their own words: ``uniform; of source2: laplace(mu=0.0)``."""
        first, *others = map(describe_config, config["laws"])
        told = zip(_names(config["of_source"])[1:], others, strict=True)
        return "; ".join([first, *(f"of {name}: {law}" for name, law in told)])

    def rows(self) -> dict[str, str]:
        others = list(self.laws.items())[1:]
        return self.parts[0].rows() | {f"Timesteps of {n}": law.describe() for n, law in others}

    def metrics(self) -> dict[str, Tensor]:
        """Those of all laws, but for the first under source2_, ..."""
        found = {}
        for name, law in self.laws.items():
            found |= {f"{name}_{k}" if name else k: v for k, v in law.metrics().items()}
        return found

    def report(self, step: int) -> Report:
        """That of the first law, with the metrics of the others under source2/, ..."""
        reports = {name: law.report(step) for name, law in self.laws.items()}
        metrics = {}
        for name, told in reports.items():
            metrics |= {f"{name}/{k}" if name else k: v for k, v in told.metrics.items()}
        return reports[""]._replace(metrics=metrics)

    def stage(self, step: int | None = None) -> int:
        return self.parts[0].stage(step)

    def opening(self, stage: int) -> str:
        return self.parts[0].opening(stage)

    def stage_starts(self, steps: int) -> tuple[list[float], str]:
        return self.parts[0].stage_starts(steps)

    def moments(self, steps: int) -> list[int]:
        return sorted({moment for part in self.parts for moment in part.moments(steps)})

    def groups(self) -> tuple[str, Sequence[int]]:
        return self.parts[0].groups()

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        parts = enumerate(part.state_dict() for part in self.parts)
        own = {f"law{n}.{name}": value for n, state in parts for name, value in state.items()}
        return super().state_dict() | own

    def upgraded(self, state: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(state)
        for number, part in enumerate(self.parts):
            found |= upgraded_part(part, state, f"law{number}.")
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for number, part in enumerate(self.parts):
            part.load_state_dict(part_of(state, f"law{number}."))


def _built(law: TimestepSampler | Mapping[str, Any]) -> TimestepSampler:
    if isinstance(law, TimestepSampler):
        return law
    return TimestepSampler.from_config(checked_config("law", law))


def _names(of_source: Sequence[int]) -> list[str]:
    """What laws are called, by their first sources; the first one by none."""
    laws = range(1, max(of_source, default=0) + 1)
    return ["", *(f"source{list(of_source).index(law) + 1}" for law in laws)]


def _indices(places: np.ndarray, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(places), device)
