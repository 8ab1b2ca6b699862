"""What several tests of the training scripts begin with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from diffusers_curriculum.models.latent_space import LatentSpace
from tests.scripts.small_runs import Bench, make_bench, reset_accelerate


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A pipeline, a data set and a cache folder."""
    torch.set_num_threads(1)
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each autoencoder whose weights are loaded."""
    noted, load = list[torch.dtype](), LatentSpace.load

    def noting(*args: Any, **settings: Any) -> LatentSpace:
        space = load(*args, **settings)
        noted.append(space.model.dtype)
        return space

    monkeypatch.setattr(LatentSpace, "load", noting)
    return noted


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """No test sees the accelerator of another."""
    reset_accelerate()
    yield
    reset_accelerate()
