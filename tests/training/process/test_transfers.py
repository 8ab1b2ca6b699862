"""The way of batches to the device: order of what is asked of it, without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_curriculum.training.process import transfers

CUDA = torch.device("cuda", 0)


class Device:
    """What torch.cuda is asked for here, in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.current = "compute"

    def Stream(self, device: torch.device) -> str:
        return "way"

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self, device: torch.device) -> Any:
        outer, name = self, self.current

        class Current:
            def wait_stream(self, other: str) -> None:
                outer.asked.append((name, "waits for", other))

            def __repr__(self) -> str:
                return name

        return Current()


class OnHost(Tensor):
    """A tensor that says where it would be sent, and how long it would be kept."""

    device_module: Device

    def to(self, *args: Any, **more: Any) -> Any:
        assert args == (CUDA,)
        assert more == {"non_blocking": True}
        self.device_module.asked.append((self.device_module.current, "copies", int(self)))
        return self

    def record_stream(self, stream: Any) -> None:
        self.device_module.asked.append((repr(stream), "keeps", int(self)))


def batch(number: int, device: Device) -> dict[str, Any]:
    tensor = torch.tensor(number).as_subclass(OnHost)
    tensor.device_module = device
    return {"mean": tensor, "more": {"ids": [tensor]}, "caption": ["a bird"]}


def test_a_batch_is_copied_beside_the_steps_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(transfers.torch, "get_device_module", lambda _: device)

    def loaded() -> Iterator[Any]:
        for number in range(2):
            device.asked.append(("host", "reads", number))
            yield batch(number, device)
        raise OSError("a file is gone")

    sent = transfers.on_device(loaded(), CUDA)
    for number in range(2):
        found = next(sent)
        assert int(found["mean"]) == int(found["more"]["ids"][0]) == number
        assert found["caption"] == ["a bird"]
        copies, keeps = [("way", "copies", number)] * 2, [("compute", "keeps", number)] * 2
        order = [("host", "reads", number), *copies, ("compute", "waits for", "way"), *keeps]
        assert device.asked == order
        device.asked.clear()
    with pytest.raises(OSError, match="a file is gone"):
        next(sent)


@pytest.mark.parametrize("kind", ["cpu", "meta", "mps"])
def test_elsewhere_batches_are_left_as_they_are(kind: str) -> None:
    batches = iter([{"mean": torch.zeros(2)}])
    assert transfers.on_device(batches, torch.device(kind)) is batches
