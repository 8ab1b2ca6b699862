"""Vision models of a few thousand weights, saved as save_pretrained does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

PREPROCESSOR: dict[str, Any] = {
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def build(kind: str) -> Any:
    """A fresh model with fixed random weights."""
    transformer: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    wide: dict[str, Any] = transformer | {"intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "resnet":
            sizes: dict[str, Any] = {
                "embedding_size": 8,
                "hidden_sizes": [8, 20],
                "depths": [1, 1],
                "num_labels": 7,
            }
            return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))
        if kind == "vit":
            wide["num_labels"] = 7
            return ViTForImageClassification(ViTConfig(**wide))
        if kind == "vit_pooled":
            return ViTModel(ViTConfig(**wide))
        if kind == "vit_bare":
            return ViTModel(ViTConfig(**wide), add_pooling_layer=False)
        return Dinov2Model(Dinov2Config(**transformer, mlp_ratio=2))


def save(kind: str, folder: Path, preprocessor: dict[str, Any] | None = PREPROCESSOR) -> Any:
    """Save a model; returns it in eval mode."""
    model = build(kind).eval()
    model.save_pretrained(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model
