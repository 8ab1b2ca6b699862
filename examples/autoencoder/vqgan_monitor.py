"""What a run tells while it trains: losses, codebook usage, learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vqgan_losses import Guards

from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.loop.monitor import Monitor
from diffusers_curriculum.training.loop.tracking import RunningMean


class ReconstructionMonitor(Monitor):
    """Means since the last report, on the device.

    Args:
        run: whose losses are told, and whose codebook's usage, which starts a new window then.
    """

    def __init__(self, run: Any, max_train_steps: int, log_every: int, plan: BatchPlan) -> None:
        more = [run.adversary.guard] if run.adversary else []
        guards = Guards(run.guard, *more)
        super().__init__(run.accelerator, guards, max_train_steps, log_every, plan)
        self.run = run
        device = run.accelerator.device
        self.means = {name: RunningMean(device) for name in run.names}
        self.revived = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def stateful(self) -> dict[str, Any]:
        return {"monitor": self}

    def add(self, step: int, outcome: Any, norm: Tensor | None) -> None:
        for mean, value in zip(self.means.values(), outcome.parts.mean(0), strict=True):
            mean.add(value)  # one that is NaN does not count
        self.revived += self.run.revived

    def read(self, step: int) -> tuple[dict[str, float], dict[str, str]]:
        usage = self.run.averages.network.quantise.read_usage()
        means = {name: mean.read() for name, mean in self.means.items()}
        metrics = {f"train/{name}": mean for name, mean in means.items() if mean == mean}
        metrics |= {
            "codebook/used": usage.used,
            "codebook/perplexity": usage.perplexity,
            "codebook/revived": int(self.revived),
        }
        self.revived.zero_()
        return metrics, {"l2": f"{means['l2']:.4f}", "codes": f"{usage.used:.0%}"}

    def state_dict(self) -> dict[str, Any]:
        """The open windows."""
        means = {name: mean.state_dict() for name, mean in self.means.items()}
        return {"means": means, "revived": self.revived.clone()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Continue from a saved state; losses that are new start afresh."""
        for name, saved in state["means"].items():
            if name in self.means:
                self.means[name].load_state_dict(saved)
        self.revived.copy_(state["revived"])
