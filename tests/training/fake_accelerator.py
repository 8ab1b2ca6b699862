"""An accelerator of one process, without accelerate's process-wide state."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from diffusers_curriculum.training.publish.trackers import tracker_of

TIMED = ("samples_per_second", "memory_gib")  # of a run, not of what it computes


class FakeTracker:
    """accelerate's tracker for TensorBoard, which notes what pictures and text it is sent."""

    name = "tensorboard"

    def __init__(self) -> None:
        self.images: list[tuple[str, tuple[int, ...], int]] = []
        self.text: list[tuple[int, dict[str, str]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.text.append((step, values))

    def log_images(self, values: dict[str, Any], step: int, dataformats: str) -> None:
        assert dataformats == "NHWC"
        self.images += [(tag, images.shape, step) for tag, images in values.items()]


class FakeAccelerator:
    """Notes what is logged."""

    def __init__(self, main: bool = True, scaler: Any = None) -> None:
        self.device = torch.device("cpu")
        self.is_main_process = self.is_local_main_process = main
        self.scaler = scaler
        self.num_processes, self.mixed_precision = 1, "no"
        self.tracker = FakeTracker()
        self.trackers = [tracker_of(self.tracker)] if main else []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.waits = 0
        self.autocast = nullcontext

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def wait_for_everyone(self) -> None:
        self.waits += 1

    def unwrap_model(self, model: Any) -> Any:
        return model
