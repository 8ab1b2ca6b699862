"""Two times for each sample, for networks that learn the average velocity between them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.average_velocity import Interval
from diffusers_curriculum.checks import inside, whole
from diffusers_curriculum.noise_levels import to_device
from diffusers_curriculum.randomness import Slots, batch_uniforms
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSampler
from diffusers_curriculum.samplers.composition import CPU, TimestepSample
from diffusers_curriculum.samplers.description import (
    Report,
    checked_config,
    describe_config,
    plain_config,
)
from diffusers_curriculum.samplers.states import part_of, upgraded_part

VELOCITY = 1 / 3  # of the opening: the instantaneous velocity alone


@SAMPLERS.register(
    "interval",
    formula="t = F^-1(sqrt(u)), r = F^-1(sqrt(u) w), r = t but for a share: two draws, in order",
    source="arXiv 2505.13447; opening after arXiv 2511.19065",
    families="flow",
    note="takes any sampler that does not learn as its base; --formulation mean_flow",
)
class IntervalTimestepSampler(TimestepSampler):
    """Draws pairs of times r <= t of flow matching: two independent draws of a base law, in order,
    of which all but a share are brought together (r = t); arXiv 2505.13447, section 4.3.

    A pair is opened as arXiv 2511.19065 finds that it is learned, the velocity first, then short
    intervals, then long ones: over ``opening_steps`` optimizer steps all times stand alone for a
    third, and after that an interval has its length times a factor that grows to 1.

    Indices, log-SNRs and :meth:`probabilities` are those of t, the noisier time: its cdf is F^2.

    Args:
        base: the law F of both times, or its config; its draw and seed hold for the pairs.
        share: of samples whose two times differ, in [0, 1].
        opening_steps: optimizer steps until intervals have their whole length; 0: from the first.

    Raises:
        ValueError: a base that is no law of flow matching, learns from losses, or corrects by
            importance; numbers out of range.
    """

    def __init__(
        self, base: TimestepSampler | Mapping[str, Any], share: float = 0.25, opening_steps: int = 0
    ) -> None:
        if not isinstance(base, TimestepSampler):
            base = TimestepSampler.from_config(checked_config("base", base))
        inside("share", share, 0, 1)
        whole("opening_steps", opening_steps, 0)
        clock = base.levels.clock
        if base.levels.family != "flow" or clock is None:
            raise ValueError(
                "intervals are those of flow matching, and the noise levels are of family "
                f"{base.levels.family!r}: take a FlowMatchEulerDiscreteScheduler."
            )
        if base.learns or base.exponent > 0:
            what = "follows the losses" if base.learns else "corrects by importance"
            raise ValueError(
                f"{base.describe()!r} {what} of single times, and pairs are drawn: take a law "
                "that does not."
            )
        self.base, self.share, self.opening_steps = base, float(share), int(opening_steps)
        settings: dict[str, Any] = base.settings | {"floor": 0.0}
        super().__init__(base.levels, **settings)
        self.static_law, self.stages, self.pacing = base.static_law, base.stages, base.pacing
        self._scale = clock.scale
        self.register_to_config(
            base=plain_config(base), share=self.share, opening_steps=self.opening_steps
        )

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, base: Mapping[str, Any] | None = None, **config: Any
    ) -> IntervalTimestepSampler:
        """Pairs of a :class:`DensityTimestepSampler` of ``scheduler`` with the settings ``base``
        (default: logit-normal with mean -0.4 and deviation 1, the paper's)."""
        own = {"density": "logit_normal", "density_args": {"mean": -0.4, "std": 1.0}, "floor": 0.0}
        settings = {"_class_name": "DensityTimestepSampler", "continuous": True} | own
        settings |= dict(base or {})
        return cls(TimestepSampler.from_config(settings, scheduler=scheduler), **config)

    # -- the law ---------------------------------------------------------------------------------

    def law(self, step: int, device: torch.device) -> Tensor:
        return _of_the_larger(self.base._mass_and_importance(step, device)[0])

    def at_stage(self, stage: int | None = None, step: int | None = None) -> tuple[Tensor, Tensor]:
        mass, importance = self.base.at_stage(stage, step)
        return _of_the_larger(mass), importance

    def version(self, step: int) -> Hashable:
        return self.base.version(step)

    def opening(self, step: int) -> tuple[float, float]:
        """The share of samples with two times at optimizer step ``step``, and the factor of the
        lengths of their intervals."""
        if step >= self.opening_steps:
            return self.share, 1.0
        progress = (step + 1) / self.opening_steps
        if progress <= VELOCITY:
            return 0.0, 0.0
        return self.share, (progress - VELOCITY) / (1 - VELOCITY)

    @property
    def opened(self) -> TimestepSampler:
        inner = self.base.opened
        return self if inner is self.base else IntervalTimestepSampler(inner, self.share)

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
        """Draw pairs of times; arguments as of :meth:`TimestepSampler.sample`, ``u`` those of t,
        which then stands alone. A ValueError refuses ``tokens``: a sample has one pair."""
        if tokens is not None:
            raise ValueError(f"tokens={tokens}: a pair of times is drawn for a whole sample.")
        at, where = self._step(step), torch.device(device) if device else CPU
        if step is None:
            self._calls += 1
        if u is not None or batch is None:
            later = None if u is None else u.double().sqrt()
            return self._pairs(self.base.sample(batch, u=later, step=at, device=where))
        numbers = partial(
            batch_uniforms, self.draw, batch, seed=self.seed, step=at, generator=generator
        )
        later, apart = numbers().sqrt(), numbers(purpose="interval share")
        earlier = later * numbers(purpose="interval")
        share, factor = self.opening(at)
        # found on the host, so that no device is waited for to know how many they are
        longer = (apart < share).nonzero().flatten()
        drawn = self.base.sample(u=later, step=at, device=where)
        first = self.base.sample(u=earlier[longer], step=at, device=where).timesteps
        return self._pairs(drawn, to_device(longer, where), first, factor)

    def _pairs(
        self,
        later: TimestepSample,
        longer: Tensor | None = None,
        earlier: Tensor | None = None,
        factor: float = 1.0,
    ) -> TimestepSample:
        """A draw of t, and that of r, as timesteps, of the samples at the positions ``longer``, its
        distance from t times a factor; None: single times."""
        told = later.timesteps.float()
        lengths = torch.zeros_like(told)
        if longer is None or earlier is None:
            longer = torch.zeros(0, dtype=torch.int64, device=told.device)
        else:
            lengths[longer] = factor * (told[longer] - earlier.float())
        return later._replace(
            timesteps=torch.stack([told, lengths]),
            interval=Interval(lengths / self._scale, longer, self._scale),
        )

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        self.base.observe(indices, losses, step)

    # -- what it tells of itself -----------------------------------------------------------------

    @classmethod
    def in_words(cls, config: Mapping[str, Any]) -> str:
        """The base in words, then its pairs."""
        opening = config.get("opening_steps", 0)
        told = f"two times for a share of {config.get('share', 0.25)}"
        told += f", opened over {opening} steps" if opening else ""
        return f"{describe_config(config.get('base'))}; {told}"

    def rows(self) -> dict[str, str]:
        return self.base.rows() | {"Two times": self.describe().rpartition("; ")[2]}

    def report(self, step: int) -> Report:
        told = self.base.report(step)
        share, factor = self.opening(step)
        own = {"interval/share": share, "interval/factor": factor}
        return told._replace(metrics=told.metrics | own)

    @property
    def inner(self) -> Sequence[TimestepSampler]:
        return (self.base,)

    def metrics(self) -> dict[str, Tensor]:
        return self.base.metrics()

    def stage(self, step: int | None = None) -> int:
        return self.base.stage(step)

    def stage_starts(self, steps: int) -> tuple[list[float], str]:
        return self.base.stage_starts(steps)

    def moments(self, steps: int) -> list[int]:
        return self.base.moments(steps)

    def groups(self) -> tuple[str, Sequence[int]]:
        return self.base.groups()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {f"base.{k}": v for k, v in self.base.state_dict().items()}

    def upgraded(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return dict(state) | upgraded_part(self.base, state, "base.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.base.load_state_dict(part_of(state, "base."))


def _of_the_larger(mass: Tensor) -> Tensor:
    """(T,) the law of the larger of two draws: its cdf is the square."""
    cdf = mass.cumsum(-1)
    squared = (cdf / cdf.narrow(-1, -1, 1)).square()
    return squared.diff(prepend=squared.new_zeros(1))
