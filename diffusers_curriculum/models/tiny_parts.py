"""Small but real parts of pipelines, of random weights, from configs alone."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import CLIPTextConfig

from diffusers_curriculum.models.tiny import caption_tokenizer

WIDTH = 16  # of every embedding of a token
CHANNELS = 4  # of latents
CAPTION = "a photo of a red bird"


def autoencoder(kind: Any = diffusers.AutoencoderKL, **settings: Any) -> Any:
    """An autoencoder of 2 pixels for a latent, along one side."""
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        **settings,
    )


def clip_tokenizer() -> Any:
    """A tokenizer of 77 tokens that knows all bytes."""
    return caption_tokenizer([CAPTION], max_length=77)


def clip(kind: Any, tokenizer: Any) -> Any:
    """A CLIP text encoder for the tokens of ``tokenizer``."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)
