"""Which Inception weights are let in, and what is said where there are none."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_curriculum.metrics import inception
from diffusers_curriculum.metrics.features import load_feature_network
from diffusers_curriculum.metrics.preprocessing import FeatureNetworkError


class FakeInception(nn.Module):
    """As torch-fidelity's: a tuple of the features asked for."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__()
        self.path, self.dim = kwargs["feature_extractor_weights_path"], int(features_list[0])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if images.dtype != torch.uint8:
            raise TypeError("torch-fidelity wants bytes")
        return (images.float().mean((1, 2, 3))[:, None].expand(-1, self.dim),)


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("torch_fidelity"), ModuleType("extractor")
    module.FeatureExtractorInceptionV3 = FakeInception  # pyright: ignore
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / inception.FILE_NAME


def refusal(weights: str | None = None) -> str:
    with pytest.raises(FeatureNetworkError) as caught:
        load_feature_network("inception", inception_weights=weights)
    return str(caught.value)


def test_without_torch_fidelity_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    message = refusal()
    assert "pip install torch-fidelity" in message
    assert "--eval_feature_model" in message


@pytest.mark.usefixtures("torch_fidelity")
def test_weights_that_cannot_be_had(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in refusal()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the suite lets no connection through
    message = refusal()
    assert "cannot be downloaded" in message
    for part in (inception.URL, "--eval_feature_weights", "--eval_feature_model"):
        assert part in message
    assert not empty_cache.exists()


@pytest.mark.usefixtures("torch_fidelity")
def test_only_the_published_weights_are_let_in(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is a pickle: unpickling any other one could run anything."""
    path = tmp_path / "weights.pth"
    assert "No such file" in refusal(str(path))
    path.write_bytes(b"other bytes")
    digest = hashlib.sha256(b"other bytes").hexdigest()
    assert f"{digest}, not {inception.SHA256}" in refusal(str(path))
    empty_cache.parent.mkdir(parents=True)
    empty_cache.write_bytes(b"other bytes")  # nor from the cache
    assert digest in refusal()
    monkeypatch.setattr(inception, "SHA256", digest)
    for weights, used in ((str(path), path), (None, empty_cache)):
        network = load_feature_network("inception", inception_weights=weights)
        assert (network.name, network.dim) == ("inception", 2048)
        assert network.module.network.path == str(used)  # pyright: ignore
    assert network(torch.full((1, 3, 8, 8), 1.0))[0, 0] == 255


def test_the_name_holds_the_beginning_of_the_digest() -> None:
    assert inception.FILE_NAME.removesuffix(".pth").split("-")[-1] == inception.SHA256[:8]
