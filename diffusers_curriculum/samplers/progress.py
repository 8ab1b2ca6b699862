"""How far a curriculum has come: what its pacing learned, and what was observed in each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.noise_levels import to_device
from diffusers_curriculum.pacing import Pacing


class Progress:
    """The state of a curriculum, kept where the losses are.

    Attributes:
        pacing: the rule of the stages.
        stages: their number.
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

    def observe(self, clusters: Tensor, losses: Tensor, step: int) -> None:
        """Take in one optimizer step.

        Args:
            clusters: (N,) int64, cluster of each sample, on the device of the losses.
            losses: (N,) unweighted losses.
            step: the optimizer step they were drawn for.
        """
        self._move(losses.device)
        if self.pace:  # a schedule learns nothing
            self.pace = self.pacing.observe(self.pace, _mean(losses), self.stages)
        ones = torch.ones_like(clusters)
        self.cluster_counts = self.cluster_counts.index_add(0, clusters, ones)
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
