"""What the samplers that learn their law from losses have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Entry
from diffusers_curriculum.noise_levels import NoiseLevels, to_device
from diffusers_curriculum.samplers.adaptive_checks import check_adaptive
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSampler
from diffusers_curriculum.samplers.composition import CPU, tables
from diffusers_curriculum.samplers.configs import build_scheduler, plain_config
from diffusers_curriculum.samplers.density import DensityTimestepSampler
from diffusers_curriculum.samplers.statistics import BinnedMeans, State, Statistics
from diffusers_curriculum.weighting import loss_weights


class AdaptiveTimestepSampler(TimestepSampler):
    """Base of the samplers whose law follows the losses they observe.

    Unweighted losses are averaged in bins of log-SNR; every ``refresh_every`` optimizer steps the
    law is computed anew from the averages, on their device. Until ``warm_up`` steps are over and
    every bin has ``min_observations``, levels are drawn from the warm-up density. A subclass says
    what is averaged (:meth:`_observed`) and what the law is of it (:meth:`_rule`), and registers
    its arguments before it calls this constructor.

    Args:
        scheduler: a diffusers scheduler, or its config with its ``_class_name``.
        bins: of log-SNR; default 64, fewer where they would hold less than 4 levels each.
        binning: "quantile" (equal numbers of levels) or "log_snr_width" (equal widths).
        refresh_every: optimizer steps between two laws.
        warm_up: optimizer steps before the first learned law.
        min_observations: of every bin, before the first learned law.
        ema: what remains of old observations at each refresh, in [0, 1).
        neighbours: bins on each side over which the averages are smoothed.
        warm_up_density, warm_up_density_args: law of the warm-up, as in
            :class:`DensityTimestepSampler`.
        prediction_type: what the network predicts; default the scheduler's own.
        loss_weighting, loss_weighting_args: W, the weighting that the loss is trained with, as in
            :func:`weighting.loss_weights`; it enters the law, not the loss.
        draw, floor, importance_correction, seed, continuous: see :class:`TimestepSampler`; there
            must be a floor, or a level whose loss was once 0 would never be drawn again.
        outer_edges: see :meth:`NoiseLevels.from_scheduler`.

    Raises:
        ValueError: unknown names or numbers out of range.
    """

    entry: ClassVar[Entry]
    static_law = False
    # Means per noise level are the same whatever law drew the levels.
    learns_from_any_law: ClassVar[bool] = True

    def __init__(self) -> None:
        scheduler = build_scheduler(self.config["scheduler"])
        levels = NoiseLevels.from_scheduler(scheduler, self.config["outer_edges"])
        if self.config["prediction_type"] is not None:
            levels = levels.with_prediction_type(self.config["prediction_type"])
        self._resolve_defaults(len(levels))
        config = self.config
        super().__init__(
            levels,
            draw=config["draw"],
            floor=config["floor"],
            importance_correction=config["importance_correction"],
            seed=config["seed"],
            continuous=config["continuous"],
        )
        check_adaptive(config, len(levels), levels.prediction_type)
        warm_up = DensityTimestepSampler(
            scheduler,
            density=config["warm_up_density"],
            density_args=config["warm_up_density_args"],
            floor=self.floor,
            outer_edges=config["outer_edges"],
        )
        self.register_to_config(
            scheduler=plain_config(scheduler),
            warm_up_density_args=dict(warm_up.config["density_args"]),
            loss_weighting_args=dict(config["loss_weighting_args"] or {}),
        )
        constants = {"warm_up": warm_up.law(0, CPU), **self._rule_tables()}
        self._statistics = self._build_statistics()
        self._copies = {CPU: (self._statistics, constants)}
        profile = torch.zeros(len(levels), dtype=torch.float64)
        self._state = self._statistics.initial_state()
        self._state |= {"profile": profile, "learned": torch.tensor(False)}
        self._refresh_every, self._warm_up = config["refresh_every"], config["warm_up"]
        self._window = 0
        self._laws: dict[torch.device, Tensor] = {}
        self._drawn: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _resolve_defaults(self, levels: int) -> None:
        """Put numbers in place of the arguments that are None by default."""
        if self.config["bins"] is None:
            self.register_to_config(bins=max(1, min(64, levels // 4)))

    # -- what a subclass says --------------------------------------------------------------------

    def _observed(self, losses: Tensor) -> Tensor:
        """(N,) what is averaged of the losses (N,)."""
        return losses

    def _rule(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        """(T,) the law, not normalised, of the averages at each level; constants are those of
        :meth:`_rule_tables` on the same device."""
        raise NotImplementedError

    def _rule_tables(self) -> dict[str, Tensor]:
        """(T,) float64 tables that :meth:`_rule` needs."""
        weights = loss_weights(
            self.config["loss_weighting"],
            self.levels,
            **(self.config["loss_weighting_args"] or {}),
        )
        ones = torch.ones(len(self.levels), dtype=torch.float64)
        return {"weights": ones if weights is None else weights.double()}

    def _build_statistics(self) -> Statistics:
        c = self.config
        return BinnedMeans.of(self.levels, c["bins"], c["binning"], c["neighbours"], c["ema"])

    # -- the law ---------------------------------------------------------------------------------

    def law(self, step: int, device: torch.device) -> Tensor:
        if device not in self._laws:
            self._laws[device] = to_device(self._present_law(), device)
        return self._laws[device]

    def _present_law(self) -> Tensor:
        state = self._state
        _, constants = self._on(state["profile"].device)
        law = self._rule(state["profile"], constants).clamp_min(0)
        total = law.sum()
        usable = state["learned"] & (total > 0) & total.isfinite()
        return torch.where(usable, law / total, constants["warm_up"])

    def _tables(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._drawn:
            self._drawn[device] = tables(*self._mass_and_importance(step, device))
        return self._drawn[device]

    # -- learning --------------------------------------------------------------------------------

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        """Add the unweighted losses of one optimizer step; a non-finite loss is no observation.

        Args:
            indices: (N,) levels of the global batch.
            losses: (N,) unweighted losses.
            step: the optimizer step they were drawn for.

        Raises:
            ValueError: not one loss per index.
        """
        self._add(indices, losses)
        self._end_step(step)

    def metrics(self) -> dict[str, Tensor]:
        """Whether the law is a learned one, and the observations of the bin with the fewest."""
        statistics, _ = self._on(self._state["profile"].device)
        return {
            "law_is_learned": self._state["learned"],
            "least_observations": statistics.seen(self._state).min(),
        }

    def _add(self, indices: Tensor, losses: Tensor) -> None:
        if indices.shape != losses.shape or indices.ndim != 1:
            raise ValueError(
                f"observe() takes one loss per index: got indices {tuple(indices.shape)} and "
                f"losses {tuple(losses.shape)}, expected (N,) both."
            )
        state = self._move_state(losses.device)
        values = self._observed(losses.detach().to(state["profile"].dtype))
        statistics, _ = self._on(losses.device)
        statistics.add(state, indices, values.nan_to_num(0.0, 0.0, 0.0), values.isfinite())

    def _end_step(self, step: int) -> None:
        # windows are counted, so that a step that was not observed does not cost a refresh
        window = (step + 1) // self._refresh_every
        if window == self._window:
            return
        self._window = window
        state = self._state
        statistics, _ = self._on(state["profile"].device)
        statistics.fold(state)
        state["profile"] = statistics.profile(state)
        if step + 1 >= self._warm_up:
            enough = (statistics.seen(state) >= self.config["min_observations"]).all()
            state["learned"] = state["learned"] | enough
        self._laws.clear()
        self._drawn.clear()

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        # copies: the tensors are added to in place
        state = {f"state.{k}": v.cpu().clone() for k, v in self._state.items()}
        starts = torch.tensor(self._statistics.starts)
        return super().state_dict() | state | {"starts": starts, "window": self._window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        starts = torch.as_tensor(state.get("starts", [])).tolist()
        if starts and starts != list(self._statistics.starts):
            raise ValueError(
                f"the state has {len(starts)} bins starting at {starts[:4]}..., this sampler "
                f"{len(self._statistics.starts)} at {list(self._statistics.starts[:4])}...: build "
                "it from the same config and scheduler."
            )
        for name, mine in self._state.items():
            given = torch.as_tensor(state.get(f"state.{name}", mine))
            if given.shape != mine.shape:
                raise ValueError(
                    f"the state's {name} has shape {tuple(given.shape)}, this sampler's "
                    f"{tuple(mine.shape)}: build it from the same config and scheduler."
                )
        super().load_state_dict(state)
        self._state = {
            name: torch.as_tensor(state[f"state.{name}"]).to(mine.device, mine.dtype, copy=True)
            for name, mine in self._state.items()
        }
        self._window = int(state["window"])
        self._laws.clear()
        self._drawn.clear()

    def _move_state(self, device: torch.device) -> State:
        if self._state["profile"].device != device:
            self._state = {k: to_device(v, device) for k, v in self._state.items()}
        return self._state

    def _on(self, device: torch.device) -> tuple[Statistics, dict[str, Tensor]]:
        """Statistics and constants on ``device``; copies are made once."""
        if device not in self._copies:
            statistics, constants = self._copies[CPU]
            moved = {name: to_device(table, device) for name, table in constants.items()}
            self._copies[device] = statistics.to(device), moved
        return self._copies[device]


del SAMPLERS[AdaptiveTimestepSampler.__name__]  # abstract: no config may name it
