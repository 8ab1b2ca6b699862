"""Flux.2 klein: a language model of which some layers are read, latents of 2 x 2 that are
normalised by a batch norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor

from diffusers_curriculum.models import tiny_parts
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import FAMILIES, Conditioning, Config
from diffusers_curriculum.training.parts.families.flow import (
    PLAIN,
    FlowFamily,
    Told,
    for_each,
    unlike,
)

_LAYERS = (9, 18, 27)  # that the pipeline reads
_PLAIN = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj")


@FAMILIES.register("flux2")
class Flux2(FlowFamily):
    """Flux.2 klein, trained on the mean of the autoencoder's posterior."""

    title = "a Flux.2 klein pipeline"
    pipeline = "Flux2KleinPipeline"
    since = "0.38.0"
    parts: ClassVar = {
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
        "text_encoder": ("Qwen3ForCausalLM",),
        "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer"),
    }
    settings = ("is_distilled",)
    lora_targets = _PLAIN
    preset = "flux2"
    vae_told_by_config = False  # it normalises latents by numbers among its weights

    def check_resolution(self, args: Arguments, configs: Mapping[str, Config]) -> None:
        super().check_resolution(args, configs)
        layers, encoder = args.text_encoder_out_layers or _LAYERS, configs["text_encoder"]
        width, last = encoder.get("hidden_size", 4096), encoder.get("num_hidden_layers", 32)
        wanted = configs["transformer"].get("joint_attention_dim")
        if max(layers) > last or len(layers) * width != wanted:
            raise UsageError(
                f"--text_encoder_out_layers is {' '.join(map(str, layers))}: the text_encoder has "
                f"{last} layers of {width} numbers a token, and the transformer takes {wanted}: "
                "name as many layers as make that, or leave it out."
            )

    def adapter_targets(self, network: Config) -> tuple[str, ...]:
        blocks = range(network.get("num_single_layers", 48))
        return (*_PLAIN, *(f"single_transformer_blocks.{n}.attn.to_out" for n in blocks))

    def misfits(self, configs: Mapping[str, Config]) -> Iterator[str]:
        network, latent = configs["transformer"], configs["vae"].get("latent_channels", 32)
        yield from unlike(network, "in_channels", 4 * latent, "patches of its latents have")

    def load_part(
        self, args: Arguments, part: str, dtype: torch.dtype = torch.float32, **more: Any
    ) -> Any:
        model = super().load_part(args, part, torch.float32 if part == "vae" else dtype, **more)
        if part != "vae" or dtype == torch.float32:
            return model
        norm, model.bn = model.bn, None  # latents are normalised by its own numbers, unrounded
        model.to(dtype).bn = norm
        return model

    def encode_text(
        self, models: Components, tokens: Mapping[str, Any], told: Told = PLAIN
    ) -> Conditioning:
        embeddings, places = self.text_pipeline(models).encode_prompt(
            tokens["caption"],
            max_sequence_length=told.length or self.length,
            text_encoder_out_layers=told.layers or _LAYERS,
        )
        return {"encoder_hidden_states": embeddings, "txt_ids": places}

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, _ = super().posterior(vae, pixels)
        return mean, torch.zeros_like(mean)

    def latents(self, vae: Any, encoded: Tensor) -> Tensor:
        """Patches of 2 x 2 as channels, (z - mean) / sqrt(variance + eps) of each."""
        norm = vae.bn
        numbers = (norm.running_mean, norm.running_var)  # on the host, if the autoencoder is
        mean, variance = (x.view(1, -1, 1, 1).to(encoded.device) for x in numbers)
        patches = self.pipeline_class._patchify_latents(encoded)
        return (patches - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)

    def predict(
        self,
        network: Any,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        kind = self.pipeline_class
        places = kind._prepare_latent_ids(noisy).to(noisy.device)
        patches = network(
            kind._pack_latents(noisy),
            timestep=timesteps / 1000,
            guidance=for_each(guidance, noisy),
            img_ids=places,
            **conditioning,
            return_dict=False,
        )[0]
        return kind._unpack_latents_with_ids(patches, places, *noisy.shape[-2:])

    def tiny(self) -> dict[str, Any]:
        network = diffusers.Flux2Transformer2DModel(
            in_channels=4 * tiny_parts.CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=len(_LAYERS) * tiny_parts.WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = tiny_parts.autoencoder(diffusers.AutoencoderKLFlux2)
        torch.nn.init.normal_(vae.bn.running_mean, std=0.1)
        torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2)
        return {
            "transformer": network,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "vae": vae,
            "text_encoder": tiny_parts.qwen3(transformers.Qwen3ForCausalLM, max(_LAYERS) + 1),
            "tokenizer": tiny_parts.qwen_tokenizer(),
        }
