"""The metrics through a classifier of one's own, on scans of digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from diffusers_curriculum.metrics.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffusers_curriculum.metrics.features import load_feature_network
from tests.metrics.tiny_networks import PREPROCESSOR

NOISE_SEED = 7


class Digits(NamedTuple):
    images: Tensor  # (1797, 3, 8, 8) uint8
    labels: Tensor


def digits() -> Digits:
    data = load_digits()
    images = torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8)  # pyright: ignore
    return Digits(images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(data.target))  # pyright: ignore


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet of two blocks after three epochs over the first 1000 digits."""
    folder = tmp_path_factory.mktemp("classifier")
    images, labels = digits()
    inputs = (images[:1000].float() / 255 - 0.5) / 0.5
    inputs = nn.functional.interpolate(inputs, (16, 16), mode="bilinear", antialias=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 20], "depths": [1, 1]}
        config = ResNetConfig(**sizes | {"layer_type": "basic", "num_labels": 10})
        model = ResNetForImageClassification(config).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for order in (torch.randperm(1000) for _ in range(3)):
            for rows in order.split(50):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs[rows]).logits, labels[rows])
                loss.backward()
                optimizer.step()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def test_other_scans_are_nearer_than_noise_and_than_one_digit(classifier: Path) -> None:
    network = load_feature_network(str(classifier))
    images, labels = digits()
    real, held_out = network(images[:900]), network(images[900:])
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = network(torch.rand(900, 3, 8, 8, generator=generator))
    threes = network(images[labels == 3])

    for distance in (frechet_distance, kernel_distance):
        good = distance(real, held_out)
        assert good < distance(real, noise) / 5
        assert good < distance(real, threes) / 5
    good, bad, narrow = (precision_recall(real, made) for made in (held_out, noise, threes))
    assert good.precision > 0.6
    assert good.recall > 0.6
    assert bad.precision < good.precision / 3
    assert bad.recall < 0.1
    assert narrow.recall < good.recall / 2  # one digit of ten
    assert narrow.precision > 0.6
