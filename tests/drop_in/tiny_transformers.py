"""Transformers of random weights, a few kilobytes each, as the official scripts load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3VLModel,
)

from diffusers_curriculum.models.tiny_parts import (
    WIDTH,
    clip,
    clip_tokenizer,
    qwen_tokenizer,
    t5,
    t5_tokenizer,
)
from diffusers_curriculum.training.parts.families.base import families

_CHAT = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
_LANGUAGE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def autoencoder() -> AutoencoderKL:
    """One of 8 pixels for a latent along one side, on which ControlNets count."""
    layout: dict[str, Any] = {
        "block_out_channels": (8,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(
        **layout, latent_channels=4, norm_num_groups=4, sample_size=32, shift_factor=0.0
    )


def sd3(folder: Path) -> None:
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
    tokenizer = clip_tokenizer()
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    ).save_pretrained(folder)


def flux(folder: Path) -> None:
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
    tokenizer = clip_tokenizer()
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=clip(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(WIDTH),
        tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)


def lumina2(folder: Path) -> None:
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
    Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(),
        text_encoder=Gemma2Model(Gemma2Config(**_LANGUAGE)),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)


def sana(folder: Path) -> None:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=32,
    )
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_block_out_channels": (8, 8), f"{side}_layers_per_block": (1, 1)}
        sides |= {f"{side}_qkv_multiscales": ((), (5,))}
        sides |= {f"{side}_block_types": ("ResBlock", "EfficientViTBlock")}
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    SanaPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=AutoencoderDC(latent_channels=4, attention_head_dim=2, **sides),
        text_encoder=Gemma2Model(Gemma2Config(**_LANGUAGE)),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)


def hidream(folder: Path) -> None:
    axes: Any = (4, 2, 2)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        axes_dims_rope=axes,
        max_resolution=(32, 32),
        llama_layers=[0, 1],
    )
    tokenizer, letters = clip_tokenizer(), t5_tokenizer()
    HiDreamImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(),
        tokenizer_3=letters,
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**_LANGUAGE)),
        tokenizer_4=letters,
    ).save_pretrained(folder)


def ideogram4(folder: Path) -> None:
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel  # 0.37 lacks them

    known = families()["krea2"].tiny()
    tokenizer: Any = qwen_tokenizer()
    tokenizer.chat_template = _CHAT
    config = known["text_encoder"].config
    config.text_config.num_hidden_layers = 36
    transformer = Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=16,
        adaln_dim=8,
        llm_features_dim=13 * WIDTH,
        mrope_section=(4, 2, 2),
    )
    Ideogram4Pipeline(
        transformer=transformer,
        unconditional_transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=families()["flux2"].tiny()["vae"],
        text_encoder=Qwen3VLModel(config),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
