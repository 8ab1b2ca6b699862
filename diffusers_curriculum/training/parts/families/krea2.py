"""Krea 2: a stack of a language model's layers for each token, in one sequence with the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import diffusers
import transformers
from torch import Tensor

from diffusers_curriculum.models import tiny_parts
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import (
    FAMILIES,
    Conditioning,
    Config,
    text_config,
)
from diffusers_curriculum.training.parts.families.flow import PLAIN, Told, packed, unlike, unpacked
from diffusers_curriculum.training.parts.families.qwen_image import FilmFamily

_TARGETS = (
    "img_in final_layer.linear to_q to_k to_v to_out.0 to_gate ff.up ff.down "
    "text_fusion.projector txt_in.linear_1 txt_in.linear_2 time_embed.linear_1 "
    "time_embed.linear_2 time_mod_proj"
)


@FAMILIES.register("krea2")
class Krea2(FilmFamily):
    """Krea 2: captions of one length with a mask. Which layers are read
    stands in the pipeline's model_index.json."""

    title = "a Krea 2 pipeline"
    pipeline = "Krea2Pipeline"
    since = "0.39.0"
    parts: ClassVar = {
        "transformer": ("Krea2Transformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen3VLModel",),
        "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer"),
    }
    settings = ("text_encoder_select_layers", "is_distilled", "patch_size")
    lora_targets = tuple(_TARGETS.split())
    preset = "krea2"

    def misfits(self, configs: Mapping[str, Config]) -> Iterator[str]:
        network, latent = configs["transformer"], configs["vae"].get("z_dim", 16)
        width = text_config(configs["text_encoder"]).get("hidden_size", 4096)
        yield from unlike(network, "in_channels", 4 * latent, "patches of its latents have")
        yield from unlike(network, "text_hidden_dim", width, "its text_encoder gives")

    def encode_text(
        self, models: Components, tokens: Mapping[str, Any], told: Told = PLAIN
    ) -> Conditioning:
        states, mask = self.text_pipeline(models).encode_prompt(
            tokens["caption"], max_sequence_length=told.length or self.length
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def predict(
        self,
        network: Any,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        length = conditioning["encoder_hidden_states"].shape[1]
        grid = (side // 2 for side in noisy.shape[-2:])
        patches = network(
            packed(noisy.squeeze(2)),
            timestep=timesteps / 1000,
            position_ids=self.pipeline_class.prepare_position_ids(length, *grid, noisy.device),
            **conditioning,
            return_dict=False,
        )[0]
        return unpacked(patches, noisy).unsqueeze(2)

    def tiny(self) -> dict[str, Any]:
        width, heads = tiny_parts.WIDTH, {"num_attention_heads": 2, "num_key_value_heads": 1}
        network = diffusers.Krea2Transformer2DModel(
            in_channels=4 * tiny_parts.CHANNELS,
            num_layers=1,
            attention_head_dim=16,
            **heads,
            intermediate_size=width,
            timestep_embed_dim=width,
            text_hidden_dim=width,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=width,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(8, 4, 4),
        )
        language = {"vocab_size": 264, "hidden_size": width, "intermediate_size": width, **heads}
        language |= {"num_hidden_layers": 2, "head_dim": 8, **tiny_parts.ROPE}
        sight = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}
        sight |= {"out_hidden_size": width, "deepstack_visual_indexes": [0]}
        config = transformers.Qwen3VLConfig(text_config=language, vision_config=sight)
        return {
            "transformer": network,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "vae": tiny_parts.film_autoencoder(),
            "text_encoder": transformers.Qwen3VLModel(config),
            "tokenizer": tiny_parts.qwen_tokenizer(),
            "text_encoder_select_layers": (1, 2),
        }
