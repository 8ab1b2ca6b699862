"""A CLIP model of a few thousand weights, saved as save_pretrained does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from diffusers_curriculum.models.tiny import tokenizer_of_pairs
from tests.metrics.tiny_networks import PREPROCESSOR

TOKENS = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
TOKENS += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]


def save_clip(folder: Path) -> tuple[Any, Any]:
    """Save a model with its tokenizer and preprocessing; returns the first two."""
    text: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model = CLIPModel(config).eval()
    tokenizer = tokenizer_of_pairs("CLIP", TOKENS, [], model_max_length=12)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return model, tokenizer
