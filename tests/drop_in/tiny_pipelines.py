"""Pipelines of random weights, a few kilobytes each, as the official scripts load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffusers_curriculum.models.tiny import TinySizes, make_tiny_pipeline
from diffusers_curriculum.models.tiny_parts import WIDTH, clip, clip_tokenizer
from diffusers_curriculum.training.parts.families.base import families
from tests.drop_in import tiny_transformers


def build(kind: str, folder: Path) -> Path:
    """Save a pipeline ("sd", "sdxl", "flux2", ...) or a model's config ("unconditional")."""
    own = {
        "sd": _stable_diffusion,
        "sdxl": _sdxl,
        "sdxl_adapter": _sdxl_adapter,
        "sd3": tiny_transformers.sd3,
        "flux": tiny_transformers.flux,
        "lumina2": tiny_transformers.lumina2,
        "sana": tiny_transformers.sana,
        "hidream": tiny_transformers.hidream,
        "ideogram4": tiny_transformers.ideogram4,
        "kandinsky": _kandinsky,
        "unconditional": _unconditional,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (own.get(kind) or families()[kind].save_tiny)(folder)
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
    tokenizer = clip_tokenizer()
    scheduler: Any = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    StableDiffusionXLPipeline(
        vae=tiny_transformers.autoencoder(),
        unet=unet,
        text_encoder=clip(CLIPTextModel, tokenizer),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=scheduler,
    ).save_pretrained(folder)


def _sdxl_adapter(folder: Path) -> None:
    _sdxl(folder)
    adapter = T2IAdapter(
        channels=[8] * 4, num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl"
    )
    adapter.save_pretrained(folder / "adapter")


def _kandinsky(folder: Path) -> None:
    """The decoder with its prior, and the prior alone in ``prior``."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=WIDTH,
        cross_attention_dim=WIDTH,
        block_out_channels=(8, 8),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=8,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    tokenizer, sizes = clip_tokenizer(), dict.fromkeys(("hidden_size", "intermediate_size"), 8)
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    sight: Any = CLIPVisionConfig.from_dict(sizes | {"projection_dim": WIDTH})
    transformer = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH
    )
    torch.nn.init.ones_(transformer.clip_std)  # which embeddings are divided by
    prior: dict[str, Any] = {
        "prior": transformer,
        "image_encoder": CLIPVisionModelWithProjection(sight),
        "text_encoder": clip(CLIPTextModelWithProjection, tokenizer),
        "tokenizer": tokenizer,
        "scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        "image_processor": CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    }
    KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=DDPMScheduler(),
        movq=movq,
        **{f"prior_{name}": part for name, part in prior.items()},
    ).save_pretrained(folder)
    KandinskyV22PriorPipeline(**prior).save_pretrained(folder / "prior")


def _unconditional(folder: Path) -> None:
    UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).save_config(folder)
