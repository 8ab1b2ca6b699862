"""An accelerator of one process, without accelerate's process-wide state."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


class FakeWriter:
    """What a TensorBoard writer is asked for."""

    def __init__(self) -> None:
        self.images: list[tuple[str, tuple[int, ...], int]] = []

    def add_images(self, tag: str, images: Any, step: int, dataformats: str) -> None:
        self.images.append((tag, images.shape, step))


class FakeTracker:
    """A TensorBoard tracker."""

    name = "tensorboard"

    def __init__(self) -> None:
        self.writer = FakeWriter()


class FakeAccelerator:
    """Notes what is logged."""

    def __init__(self, main: bool = True, scaler: Any = None) -> None:
        self.device = torch.device("cpu")
        self.is_main_process = self.is_local_main_process = main
        self.scaler = scaler
        self.num_processes, self.mixed_precision = 1, "no"
        self.trackers = [FakeTracker()] if main else []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.waits = 0
        self.autocast = nullcontext

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def wait_for_everyone(self) -> None:
        self.waits += 1

    def unwrap_model(self, model: Any) -> Any:
        return model
