"""Z-Image: one sequence of caption and image, samples in a list, a clock that begins at noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor

from diffusers_curriculum.models import tiny_parts
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import FAMILIES, Conditioning, Config
from diffusers_curriculum.training.parts.families.flow import PLAIN, FlowFamily, Told, unlike


@FAMILIES.register("z_image")
class ZImage(FlowFamily):
    """Z-Image, trained on the mean of the autoencoder's posterior. Sources do not agree on the
    shift of its training (2 or 3): that of the pipeline's scheduler is taken."""

    title = "a Z-Image pipeline"
    pipeline = "ZImagePipeline"
    since = "0.39.0"
    parts: ClassVar = {
        "transformer": ("ZImageTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
        "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer"),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")

    def misfits(self, configs: Mapping[str, Config]) -> Iterator[str]:
        network, latent = configs["transformer"], configs["vae"].get("latent_channels", 4)
        width = configs["text_encoder"].get("hidden_size", 4096)
        yield from unlike(network, "in_channels", latent, "its vae's latents have")
        yield from unlike(network, "cap_feat_dim", width, "its text_encoder gives")

    def encode_text(
        self, models: Components, tokens: Mapping[str, Any], told: Told = PLAIN
    ) -> Conditioning:
        captions, _ = self.text_pipeline(models).encode_prompt(
            [*tokens["caption"]],  # a copy, which it changes
            do_classifier_free_guidance=False,
            max_sequence_length=told.length or self.length,
        )
        return {"captions": captions}  # each of its own length

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, _ = super().posterior(vae, pixels)
        return mean, torch.zeros_like(mean)

    def predict(
        self,
        network: Any,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        frames = [*noisy.unsqueeze(2).unbind(0)]
        clock = (1000 - timesteps) / 1000
        velocities = network(frames, clock, conditioning["captions"], return_dict=False)[0]
        return -torch.stack([*velocities]).squeeze(2)

    def tiny(self) -> dict[str, Any]:
        network = diffusers.ZImageTransformer2DModel(
            in_channels=tiny_parts.CHANNELS,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=tiny_parts.WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[640, 32, 32],
        )
        return {
            "transformer": network,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": tiny_parts.autoencoder(shift_factor=0.1, scaling_factor=0.4),
            "text_encoder": tiny_parts.qwen3(transformers.Qwen3Model, layers=3),
            "tokenizer": tiny_parts.qwen_tokenizer(),
        }
