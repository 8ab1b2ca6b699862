"""What every timestep sampler is: a law over noise levels, drawn through its inverse cdf."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import GROUPS, Catalogue
from diffusers_curriculum.checks import inside, one_of
from diffusers_curriculum.noise_levels import NoiseLevels, to_device
from diffusers_curriculum.randomness import DRAWS, Slots, batch_uniforms
from diffusers_curriculum.samplers.composition import (
    CPU,
    Cells,
    SourceOrder,
    TimestepSample,
    check_continuous,
    compose,
    copy_on,
    correction_exponent,
    pick,
    share_of_cell,
    tables,
)
from diffusers_curriculum.samplers.description import Described, checked_arguments
from diffusers_curriculum.samplers.files import CONFIG, Stored
from diffusers_curriculum.samplers.tokens import token_uniforms

SAMPLERS: Catalogue[type[TimestepSampler]] = Catalogue("sampler", group=GROUPS[2])
"""All samplers by name."""
_NOTHING = (None, None)


class TimestepSampler(Described, Stored):
    """Base of all samplers; a subclass gives :meth:`law` and may learn in :meth:`observe`. With
    ``@SAMPLERS.register("name", ...)`` it stands in the catalogue.

    The drawn mass is ``(1 - floor) law + floor reference``: the floor bounds the importance
    weights by 1 / floor and keeps every level in play.

    Args:
        scheduler: a diffusers scheduler, or its config with its ``_class_name``.
        draw: "iid", "stratified", "antithetic", "systematic" or "sobol", over the global batch.
        floor: share of the reference law mixed in, in [0, 1].
        importance_correction: "none" (the objective follows the law), "full" (unbiased for the
            reference) or an exponent k between 0 and 1: importance = (reference / mass)^k, scaled
            so that its mean is 1.
        seed: of all draws.
        continuous: a level is drawn as ever, then a place in its cell; flow matching and EDM only.

    Raises:
        ValueError: an unknown name, a number out of range, or ``continuous`` on another schedule.
    """

    config_name = CONFIG
    learns_from_any_law: ClassVar[bool] = False  # even from losses of levels that others drew

    def __init__(
        self,
        levels: NoiseLevels,
        *,
        draw: str = "iid",
        floor: float = 0.0,
        importance_correction: str | float = "none",
        seed: int = 0,
        continuous: bool = False,
    ) -> None:
        check_continuous(continuous, levels)
        one_of("draw", draw, DRAWS)
        inside("floor", floor, 0, 1)
        self.levels = levels
        self.draw, self.floor, self.seed = draw, float(floor), int(seed)
        self.exponent = correction_exponent(importance_correction)
        self._calls = 0
        self._cache: dict[torch.device, tuple[Hashable, Any]] = {}
        uniform = torch.full((len(levels),), 1 / len(levels), dtype=torch.float64)
        self.continuous = continuous
        self._cells = {CPU: Cells.straight(levels)} if continuous else {}
        self._timesteps, self._uniform = {CPU: levels.to(CPU).timesteps}, {CPU: uniform}

    @classmethod
    def from_scheduler(cls, scheduler: Any, **config: Any) -> TimestepSampler:
        """The sampler for a diffusers scheduler; ``config`` goes to the constructor."""
        return cls(scheduler, **config)

    @classmethod
    def name(cls) -> str:
        return SAMPLERS.name_of(cls)

    @property
    def settings(self) -> dict[str, Any]:
        """What every sampler is told, for another that takes it over."""
        own = {name: getattr(self, name) for name in ("draw", "floor", "seed", "continuous")}
        return own | {"importance_correction": self.exponent}

    @property
    def opened(self) -> TimestepSampler:
        """What is drawn from once everything is open: itself but for a curriculum."""
        return self

    @property
    def inner(self) -> Sequence[TimestepSampler]:
        """The samplers that this one is made of: a curriculum's base, a sequence's phases."""
        return ()

    @property
    def laws(self) -> dict[str, TimestepSampler]:
        """What is drawn from: one law, without a name, or others beside it by whose they are."""
        return {"": self}

    def walk(self) -> Iterator[TimestepSampler]:
        """This sampler and all those inside it."""
        yield self
        for sampler in self.inner:
            yield from sampler.walk()

    # -- the law ---------------------------------------------------------------------------------

    @abstractmethod
    def law(self, step: int, device: torch.device) -> Tensor:
        """(T,) float64 probabilities before the floor, at optimizer step ``step``."""

    def first_laws(self) -> list[Tensor]:
        """(T,) float64 the law at the beginning, of each phase where there are several."""
        return [self.law(0, CPU)]

    def reference(self, step: int, device: torch.device) -> Tensor:
        """(T,) float64 the law that the floor mixes in and the importance corrects to: uniform."""
        return copy_on(device, self._uniform)

    def probabilities(self, step: int | None = None, device: torch.device = CPU) -> Tensor:
        """(T,) float64 on ``device``: the exact mass that optimizer step ``step`` draws from;
        ``step`` is by default the number of draws made so far."""
        # copied, because a mass may be the law itself, which the sampler keeps
        return self._mass_and_importance(self._step(step), device)[0].clone()

    def importance(self, step: int | None = None, device: torch.device = CPU) -> Tensor:
        """(T,) float64 on ``device``: the importance of each level at optimizer step ``step``."""
        return self._mass_and_importance(self._step(step), device)[1].clone()

    def at_stage(self, stage: int | None = None, step: int | None = None) -> tuple[Tensor, Tensor]:
        """(T,) mass and (T,) importance on the CPU at optimizer step ``step``, in stage ``stage``
        of a curriculum (None: with everything open); nothing of the state changes."""
        return self.probabilities(step), self.importance(step)

    def cells(self, step: int, device: torch.device) -> Cells:
        """The law inside the cells of the levels, for continuous draws at ``step``."""
        return copy_on(device, self._cells)

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
    ) -> TimestepSample:
        """Draw noise levels for a batch.

        Args:
            batch: number of samples on this rank, or the exact :class:`Slots` of the global batch
                they fill. A number assumes equal batches on all ranks of torch.distributed.
            u: (B,) numbers in [0, 1) to put through the inverse cdf instead, 0 = cleanest.
            step: optimizer step; by default this sampler's calls are counted. Draws are a pure
                function of (seed, step, slots).
            device: of the result, default the CPU.
            generator: take the randomness from it instead of from (seed, step).
            tokens: draw levels (B, tokens), one for each token or frame of a sample; what is drawn
                has that shape.
            arrangement: of the levels of a sample's tokens: "independent", "monotone" (no cleaner
                than the token before) or "leading" (one noisy token, the others cleaner).

        Raises:
            ValueError: neither or both of ``batch`` and ``u``, or an unknown arrangement.
        """
        at, own, target = self._step(step), u is None, torch.device(device) if device else CPU
        u = self._numbers(batch, u, at, generator, tokens, arrangement)
        if step is None:
            self._calls += 1
        cdf, importance = self._tables(at, target)
        points: Tensor = u if u.device == target else to_device(u, target)
        if not own or cdf.dtype != torch.float64:  # the own ones are float64 inside (0, 1)
            # the cdf is 1 from the last level with mass on: u must stay below it
            points = points.to(cdf.dtype).clamp(0, 1 - torch.finfo(cdf.dtype).eps / 2)
        indices = torch.searchsorted(cdf, points, right=True)
        drawn = pick(importance, indices)
        if self.continuous:
            log_snr = self.cells(at, target).log_snr(indices, share_of_cell(cdf, points, indices))
            return TimestepSample(self.levels.conditioning(log_snr), indices, drawn, log_snr)
        return TimestepSample(pick(copy_on(target, self._timesteps), indices), indices, drawn)

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        """Learn from one optimizer step: the unweighted losses of its global batch (all ranks, all
        micro-steps), once per step; nothing is learned here by default.

        Args:
            indices: (N,) as drawn.
            losses: (N,) float.
            step: the optimizer step they were drawn for.
        """

    def tell_open(self, opened: Tensor) -> None:
        """Take note, before :meth:`observe`, of the levels that the step was drawn from, (T,) 0 or
        1 on the device of the losses: what a curriculum leaves open. A law that learns does not
        wait for the others."""
        for sampler in self.inner:
            sampler.tell_open(opened)

    def take_order(self, order: SourceOrder) -> None:
        """Take note of the source of each sample of a run; one law for all has no use for it."""

    def _numbers(
        self,
        batch: int | Slots | None,
        u: Tensor | None,
        step: int,
        generator: torch.Generator | None,
        tokens: int | None,
        arrangement: str,
    ) -> Tensor:
        """(B,), or (B, tokens), what is put through the inverse cdf: ``u`` where it is given."""
        if (batch is None) == (u is None):
            raise ValueError(
                "sample() takes a batch size (or slots), or numbers u: give one of the two."
            )
        if batch is None:
            return torch.as_tensor(u)
        own = {"seed": self.seed, "step": step, "generator": generator}
        if tokens is None:
            return batch_uniforms(self.draw, batch, **own)
        return token_uniforms(self.draw, batch, tokens, arrangement, **own)

    def _step(self, step: int | None) -> int:
        return self._calls if step is None else step

    # -- state and config ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers: everything that the config does not say."""
        return {"calls": self._calls}

    def upgraded(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state of this version or an older one, in the form of :meth:`state_dict`."""
        return dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the next draws are those of the sampler it came from.

        Raises:
            ValueError: the state belongs to another kind of sampler (the message names the keys).
        """
        own = self.state_dict().keys()
        missing, extra = own - state.keys(), state.keys() - own
        if missing or extra:
            raise ValueError(
                f"the state does not belong to {type(self).__name__}: missing {sorted(missing)}, "
                f"unexpected {sorted(extra)}; build the sampler from the same config."
            )
        self._calls = int(state["calls"])

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> TimestepSampler:  # type: ignore[override]
        """The sampler with this config; ValueError for an unknown key, or as :meth:`kind_of`."""
        kind = cls.kind_of(config)
        return kind(**checked_arguments(kind, kind.upgraded_config(config), overrides))

    @classmethod
    def kind_of(cls, config: Mapping[str, Any]) -> type[TimestepSampler]:
        """The class that a config names; ValueError unless it is a sampler, of the kind ``cls``."""
        name, kinds = config.get("_class_name", cls.__name__), cls.kinds()
        if name not in kinds:
            SAMPLERS.import_installed()
            kinds = cls.kinds()
        if name not in kinds:
            raise ValueError(
                f"_class_name={name!r} is no {cls.__name__}: expected {', '.join(kinds)}."
            )
        return kinds[name]

    def _mass_and_importance(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        law, reference = self.law(step, device), self.reference(step, device)
        return compose(law, reference, self.floor, self.exponent)

    def _tables(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cdf, importance) on ``device``; kept until the law is another one."""
        version, (known, kept) = self.version(step), self._cache.get(device, _NOTHING)
        if version is None or version != known:
            made_on = CPU if self.static_law else device
            kept = to_device(tables(*self._mass_and_importance(step, made_on)), device)
            self._cache[device] = version, kept
        return kept
