"""One sampler after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.checks import one_of, whole
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSampler
from diffusers_curriculum.samplers.composition import Cells
from diffusers_curriculum.samplers.description import (
    checked_config,
    describe_config,
    plain_config,
    upgraded_config,
)
from diffusers_curriculum.samplers.states import part_of, upgraded_part


class Phase(NamedTuple):
    """A sampler in force at a step, the step counted from its own start, and its share."""

    number: int
    step: int
    share: float


@SAMPLERS.register(
    "sequence",
    formula="p(l) = p_k(l), k the phase of the step",
    source="arXiv 2603.12517 for two phases",
    note="takes phases",
)
class SequenceTimestepSampler(TimestepSampler):
    """Draws from one sampler until a step, then from the next; logit-normal first and uniform later
    is the two-phase law of arXiv 2603.12517.

    Each phase sees steps counted from its own start, so that a curriculum as a phase begins at its
    first stage. Losses go to the phases in force, and to those still to come that learn means per
    noise level (:attr:`AdaptiveTimestepSampler.learns_from_any_law`), with the step of the whole
    run: they have their law ready when their turn comes. A curriculum to come sees none, as its
    pacing would advance on losses of levels it did not open; nor does a phase that is over.

    Args:
        phases: in order; each a mapping of "sampler" (a sampler or its config) and "until", the
            first optimizer step that it no longer draws for, None for the last one.
        mix: "hard", or "linear": over ``mix_steps`` steps from a switch on, the share of the new
            law rises linearly from 1 / (mix_steps + 1) to 1.
        mix_steps: for "linear"; at most the length of a phase.

    The phases must agree on draw, floor, importance correction, seed and continuous draws, which
    hold for the sequence, and be of the same schedule.

    Raises:
        ValueError: no phases, steps that do not increase, phases that disagree, unknown names or
            numbers out of range.
    """

    static_law = False

    def __init__(
        self, phases: Sequence[Mapping[str, Any]], mix: str = "hard", mix_steps: int = 0
    ) -> None:
        self.samplers = tuple(_phase_sampler(number, p) for number, p in enumerate(phases, 1))
        ends: list[Any] = [phase.get("until") for phase in phases]
        _check_ends(ends)
        first, *others = self.samplers
        for number, sampler in enumerate(others, 2):
            check_alike(first, sampler, ("phase 1", f"phase {number}"), [*first.settings])
        super().__init__(first.levels, **first.settings)
        self.learns = any(sampler.learns for sampler in self.samplers)
        self.starts: tuple[int, ...] = (0, *ends[:-1])
        _check_mix(mix, mix_steps, self.starts)
        self._mix_steps = mix_steps
        self.register_to_config(
            phases=[
                {"until": end, "sampler": plain_config(sampler)}
                for end, sampler in zip(ends, self.samplers, strict=True)
            ],
            mix=mix,
            mix_steps=mix_steps,
        )

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, phases: Sequence[Mapping[str, Any]] = (), **config: Any
    ) -> SequenceTimestepSampler:
        """A sequence for ``scheduler``; the phases' configs need none, and are of a
        :class:`DensityTimestepSampler` where they name no class."""
        built = [dict(p) | {"sampler": sampler_for(scheduler, p["sampler"])} for p in phases]
        return cls(built, **config)

    @classmethod
    def two_phase(
        cls,
        scheduler: Any,
        switch_step: int,
        first: Mapping[str, Any] | None = None,
        second: Mapping[str, Any] | None = None,
        *,
        mix: str = "hard",
        mix_steps: int = 0,
        **settings: Any,
    ) -> SequenceTimestepSampler:
        """A logit-normal law on the noisy side until ``switch_step``, then uniform (arXiv
        2603.12517, reported with the switch at 60,000 of 100,000 steps).

        Args:
            switch_step: first optimizer step of the second law; required, as it depends on the run.
            first: density and density_args of the first law, default the reported logit t ~
                N(0.8, 1), t the noise fraction, that is N(-1.6, 2^2) in log-SNR.
            second: those of the second, default uniform over timesteps.
            settings: of both :class:`DensityTimestepSampler`: draw, floor, seed, ...
        """
        logit_normal = {"density": "normal", "density_args": {"mean": -1.6, "std": 2.0}}
        phases = [
            {"until": switch_step, "sampler": settings | dict(first or logit_normal)},
            {"until": None, "sampler": settings | dict(second or {"density": "uniform"})},
        ]
        return cls.from_scheduler(scheduler, phases, mix=mix, mix_steps=mix_steps)

    @classmethod
    def upgraded_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        phases = config.get("phases", ())
        parts = [
            {k: upgraded_config(v) for k, v in p.items()} if isinstance(p, Mapping) else p
            for p in phases
        ]
        return dict(config) | ({"phases": parts} if "phases" in config else {})

    # -- the law ---------------------------------------------------------------------------------

    def phases_at(self, step: int) -> list[Phase]:
        """What optimizer step ``step`` draws from: one phase, or two while they are mixed."""
        number = bisect_right(self.starts, max(step, 0)) - 1
        age = step - self.starts[number]
        if not number or age >= self._mix_steps:
            return [Phase(number, age, 1.0)]
        share = (age + 1) / (self._mix_steps + 1)
        before = Phase(number - 1, step - self.starts[number - 1], 1 - share)
        return [before, Phase(number, age, share)]

    def law(self, step: int, device: torch.device) -> Tensor:
        return self._mixed("law", step, device)

    def first_laws(self) -> list[Tensor]:
        return [law for sampler in self.samplers for law in sampler.first_laws()]

    def reference(self, step: int, device: torch.device) -> Tensor:
        return self._mixed("reference", step, device)

    def cells(self, step: int, device: torch.device) -> Cells:
        present = self.phases_at(step)[-1]  # where two are mixed, inside a cell the new one
        return self.samplers[present.number].cells(present.step, device)

    def version(self, step: int) -> Hashable:
        present, *second = self.phases_at(step)
        own = None if second else self.samplers[present.number].version(present.step)
        return None if own is None else (present.number, own)

    def _mixed(self, kind: str, step: int, device: torch.device) -> Tensor:
        phases = self.phases_at(step)
        laws = [getattr(self.samplers[p.number], kind)(p.step, device) for p in phases]
        if len(phases) == 1:
            return laws[0]
        return laws[0] * phases[0].share + laws[1] * phases[1].share

    def _tables(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        phases = self.phases_at(step)
        if len(phases) > 1:
            return super()._tables(step, device)
        return self.samplers[phases[0].number]._tables(phases[0].step, device)

    # -- learning --------------------------------------------------------------------------------

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        in_force = {phase.number: phase.step for phase in self.phases_at(step)}
        for number in range(min(in_force), len(self.samplers)):
            sampler = self.samplers[number]
            if sampler.learns_from_any_law:
                sampler.observe(indices, losses, step)
            elif number in in_force:
                sampler.observe(indices, losses, in_force[number])

    def metrics(self) -> dict[str, Tensor]:
        """Those of all phases, under phase1_, phase2_, ..."""
        return self._of_all("phase{}_", lambda sampler: sampler.metrics())

    # -- what it tells of itself -----------------------------------------------------------------

    @classmethod
    def in_words(cls, config: Mapping[str, Any]) -> str:
        """Its phases in their own words: ``normal(mean=-1.6) until step 5, then uniform``."""
        phases = config.get("phases", ())
        laws = [describe_config(phase.get("sampler")) for phase in phases]
        ends = [f" until step {phase.get('until')}" for phase in phases[:-1]]
        told = ", then ".join(law + end for law, end in zip(laws, [*ends, ""], strict=False))
        return told + (f", mixed over {steps} steps" if (steps := config.get("mix_steps")) else "")

    @property
    def inner(self) -> Sequence[TimestepSampler]:
        return self.samplers

    def moments(self, steps: int) -> list[int]:
        return sorted({*super().moments(steps), *(s for s in self.starts if s < steps)})

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self._of_all("phase{}.", lambda s: s.state_dict())

    def upgraded(self, state: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(state)
        for number, sampler in enumerate(self.samplers, 1):
            found |= upgraded_part(sampler, state, f"phase{number}.")
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for number, sampler in enumerate(self.samplers, 1):
            sampler.load_state_dict(part_of(state, f"phase{number}."))

    def _of_all(self, prefix: str, get: Any) -> dict[str, Any]:
        return {
            prefix.format(number) + name: value
            for number, sampler in enumerate(self.samplers, 1)
            for name, value in get(sampler).items()
        }


def _phase_sampler(number: int, phase: Mapping[str, Any]) -> TimestepSampler:
    """The sampler of a phase, built if it is a config; ValueError for other keys than these two."""
    unknown = sorted(checked_config(f"phase {number}", phase).keys() - {"until", "sampler"})
    if unknown or "sampler" not in phase:
        raise ValueError(
            f"phase {number} has {', '.join(sorted(phase)) or 'nothing'}: it takes 'sampler' and "
            "'until' (None for the last phase)."
        )
    given = phase["sampler"]
    if isinstance(given, TimestepSampler):
        return given
    return TimestepSampler.from_config(checked_config(f"sampler of phase {number}", given))


def sampler_for(scheduler: Any, settings: Any) -> TimestepSampler:
    """The sampler for ``scheduler`` with ``settings``, by default a density sampler; a sampler is
    returned as it is."""
    if isinstance(settings, TimestepSampler):
        return settings
    arguments = {k: v for k, v in settings.items() if k not in ("_class_name", "scheduler")}
    kind = TimestepSampler.kind_of({"_class_name": "DensityTimestepSampler"} | settings)
    return kind.from_scheduler(scheduler, **arguments)


def _check_ends(ends: Sequence[Any]) -> None:
    """Raise ValueError unless the steps at which phases end increase, and the last is None."""
    if not ends:
        raise ValueError("phases=[] draws from nothing: give at least one phase.")
    if ends[-1] is not None:
        raise ValueError(f"until={ends[-1]!r} of the last phase must be None: it never ends.")
    for number, (before, end) in enumerate(pairwise([0, *ends[:-1]]), 1):
        whole(f"until (of phase {number})", end, before + 1)


def check_alike(
    first: TimestepSampler, other: TimestepSampler, names: tuple[str, str], settings: Sequence[str]
) -> None:
    """Raise ValueError unless two samplers, as messages call them, can be parts of one: some
    settings and the schedule are the same."""
    mine, theirs = names
    for name in settings:
        if first.settings[name] != other.settings[name]:
            *most, last = settings
            raise ValueError(
                f"{theirs} has {name}={other.settings[name]!r} and {mine} "
                f"{first.settings[name]!r}: give all the same {', '.join(most)} and {last}."
            )
    a, b = first.levels, other.levels
    if len(a) != len(b) or not torch.equal(a.log_snr, b.log_snr):
        raise ValueError(f"{theirs} is of another schedule than {mine}: use one scheduler.")


def _check_mix(mix: str, mix_steps: int, starts: Sequence[int]) -> None:
    """Raise ValueError for an unknown ``mix``, or a mixture that outlasts a phase."""
    one_of("mix", mix, ("hard", "linear"))
    if mix == "hard" and mix_steps != 0:
        raise ValueError(f"mix_steps={mix_steps!r} has no effect with mix='hard': use 'linear'.")
    if mix == "linear":
        whole("mix_steps", mix_steps, 1)
        for start, end in pairwise(starts[1:]):
            if mix_steps > end - start:
                raise ValueError(
                    f"mix_steps={mix_steps} is longer than the phase of steps {start} to "
                    f"{end - 1}: three laws would be mixed; choose at most {end - start}."
                )
