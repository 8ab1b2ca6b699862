"""The way of batches to the device, beside what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor


def on_device(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """The same batches in the same order, each sent to a CUDA device on a stream of its own; for
    another device, ``batches`` themselves.

    The host asks for a batch while the device still computes the step before, as no step makes it
    wait: so the copy, out of memory that is pinned, takes none of the device's time for steps.
    """
    return _sent(batches, device) if device.type == "cuda" else batches


def _sent(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    streams = torch.get_device_module(device)
    way = streams.Stream(device=device)
    for batch in batches:
        with streams.stream(way):
            there = send_to_device(batch, device, non_blocking=True)
        computing = streams.current_stream(device)
        computing.wait_stream(way)

        def keep(tensor: Tensor, until: Any = computing) -> None:
            tensor.record_stream(until)  # or its memory would be used again too soon

        recursively_apply(keep, there)
        yield there
