"""Qwen-Image: a language model that sees, and latents that are a film of one frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffusers_curriculum.models import tiny_parts
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import (
    FAMILIES,
    Conditioning,
    Config,
    text_config,
)
from diffusers_curriculum.training.parts.families.flow import (
    PLAIN,
    FlowFamily,
    Told,
    packed,
    unlike,
    unpacked,
)


class FilmFamily(FlowFamily):
    """A family with Qwen-Image's autoencoder: latents (B, C, 1, H, W), normalised by mean and
    deviation of each channel."""

    def downsampling(self, vae: Config) -> int:
        return 2 ** len(vae.get("temperal_downsample", (False, True, True)))

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return super().posterior(vae, pixels.unsqueeze(2))

    def latents(self, vae: Any, encoded: Tensor) -> Tensor:
        """(z - mean) (1 / deviation), of each channel."""
        mean, deviation = (
            encoded.new_tensor(numbers).view(1, -1, 1, 1, 1)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (encoded - mean) * (1.0 / deviation)


@FAMILIES.register("qwen_image")
class QwenImage(FilmFamily):
    """Qwen-Image: captions of their own lengths, with a mask where they differ."""

    title = "a Qwen-Image pipeline"
    pipeline = "QwenImagePipeline"
    parts: ClassVar = {
        "transformer": ("QwenImageTransformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
        "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer"),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    preset = "qwen-image"

    def misfits(self, configs: Mapping[str, Config]) -> Iterator[str]:
        network, latent = configs["transformer"], configs["vae"].get("z_dim", 16)
        width = text_config(configs["text_encoder"]).get("hidden_size", 8192)
        yield from unlike(network, "in_channels", 4 * latent, "patches of its latents have")
        yield from unlike(network, "joint_attention_dim", width, "its text_encoder gives")

    def encode_text(
        self, models: Components, tokens: Mapping[str, Any], told: Told = PLAIN
    ) -> Conditioning:
        embeddings, mask = self.text_pipeline(models).encode_prompt(
            tokens["caption"], max_sequence_length=told.length or self.length
        )
        return masked(embeddings, mask)

    def joined(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        return joined_by_length(conditionings)

    def apart(self, conditioning: Conditioning, count: int) -> list[Conditioning]:
        return [masked(caption[None], None) for caption in _captions(conditioning)]

    def predict(
        self,
        network: Any,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        patches = network(
            packed(noisy.squeeze(2)),
            timestep=timesteps / 1000,
            img_shapes=[(1, height // 2, width // 2)] * len(noisy),
            **conditioning,
            return_dict=False,
        )[0]
        return unpacked(patches, noisy).unsqueeze(2)

    def tiny(self) -> dict[str, Any]:
        network = diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=4 * tiny_parts.CHANNELS,
            out_channels=tiny_parts.CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=tiny_parts.WIDTH,
            axes_dims_rope=(8, 4, 4),
        )
        return {
            "transformer": network,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "vae": tiny_parts.film_autoencoder(),
            "text_encoder": tiny_parts.qwen_vl(),
            "tokenizer": tiny_parts.qwen_tokenizer(),
        }


def masked(embeddings: Tensor, mask: Tensor | None) -> Conditioning:
    """Embeddings (B, L, ...) of captions, and which of them are of a caption where not all are."""
    told = {"encoder_hidden_states": embeddings}
    return told if mask is None else told | {"encoder_hidden_states_mask": mask}


def joined_by_length(conditionings: Sequence[Conditioning]) -> Conditioning:
    """One batch of captions of different lengths; a mask only where they differ."""
    captions = [caption for c in conditionings for caption in _captions(c)]
    lengths = torch.tensor([len(caption) for caption in captions])
    device = captions[0].device
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device)
    return masked(pad_sequence(captions, batch_first=True), None if mask.all() else mask)


def _captions(told: Conditioning) -> Sequence[Tensor]:
    embeddings, mask = told["encoder_hidden_states"], told.get("encoder_hidden_states_mask")
    if mask is None:
        return [*embeddings]
    return [caption[kept.bool()] for caption, kept in zip(embeddings, mask, strict=True)]
