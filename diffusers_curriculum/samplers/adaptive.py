"""What the samplers that learn their law from losses have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, fields
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor

from diffusers_curriculum.checks import (
    check_fields,
    checked,
    inside,
    one_of,
    take_over_fields,
    whole,
)
from diffusers_curriculum.noise_levels import NoiseLevels, to_device
from diffusers_curriculum.samplers.base import TimestepSampler
from diffusers_curriculum.samplers.composition import CPU, are_finite, copy_on, pick
from diffusers_curriculum.samplers.density import DensityTimestepSampler, upgraded_law
from diffusers_curriculum.samplers.description import build_scheduler, plain_config
from diffusers_curriculum.samplers.states import check_fits, upgraded_averages
from diffusers_curriculum.samplers.statistics import BINNINGS, BinnedMeans, Statistics
from diffusers_curriculum.weighting import TARGETS, loss_weights

_OF_EVERY_SAMPLER = ("draw", "floor", "importance_correction", "seed", "continuous")


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(checked,))
@dataclass(eq=False, repr=False)
class AdaptiveTimestepSampler(TimestepSampler):
    """Base of the samplers whose law follows the losses they observe.

    Unweighted losses are averaged in bins of log-SNR; every ``refresh_every`` optimizer steps the
    law is computed anew from the averages, on their device. Until ``warm_up`` steps are over and
    every bin has ``min_observations``, levels are drawn from the warm-up density. Under a
    curriculum every open bin must have them: the law is then learned there, with the warm-up
    density's mass of those bins, and the closed ones keep the warm-up density.

    A subclass says what is averaged (:meth:`_observed`) and what the law is of it (:meth:`_rule`).
    It is a dataclass whose fields are the arguments: its own, see :func:`checks.checked`, and other
    defaults for those below. Any module that is imported may hold one::

        @SAMPLERS.register("loss_power", formula="p(l) ~ E[loss]^power")
        class LossPowerTimestepSampler(AdaptiveTimestepSampler):
            power: float = checked(above_zero, default=0.5)
            warm_up = 500

            def _rule(self, profile, constants):
                return profile**self.power

    Args:
        scheduler: a diffusers scheduler, or its config with its ``_class_name``.
        bins: of log-SNR; default 64, fewer where they would hold less than 4 levels each.
        binning: "quantile" (equal numbers of levels) or "log_snr_width" (equal widths).
        refresh_every: optimizer steps between two laws.
        warm_up: optimizer steps before the first learned law.
        min_observations: of every bin, before the first learned law.
        ema: what remains of old observations at each refresh, in [0, 1).
        neighbours: bins on each side over which the averages are smoothed.
        warm_up_density, warm_up_density_args: law of the warm-up, as of a density sampler.
        prediction_type: what the network predicts; default the scheduler's own.
        loss_weighting, loss_weighting_args: W, the weighting that the loss is trained with, as in
            :func:`weighting.loss_weights`; it enters the law, not the loss.
        draw, floor, importance_correction, seed, continuous: as of every sampler; floor above 0.
        outer_edges: see :meth:`NoiseLevels.from_scheduler`.

    Raises:
        ValueError: unknown names or numbers out of range.
    """

    scheduler: InitVar[Any]
    _: KW_ONLY
    bins: int = checked(whole, 1, default=None)  # known once it is built
    binning: str = checked(one_of, BINNINGS, default="quantile")
    refresh_every: int = checked(whole, 1, default=100)
    warm_up: int = checked(whole, default=1000)
    min_observations: int = checked(whole, 1, default=10)
    ema: float = checked(inside, 0, 1, "[)", default=0.9)
    neighbours: int = checked(whole, 0, 2**53, default=1)
    warm_up_density: str = "uniform"
    warm_up_density_args: dict[str, Any] | None = None
    prediction_type: str | None = None
    loss_weighting: str = "none"
    loss_weighting_args: dict[str, Any] | None = None
    draw: str = "stratified"
    floor: float = checked(inside, 0, 1, default=0.1)
    importance_correction: str | float = "full"
    outer_edges: str = "half"
    seed: int = 0
    continuous: bool = False

    static_law, learns = False, True
    learns_from_any_law = True  # means per noise level are the same whatever law drew the levels
    most_bins: ClassVar[int] = 64  # by default

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        take_over_fields(cls)
        dataclass(eq=False, repr=False, kw_only=True)(cls)

    def __post_init__(self, scheduler: Any) -> None:
        check_fields(self)
        scheduler = build_scheduler(scheduler)
        levels = NoiseLevels.from_scheduler(scheduler, self.outer_edges)
        if self.prediction_type is not None:
            levels = levels.with_prediction_type(self.prediction_type)
        self._resolve_defaults(len(levels))
        self._check(levels)
        settings = self._settings()
        super().__init__(levels, **{name: settings[name] for name in _OF_EVERY_SAMPLER})
        warm_up = DensityTimestepSampler(
            scheduler,
            density=self.warm_up_density,
            density_args=self.warm_up_density_args,
            floor=self.floor,
            outer_edges=self.outer_edges,
        )
        settings["warm_up_density_args"] = dict(warm_up.config["density_args"])
        settings["loss_weighting_args"] = dict(self.loss_weighting_args or {})
        self.register_to_config(scheduler=plain_config(scheduler), **settings)
        own = {"warm_up": warm_up.law(0, CPU), "scale": self._scale()} | self._rule_tables()
        self._statistics = self._build_statistics()
        self._copies = {CPU: (self._statistics, own)}
        self._state = self._statistics.initial_state() | {
            "profile": torch.zeros(len(levels), dtype=torch.float64),
            "learned": torch.zeros(len(self._statistics.starts), dtype=torch.bool),
        }
        self._window = 0
        self._opened: Tensor | None = None  # told before each observation, where it is not all
        self._forget_laws()

    @classmethod
    def from_losses(cls, scheduler: Any, **config: Any) -> AdaptiveTimestepSampler:
        """The sampler for a loop that passes losses to :meth:`observe` and nothing else."""
        return cls(scheduler, **config)

    @classmethod
    def upgraded_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return upgraded_law(config, "warm_up_density", "warm_up_density_args")

    def _resolve_defaults(self, levels: int) -> None:
        """Put numbers in place of the arguments that are None by default."""
        if self.bins is None:
            self.bins = max(1, min(self.most_bins, levels // 4))

    def _check(self, levels: NoiseLevels) -> None:
        whole("bins", self.bins, 1, len(levels))
        if self.floor == 0:
            raise ValueError(
                f"floor={self.floor!r} must be greater than 0 for a law that learns: a level whose "
                "loss was once 0 would never be drawn again; 0.1 is the usual choice."
            )
        one_of("prediction_type", levels.prediction_type, TARGETS)

    def _settings(self) -> dict[str, Any]:
        """The arguments but for the scheduler, by their names: a subclass's own ones first."""
        shared = [f.name for f in fields(AdaptiveTimestepSampler)]
        own = [f.name for f in fields(self) if f.name not in shared]
        return {name: getattr(self, name) for name in own + shared}

    # -- what a subclass says --------------------------------------------------------------------

    def _observed(self, losses: Tensor) -> Tensor:
        """(N,) what is averaged of the losses (N,)."""
        return losses

    @abstractmethod
    def _rule(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        """(T,) the law, not normalised, of the averages at each level; constants are those of
        :meth:`_rule_tables` on the same device."""

    def _scale(self) -> Tensor:
        """(T,) float64 what a loss at each level is multiplied by before it is observed: an average
        over a bin says little of its levels where what is averaged differs much among them."""
        return torch.ones(len(self.levels), dtype=torch.float64)

    def _rule_tables(self) -> dict[str, Tensor]:
        """(T,) float64 tables that :meth:`_rule` needs."""
        return {"weights": self._weights()}

    def _weights(self) -> Tensor:
        """(T,) float64 W."""
        weights = loss_weights(self.loss_weighting, self.levels, **(self.loss_weighting_args or {}))
        return torch.ones(len(self.levels)).double() if weights is None else weights.double()

    def _build_statistics(self) -> Statistics:
        return BinnedMeans.of(self.levels, self.bins, self.binning, self.neighbours, self.ema)

    # -- the law ---------------------------------------------------------------------------------

    def law(self, step: int, device: torch.device) -> Tensor:
        if device not in self._laws:
            self._laws[device] = to_device(self._present_law(), device)
        return self._laws[device]

    def _present_law(self) -> Tensor:
        """(T,) the rule where it is learned, and the warm-up density elsewhere."""
        statistics, constants = self._present()
        known, warm_up = statistics.at_levels(self._state["learned"]), constants["warm_up"]
        law = torch.where(known, self._rule(self._state["profile"], constants).clamp_min(0), 0.0)
        total = law.sum()
        share = torch.where(known.all(), 1.0, (warm_up * known).sum())
        usable = known & (total > 0) & total.isfinite()
        return torch.where(usable, law / total * share, warm_up)

    def version(self, step: int) -> Hashable:
        return self._version

    # -- learning --------------------------------------------------------------------------------

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        """Add the unweighted losses of one optimizer step, as :meth:`TimestepSampler.observe`; a
        non-finite loss is no observation, and not one loss per index a ValueError."""
        self._add(indices, losses)
        self._end_step(step)

    def moments(self, steps: int) -> list[int]:
        return [0]  # what is still to be learned is not known

    def metrics(self) -> dict[str, Tensor]:
        """Share of the bins whose law is learned, and observations of the bin with the fewest."""
        statistics, _ = self._present()
        learned, seen = self._state["learned"], statistics.seen(self._state)
        return {"law_is_learned": learned.float().mean(), "least_observations": seen.min()}

    def tell_open(self, opened: Tensor) -> None:
        self._opened = opened

    def _add(self, indices: Tensor, losses: Tensor) -> None:
        if indices.shape != losses.shape or indices.ndim != 1:
            raise ValueError(
                f"observe() takes one loss per index: got indices {tuple(indices.shape)} and "
                f"losses {tuple(losses.shape)}, expected (N,) both."
            )
        if self._state["profile"].device != losses.device:
            self._state = to_device(self._state, losses.device)
        state, (statistics, constants) = self._state, self._present()
        scaled = losses.detach().to(state["profile"].dtype) * pick(constants["scale"], indices)
        values = self._observed(scaled)
        statistics.add(state, indices, values.nan_to_num(0.0, 0.0, 0.0), are_finite(values))

    def _end_step(self, step: int) -> None:
        # windows are counted, so that a step that was not observed does not cost a refresh
        window = (step + 1) // self.refresh_every
        if window == self._window:
            return
        self._window = window
        state, (statistics, _) = self._state, self._present()
        statistics.fold(state)
        state["profile"] = statistics.profile(state)
        if step + 1 >= self.warm_up:
            state["learned"] = state["learned"] | self._learnable(statistics)
        self._forget_laws()

    def _learnable(self, statistics: Statistics) -> Tensor:
        """(K,) bool: the open bins, once all of them have their observations."""
        enough = statistics.seen(self._state) >= self.min_observations
        if self._opened is None:
            return enough.all().expand(len(enough))
        opened = statistics.touched(to_device(self._opened, enough.device))
        return opened & (enough | ~opened).all()

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        # copies: the tensors are added to in place
        state = {f"state.{k}": v.cpu().clone() for k, v in self._state.items()}
        starts = torch.tensor(self._statistics.starts)
        return super().state_dict() | state | {"starts": starts, "window": self._window}

    def upgraded(self, state: Mapping[str, Any]) -> dict[str, Any]:
        scale = self._copies[CPU][1]["scale"]
        factor = self._observed(scale) if bool((scale != 1).any()) else scale
        return upgraded_averages(state, self._statistics, factor)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        state = self.upgraded(state)
        check_fits(state, self._statistics, self._state)
        super().load_state_dict(state)
        self._state = {
            name: torch.as_tensor(state[f"state.{name}"]).to(mine.device, mine.dtype, copy=True)
            for name, mine in self._state.items()
        }
        self._window = int(state["window"])
        self._forget_laws()

    def _forget_laws(self) -> None:
        self._laws: dict[torch.device, Tensor] = {}
        self._version = object()

    def _present(self) -> tuple[Statistics, dict[str, Tensor]]:
        """Statistics and constants where the state is; copies are made once."""
        return copy_on(self._state["profile"].device, self._copies)
