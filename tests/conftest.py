"""Settings that must be made before any import, and guards that hold for every test."""

from __future__ import annotations

import os

# Hugging Face libraries read these once, when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_name, None)

import logging
import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from zlib import crc32

import pytest
from hypothesis import settings

# The same examples on every run; HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Of a test that is marked ``thinned(n)``, only every n-th case is not slow. Where n divides no
    number of values of a parameter, each value of each parameter comes about as often; tests begin
    at different cases."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thinned") and not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for test, own in cases.items():
        marker: Any = own[0].get_closest_marker("thinned")
        n = marker.args[0]
        first = crc32(test.encode()) % min(n, len(own))
        for number, item in enumerate(own):
            if (number - first) % n:
                item.add_marker(pytest.mark.slow)


def _is_local(address: Any) -> bool:
    """Whether a socket address stays on this machine."""
    return not isinstance(address, tuple) or address[0] in {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fail a test that opens a connection to another machine, unless it is marked hub."""
    if request.node.get_closest_marker("hub"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if not _is_local(address):
            raise OSError(f"a test tried to reach {address}; the suite runs offline")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _own_lines() -> Iterator[None]:
    """Let every test see the library's lines: a run in this process, of another rank than the
    first, leaves them out from there on."""
    own = logging.getLogger("diffusers_curriculum")
    before = own.level
    yield
    own.setLevel(before)
