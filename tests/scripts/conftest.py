"""One minuscule pipeline and data set for all tests of the training script."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.scripts.small_runs import Bench, make_bench, reset_accelerate


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A pipeline, a data set and a cache folder."""
    torch.set_num_threads(1)
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """No test sees the accelerator of another."""
    reset_accelerate()
    yield
    reset_accelerate()
