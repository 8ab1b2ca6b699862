"""Pipelines of random weights, a few kilobytes each, as the official scripts load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusers_curriculum.models.tiny import TinySizes, caption_tokenizer, make_tiny_pipeline

WIDTH = 16  # of every text embedding
CAPTIONS = ["a photo", "picture number"]


def build(kind: str, folder: Path) -> Path:
    """Save a pipeline ("sd", "sdxl", "sd3", ...) or a model's config ("unconditional")."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        {
            "sd": _stable_diffusion,
            "sdxl": _sdxl,
            "sd3": _sd3,
            "flux": _flux,
            "lumina2": _lumina2,
            "unconditional": _unconditional,
        }[kind](folder)
    return folder


def _stable_diffusion(folder: Path) -> None:
    sizes = TinySizes((8,) * 4, (8, 8), text_width=8, text_length=8, groups=4)
    make_tiny_pipeline(None, folder, resolution=64, vae_steps=0, sizes=sizes)


def _sdxl(folder: Path) -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )
    tokenizer = _clip_tokenizer()
    scheduler: Any = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    StableDiffusionXLPipeline(
        vae=_autoencoder(),
        unet=unet,
        text_encoder=_clip(CLIPTextModel, tokenizer),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=scheduler,
    ).save_pretrained(folder)


def _sd3(folder: Path) -> None:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=13,  # a ControlNet copies the first 12
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )
    tokenizer = _clip_tokenizer()
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(),
        text_encoder=_clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(2 * WIDTH),
        tokenizer_3=_t5_tokenizer(),
    ).save_pretrained(folder)


def _flux(folder: Path) -> None:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    tokenizer = _clip_tokenizer()
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_autoencoder(),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(WIDTH),
        tokenizer_2=_t5_tokenizer(),
    ).save_pretrained(folder)


def _lumina2(folder: Path) -> None:
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 32, 32),
        cap_feat_dim=WIDTH,
    )
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_autoencoder(),
        text_encoder=Gemma2Model(config),
        tokenizer=_t5_tokenizer(),
    ).save_pretrained(folder)


def _unconditional(folder: Path) -> None:
    UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).save_config(folder)


def _autoencoder() -> AutoencoderKL:
    layout: dict[str, Any] = {
        "block_out_channels": (8,) * 4,  # ControlNets count on 8 pixels per latent
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(
        **layout, latent_channels=4, norm_num_groups=4, sample_size=32, shift_factor=0.0
    )


def _clip_tokenizer() -> CLIPTokenizer:
    return caption_tokenizer(CAPTIONS, max_length=77)


def _clip(kind: Any, tokenizer: CLIPTokenizer) -> Any:
    special: Any = tokenizer
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
        pad_token_id=special.pad_token_id,
    )
    return kind(config)


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def _t5_tokenizer() -> T5Tokenizer:
    letters = "\u2581abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((c, -3.0) for c in letters)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=77)
