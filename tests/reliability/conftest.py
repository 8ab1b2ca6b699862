"""The benches that tests of the training envelope run on: one for each training script."""

from __future__ import annotations

import pytest
import torch

from tests.scripts.small_runs import BENCHES, Bench


@pytest.fixture(scope="module", params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A script with a pipeline, a data set and a cache folder."""
    torch.set_num_threads(1)
    return BENCHES[request.param](tmp_path_factory.mktemp("bench"))
