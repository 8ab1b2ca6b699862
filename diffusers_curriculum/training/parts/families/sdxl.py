"""Stable Diffusion XL: a UNet told of captions by two CLIPs, and of sizes and crop of the image."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import Tensor

from diffusers_curriculum.models import tiny_parts
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.transforms import Crop
from diffusers_curriculum.training.parts.components import Components, Source
from diffusers_curriculum.training.parts.families.base import (
    FAMILIES,
    Conditioning,
    Config,
    ModelFamily,
)
from diffusers_curriculum.training.parts.families.stable_diffusion import (
    no_clip,
    wants,
    wrong_latents,
    wrong_width,
)
from diffusers_curriculum.training.parts.images import autoencoder_source
from diffusers_curriculum.training.storage.components import SavedPart

_UNTOLD = ("encoder_hid_dim_type", "class_embed_type", "num_class_embeds")
_SIZES = 6  # numbers of the time ids: original size, corner of the crop, size of the crop
_VAE_FLAG = "pretrained_vae_model_name_or_path"
_KOHYA_ENCODERS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_ATTENTION = re.compile(r"(down|mid|up)_block(?:s\.(\d+))?\.attentions\.(\d+)\.(.+)")


@FAMILIES.register("sdxl")
class StableDiffusionXL(ModelFamily):
    """Stable Diffusion XL, the base model; the autoencoder may come from elsewhere, and works in
    float32, as its latents overflow in float16."""

    title = "a Stable Diffusion XL pipeline"
    pipeline, network = "StableDiffusionXLPipeline", "unet"
    parts: ClassVar = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    optional = ("feature_extractor", "image_encoder")
    settings = ("force_zeros_for_empty_prompt",)
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")  # of train_text_to_image_lora_sdxl.py
    tags = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers")
    precise_vae = True

    # -- what its parts are ----------------------------------------------------------------------

    def source(self, args: Arguments, part: str) -> Source:
        if part != "vae" or args[_VAE_FLAG] is None:
            return super().source(args, part)
        path, subfolder = autoencoder_source(args) or (args[_VAE_FLAG], None)
        return Source(path, None, None, subfolder, _VAE_FLAG, "a saved AutoencoderKL")

    def saved_part(self, args: Arguments, folder: Path, name: str) -> SavedPart:
        if name != "vae" or args[_VAE_FLAG] is None:
            return super().saved_part(args, folder, name)
        source = self.source(args, name)
        own = Path(source.path, source.subfolder or "")
        if not own.is_dir():
            config = hf_hub_download(source.path, "config.json", subfolder=source.subfolder)
            own = Path(config).parent
        return SavedPart(own)

    def misfits(self, configs: Mapping[str, Config]) -> Iterator[str]:
        unet, vae = configs["unet"], configs["vae"]
        kind = vae.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            yield f"its vae is a {kind}, and this script takes an AutoencoderKL"
        yield from wrong_latents(unet, vae)
        yield from wants(unet, dict.fromkeys(_UNTOLD, (None,)))
        strange = [fault for name in self.encoders for fault in no_clip(name, configs[name])]
        yield from strange
        if strange:
            return
        widths = [configs[name].get("hidden_size", 512) for name in self.encoders]
        yield from wrong_width(unet, sum(widths), "its two text encoders give")
        if unet.get("addition_embed_type") != "text_time":
            yield f"its unet's addition_embed_type is {unet.get('addition_embed_type')!r}"
            return
        pooled = configs["text_encoder_2"].get("projection_dim", 512)
        taken = unet.get("projection_class_embeddings_input_dim")
        given = pooled + _SIZES * (unet.get("addition_time_embed_dim") or 0)
        if taken != given:  # a refiner's are another five sizes
            yield (
                f"its unet takes {taken} numbers of sizes and pooled captions, and is given {given}"
            )

    # -- adapters --------------------------------------------------------------------------------

    def encoder_targets(self, encoder: str, config: Config) -> tuple[str, ...]:
        """Modules of a text encoder that get adapters: those of train_text_to_image_lora_sdxl.py,
        less the last layer of the first encoder, which :meth:`encode_text` does not listen to."""
        layers = config.get("num_hidden_layers", 12) - (encoder == "text_encoder")
        return tuple(
            f"layers.{number}.self_attn.{name}"
            for number in range(layers)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        )

    def kohya_name(self, module: str, network: Config) -> str | None:
        """kohya's trainer has the UNet of the original code, where blocks are numbered through."""
        part, _, name = module.partition(".")
        if part in _KOHYA_ENCODERS:
            return f"{_KOHYA_ENCODERS[part]}_{name}".replace(".", "_")
        place, layers = _ATTENTION.fullmatch(name), network.get("layers_per_block", 2)
        if place is None or not isinstance(layers, int):
            return None
        where, block, attention, rest = place.groups()
        number = (layers + 1) * int(block or 0) + int(attention)
        blocks = {"down": f"input_blocks_{number + 1}", "up": f"output_blocks_{number}"}
        head = blocks.get(where, "middle_block")
        return f"lora_unet_{head}_1_{rest}".replace(".", "_")

    # -- what the network is told ----------------------------------------------------------------

    def encode_text(self, models: Components, tokens: Mapping[str, Tensor]) -> Conditioning:
        """Of both encoders the states before the last layer, side by side; of the second one the
        pooled and projected state (arXiv 2307.01952, section 2.1)."""
        told = [
            encoder(
                tokens[name.replace("text_encoder", "input_ids")],
                output_hidden_states=True,
                return_dict=False,
            )
            for name, encoder in models.encoders.items()
        ]
        states = torch.cat([each[-1][-2] for each in told], dim=-1)
        return {"encoder_hidden_states": states, "text_embeds": told[-1][0]}

    def size_conditioning(self) -> Callable[[Crop], dict[str, Tensor]]:
        """time_ids (6,): original size, corner of the crop, and its size, as (y, x) each."""
        return _time_ids

    def predict(
        self, network: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        text = conditioning["encoder_hidden_states"]
        return network(noisy, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]

    def tiny(self) -> dict[str, Any]:
        tokenizer, sizes = tiny_parts.clip_tokenizer(), 8
        layout: dict[str, Any] = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
        }
        unet = diffusers.UNet2DConditionModel(
            **layout,
            sample_size=8,
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=2 * tiny_parts.WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=sizes,
            projection_class_embeddings_input_dim=tiny_parts.WIDTH + _SIZES * sizes,
        )
        return {
            "unet": unet,
            "scheduler": diffusers.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            "vae": tiny_parts.autoencoder(scaling_factor=0.13025),
            "text_encoder": tiny_parts.clip(transformers.CLIPTextModel, tokenizer),
            "text_encoder_2": tiny_parts.clip(transformers.CLIPTextModelWithProjection, tokenizer),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer,
        }


def _time_ids(crop: Crop) -> dict[str, Tensor]:
    sizes = (*crop.original, *crop.top_left, *crop.size)
    return {"time_ids": torch.tensor(sizes, dtype=torch.float32)}
