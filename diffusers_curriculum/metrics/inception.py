"""The Inception network of FID and KID: torch-fidelity's, with the weights of 2015-12-05."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_curriculum.metrics.preprocessing import FeatureNetworkError

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAME}"
# The file is a pickle, and torch-fidelity reads it as one: these bytes and no others are let in.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_REMEDY = (
    f"Download {URL} where there is a network and give its path as --eval_feature_weights, "
    "or another network as --eval_feature_model."
)


class InceptionFeatures(nn.Module):
    """The 2048 pooled features; (B, 3, H, W) uint8 to (B, 2048) float32, of images that
    torch-fidelity resizes to 299 x 299 bilinearly without antialiasing, as TensorFlow 1 did for the
    published FIDs, and scales to [-1, 1)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def load_inception(weights: str | None = None) -> InceptionFeatures:
    """Load the network with the published file ``weights``, by default that in torch.hub's cache,
    or downloaded; a FeatureNetworkError says that it or torch-fidelity cannot be had."""
    network = _network_class()
    path = _cached() if weights is None else Path(weights).expanduser()
    check_weights(path)
    settings = {"features_list": ["2048"], "feature_extractor_weights_path": str(path)}
    return InceptionFeatures(network("inception-v3-compat", **settings))


def check_weights(path: Path) -> None:
    """Raise a FeatureNetworkError for any file but the published one."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FeatureNetworkError(
            f"the Inception weights {path} cannot be read ({error.strerror}). {_REMEDY}"
        ) from error
    if found != SHA256:
        raise FeatureNetworkError(
            f"{path} does not hold the Inception weights of the published FID: its SHA-256 is "
            f"{found}, not {SHA256}. {_REMEDY}"
        )


def _network_class() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # pyright: ignore
    # A torchvision that does not fit torch fails in other ways than a missing one.
    except (ImportError, RuntimeError, AttributeError) as error:
        raise FeatureNetworkError(
            f"the Inception network needs torch-fidelity, which cannot be imported ({error}): pip "
            "install torch-fidelity and a torchvision that fits torch, or give "
            "--eval_feature_model PATH."
        ) from error
    return FeatureExtractorInceptionV3


def _cached() -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", FILE_NAME)
    if path.is_file():
        return path
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        raise FeatureNetworkError(
            f"the Inception weights are not in {path.parent}, and HF_HUB_OFFLINE forbids to "
            f"download them. {_REMEDY}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        raise FeatureNetworkError(
            f"the Inception weights cannot be downloaded ({error}). {_REMEDY}"
        ) from error
    return path
