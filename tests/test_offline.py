"""The suite runs without a network, and would notice a test that reaches for it."""

from __future__ import annotations

import socket

import huggingface_hub.constants
import pytest


@pytest.mark.reliability
@pytest.mark.parametrize("address", [("192.0.2.1", 443), ("huggingface.co", 443)])
def test_suite_offline(address: tuple[str, int]) -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with socket.socket() as there, pytest.raises(OSError, match="the suite runs offline"):
        there.connect(address)


def test_the_loopback_device_is_no_network() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
