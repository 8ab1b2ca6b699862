"""What a network is trained to predict, on which schedule, and how it is sampled from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum import NoiseLevels, Objective, TimestepSampler, loss_weights
from diffusers_curriculum.samplers.description import build_scheduler


class Target:
    """The schedulers of a target's config file, and the objective of the one for training."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.scheduler = build_scheduler(config["scheduler"])
        self.inference = build_scheduler(config["inference"])
        self.levels = NoiseLevels.from_scheduler(self.scheduler)
        self.objective = Objective(self.levels)

    def sampler(self, config: Mapping[str, Any], seed: int, steps: int) -> TimestepSampler:
        """The sampler of a method's config, with its own seed, for a run of ``steps``."""
        told = seeded(for_run(config, steps), seed)
        kind = TimestepSampler.kind_of({"_class_name": "DensityTimestepSampler"} | told)
        arguments = {name: value for name, value in told.items() if name != "_class_name"}
        return kind.from_scheduler(self.scheduler, **arguments)

    def weights(self, method: Mapping[str, Any], steps: int) -> Tensor | None:
        """(T,) loss weights: of a weighting, or those that a law amounts to in expectation."""
        if "weight_of_law" in method:
            law = self.sampler(method["weight_of_law"], 0, steps)
            return (law.probabilities(0) * len(self.levels)).float()
        weighting = dict(method.get("loss_weighting", {"name": "none"}))
        return loss_weights(weighting.pop("name"), self.levels, **weighting)

    def start_sampling(self, steps: int) -> tuple[Any, Tensor]:
        """The inference scheduler with ``steps`` set, and the log-SNR (steps,) at each."""
        scheduler = self.inference
        scheduler.set_timesteps(steps)
        if self.levels.family == "vp":
            return scheduler, self.levels.log_snr[scheduler.timesteps]
        sigma = scheduler.sigmas[:-1].double()
        alpha = 1 - sigma if self.levels.family == "flow" else torch.ones_like(sigma)
        return scheduler, 2 * (alpha.log() - sigma.log())

    def grid(self, lowest: float, highest: float, count: int) -> Tensor:
        """Indices of the levels nearest to ``count`` evenly spaced log-SNRs."""
        wanted = torch.linspace(lowest, highest, count, dtype=torch.float64)
        distance = (self.levels.log_snr[None] - wanted[:, None]).abs()
        return distance.argmin(1).unique()


def for_run(config: Any, steps: int) -> Any:
    """A config in which "30%" stands for that share of the run's steps."""
    if isinstance(config, Mapping):
        return {name: for_run(value, steps) for name, value in config.items()}
    if isinstance(config, list):
        return [for_run(value, steps) for value in config]
    if isinstance(config, str) and config.endswith("%"):
        return max(1, round(steps * float(config[:-1]) / 100))
    return config


def seeded(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A sampler's config, with a seed at the place where it has one."""
    if "phases" in config:
        phases = [dict(p) | {"sampler": seeded(p["sampler"], seed)} for p in config["phases"]]
        return dict(config) | {"phases": phases}
    if "base" in config:
        return dict(config) | {"base": seeded(config["base"], seed)}
    return dict(config) | {"seed": seed}
