"""What a run tells while it trains: losses, codebook usage, learning rate."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from vqgan_losses import Guards

from diffusers_curriculum.models.vector_quantiser import VectorQuantiser
from diffusers_curriculum.training.loop.tracking import RunningMean


class Monitor:
    """Means since the last report, on the device; a report reads them, every --log_every steps.

    Args:
        quantiser: whose usage is told, and which starts a new window then.
        names: of the distances between image and reconstruction.
        critic: whether there is one, with its two losses.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Any,
        quantiser: VectorQuantiser,
        names: tuple[str, ...],
        critic: bool,
        guards: Guards,
    ) -> None:
        self.args, self.accelerator, self.quantiser = args, accelerator, quantiser
        more = ("adversarial", "discriminator") if critic else ()
        self.means = {
            name: RunningMean(accelerator.device) for name in ("loss", *names, "codebook", *more)
        }
        self.revived = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.guards, self.bar = guards, None

    def start(self, step: int) -> None:
        """Show a progress bar on the main process."""
        if self.accelerator.is_local_main_process:
            self.bar = tqdm(initial=step, total=self.args.max_train_steps, desc="steps")

    def add(self, losses: Mapping[str, Tensor], revived: Tensor) -> None:
        """Note one step's losses, the same on every process, and how many codes were revived."""
        for name, value in losses.items():
            self.means[name].add(value)
        self.revived += revived

    def after_step(self, done: int, learning_rate: float) -> None:
        """Move the bar, and report if it is time."""
        if self.bar is not None:
            self.bar.update()
        if done % self.args.log_every == 0 or done == self.args.max_train_steps:
            self.report(done, learning_rate)

    def report(self, step: int, learning_rate: float) -> None:
        """Read everything once, and show it."""
        skipped = self.guards.check(step)
        usage = self.quantiser.read_usage()
        means = {name: mean.read() for name, mean in self.means.items()}
        metrics = {f"train/{name}": mean for name, mean in means.items() if mean == mean}
        metrics |= {
            "codebook/used": usage.used,
            "codebook/perplexity": usage.perplexity,
            "codebook/revived": int(self.revived),
            "lr": learning_rate,
            "skipped_updates": skipped,
        }
        self.revived.zero_()
        self.accelerator.log(metrics, step=step)
        if self.bar is not None:
            self.bar.set_postfix({"l2": f"{means['l2']:.4f}", "codes": f"{usage.used:.0%}"})

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

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
