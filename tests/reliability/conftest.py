"""The benches that tests of the training envelope run on: one for each training script."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.scripts.small_runs import BENCHES, Bench

# What takes minutes is tried in the default run on scripts whose loop, data or saving differ; those
# for SDXL and flow matching have them from those for Stable Diffusion, and all in
# `make test-reliability`.
LONG = ("test_kills", "test_soak", "test_stops", "test_consumption", "test_two_processes")
ALIKE = ("text_to_image_sdxl", "text_to_image_lora_sdxl", "flow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        first = item.name.partition("[")[2].rstrip("]").partition("-")[0]
        if first in ALIKE and item.path.stem in LONG:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A script with a pipeline, a data set and a cache folder."""
    torch.set_num_threads(1)
    return BENCHES[request.param](tmp_path_factory.mktemp("bench"))
