"""Flux.1: a CLIP for one vector of the caption, a T5 for its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import diffusers
import transformers
from torch import Tensor

from diffusers_curriculum.models import tiny_parts
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import FAMILIES, Conditioning, Config
from diffusers_curriculum.training.parts.families.flow import (
    PLAIN,
    FlowFamily,
    Told,
    for_each,
    packed,
    unlike,
    unpacked,
)

_ATTENTION = "to_k to_q to_v to_out.0 add_k_proj add_q_proj add_v_proj to_add_out"
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


@FAMILIES.register("flux")
class Flux(FlowFamily):
    """Flux.1: latents in patches of 2 x 2; only the distilled "dev" is told a guidance scale."""

    title = "a Flux.1 pipeline"
    pipeline = "FluxPipeline"
    parts: ClassVar = {
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
    }
    optional = ("image_encoder", "feature_extractor")
    lora_targets = (*(f"attn.{name}" for name in _ATTENTION.split()), *_FEED_FORWARD)
    preset = "flux"

    def misfits(self, configs: Mapping[str, Config]) -> Iterator[str]:
        network, clip = configs["transformer"], configs["text_encoder"]
        latent, t5 = configs["vae"].get("latent_channels", 4), configs["text_encoder_2"]
        width = clip.get("hidden_size", 512)
        yield from unlike(network, "in_channels", 4 * latent, "patches of its latents have")
        yield from unlike(network, "pooled_projection_dim", width, "its CLIP gives")
        yield from unlike(network, "joint_attention_dim", t5.get("d_model", 512), "its T5 gives")

    def encode_text(
        self, models: Components, tokens: Mapping[str, Any], told: Told = PLAIN
    ) -> Conditioning:
        embeddings, pooled, _ = self.text_pipeline(models).encode_prompt(
            tokens["caption"], None, max_sequence_length=told.length or self.length
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def predict(
        self,
        network: Any,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        text, (height, width) = conditioning["encoder_hidden_states"], noisy.shape[-2:]
        places = diffusers.FluxPipeline._prepare_latent_image_ids(
            len(noisy), height // 2, width // 2, noisy.device, noisy.dtype
        )
        patches = network(
            packed(noisy),
            timestep=timesteps / 1000,
            guidance=for_each(guidance, noisy),
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=places,
            **conditioning,
            return_dict=False,
        )[0]
        return unpacked(patches, noisy)

    def tiny(self) -> dict[str, Any]:
        clip, t5 = tiny_parts.clip_tokenizer(), tiny_parts.t5_tokenizer()
        network = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * tiny_parts.CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=tiny_parts.WIDTH,
            pooled_projection_dim=tiny_parts.WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
        return {
            "transformer": network,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "vae": tiny_parts.autoencoder(shift_factor=0.1, scaling_factor=0.4),
            "text_encoder": tiny_parts.clip(transformers.CLIPTextModel, clip),
            "text_encoder_2": tiny_parts.t5(),
            **{"tokenizer": clip, "tokenizer_2": t5},
        }
