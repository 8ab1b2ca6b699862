"""Stable Diffusion 3 and 3.5: two CLIP and a T5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import diffusers
import transformers
from torch import Tensor

from diffusers_curriculum.models import tiny_parts
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import FAMILIES, Conditioning, Config
from diffusers_curriculum.training.parts.families.flow import PLAIN, FlowFamily, Told, unlike

_CLIP = ("CLIPTextModelWithProjection",)
_TARGETS = "add_k_proj add_q_proj add_v_proj to_add_out to_k to_out.0 to_q to_v"


@FAMILIES.register("sd3")
class StableDiffusion3(FlowFamily):
    """Stable Diffusion 3 (arXiv 2403.03206); it is trained with its scheduler's own shift, 3."""

    title = "a Stable Diffusion 3 pipeline"
    pipeline = "StableDiffusion3Pipeline"
    parts: ClassVar = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_3": ("T5TokenizerFast", "T5Tokenizer"),
    }
    optional = ("image_encoder", "feature_extractor")
    lora_targets = tuple(f"attn.{name}" for name in _TARGETS.split())
    length = 77
    captions_at_once = 16

    def misfits(self, configs: Mapping[str, Config]) -> Iterator[str]:
        network, t5 = configs["transformer"], configs["text_encoder_3"]
        clips = (configs["text_encoder"], configs["text_encoder_2"])
        width = sum(clip.get("projection_dim", 512) for clip in clips)
        latent = configs["vae"].get("latent_channels", 4)
        yield from unlike(network, "in_channels", latent, "its vae's latents have")
        yield from unlike(network, "pooled_projection_dim", width, "its two CLIP give")
        yield from unlike(network, "joint_attention_dim", t5.get("d_model", 512), "its T5 gives")

    def encode_text(
        self, models: Components, tokens: Mapping[str, Any], told: Told = PLAIN
    ) -> Conditioning:
        embeddings, _, pooled, _ = self.text_pipeline(models).encode_prompt(
            tokens["caption"],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=told.length or self.length,
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
        return network(noisy, timestep=timesteps, **conditioning, return_dict=False)[0]

    def tiny(self) -> dict[str, Any]:
        clip, t5 = tiny_parts.clip_tokenizer(), tiny_parts.t5_tokenizer()
        kind, width = transformers.CLIPTextModelWithProjection, 2 * tiny_parts.WIDTH
        network = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=tiny_parts.CHANNELS,
            out_channels=tiny_parts.CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=width,
            pooled_projection_dim=width,
        )
        return {
            "transformer": network,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": tiny_parts.autoencoder(shift_factor=0.1, scaling_factor=1.5),
            "text_encoder": tiny_parts.clip(kind, clip),
            "text_encoder_2": tiny_parts.clip(kind, clip),
            "text_encoder_3": tiny_parts.t5(width),
            **{"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5},
        }
