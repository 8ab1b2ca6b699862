"""What is measured: the training script's own step, on models with random weights."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.gpu.findings import NOT_INSTALLED, Unavailable, check
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.loop.run import LevelLosses, make_update
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.parts.captions import CaptionEncoder
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.parts.optimizers import build_lr_scheduler, build_optimizer
from diffusers_curriculum.training.tasks.family import TextToImageRun
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from train_text_to_image_curriculum import training_step

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNIFORM: tuple[str, ...] = ()
LAPLACE = ("--timestep_sampler", "laplace", "--timestep_draw", "stratified")
# patience 1 opens a stage at nearly every step, so that all that a stage change does is measured
CURRICULUM = (*LAPLACE, "--curriculum", "difficulty", "--curriculum_patience", "1")


@dataclass(frozen=True)
class Sizes:
    """Widths of a Stable Diffusion pipeline; images are 8 latents wide per latent pixel."""

    resolution: int
    unet_channels: tuple[int, ...]
    unet_layers: int
    heads: int
    vae_channels: tuple[int, ...]
    vae_layers: int
    groups: int
    text_width: int
    text_layers: int
    text_heads: int
    vocabulary: int
    text_length: int


# Stable Diffusion 1.5 at its own resolution, with CLIP ViT-L/14's text encoder.
SD15 = Sizes(512, (320, 640, 1280, 1280), 2, 8, (128, 256, 512, 512), 2, 32, 768, 12, 12, 49408, 77)
SMALL = Sizes(32, (32, 64), 1, 4, (16, 16, 16, 16), 1, 8, 32, 1, 4, 64, 16)


def build_models(sizes: Sizes, device: torch.device, frozen_dtype: torch.dtype) -> Components:
    """UNet (float32, trained), autoencoder and text encoder (frozen), made on the device."""
    with torch.device(device):
        unet, vae, text_encoder = _unet(sizes), _autoencoder(sizes), _text_encoder(sizes)
    for frozen in (vae, text_encoder):
        frozen.requires_grad_(False).eval().to(frozen_dtype)
    unet.requires_grad_(True).train()
    return Components(unet, vae, {"text_encoder": text_encoder})


def _unet(sizes: Sizes) -> Any:
    plain = len(sizes.unet_channels) - 1
    layout: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D",) * plain + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * plain,
        "block_out_channels": sizes.unet_channels,
    }
    return UNet2DConditionModel(
        **layout,
        sample_size=sizes.resolution // 8,
        layers_per_block=sizes.unet_layers,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.heads,  # diffusers' name for the number of heads here
        norm_num_groups=sizes.groups,
    )


def _autoencoder(sizes: Sizes) -> Any:
    levels = len(sizes.vae_channels)
    layout: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": sizes.vae_channels,
    }
    return AutoencoderKL(
        **layout,
        layers_per_block=sizes.vae_layers,
        latent_channels=4,
        norm_num_groups=sizes.groups,
        sample_size=sizes.resolution,
    )


def _text_encoder(sizes: Sizes) -> Any:
    config = CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.text_width,
        intermediate_size=4 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        max_position_embeddings=sizes.text_length,
        bos_token_id=sizes.vocabulary - 2,
        eos_token_id=sizes.vocabulary - 1,
    )
    return CLIPTextModel(config)


def stable_diffusion_scheduler() -> DDPMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


def new_accelerator(device: torch.device, precision: str, accumulation: int = 1) -> Accelerator:
    """An accelerator of its own: accelerate keeps one state per process, which is dropped first."""
    reset_accelerate()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
    )


def reset_accelerate() -> None:
    """Forget the last accelerator's precision and device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def arguments(*flags: str) -> Arguments:
    """The training script's arguments; what it needs for loading is of no use here."""
    own = ["--pretrained_model_name_or_path", "random", *flags]
    return TextToImage().parse(own, machine=False)


def build_run(accelerator: Accelerator, models: Components, *flags: str) -> TextToImageRun:
    """What the script's job hands to its training step, for the given flags of its own."""
    args, scheduler = arguments(*flags), stable_diffusion_scheduler()
    averages = Averages(models.network).with_ema(args, accelerator.device)
    return text_to_image_run(
        accelerator,
        args,
        scheduler,
        family=families()["sd"],
        models=models,
        network=models.network,
        averages=averages,
    )


def text_to_image_run(
    accelerator: Accelerator,
    args: Arguments,
    scheduler: Any,
    *,
    family: Any,
    models: Components,
    network: Any,
    averages: Averages,
) -> TextToImageRun:
    """What the job of a script hands to its training step; ``network`` is what that one calls."""
    return TextToImageRun(
        **common_parts(accelerator, args, network, averages),
        levels=Levels.of(args, scheduler, scheduler, 0),
        family=family,
        models=models,
        captions=CaptionEncoder(family, models, accelerator.device),
    )


def common_parts(
    accelerator: Accelerator, args: Arguments, network: Any, averages: Averages
) -> dict[str, Any]:
    """What the runs of all scripts have."""
    optimizer = build_optimizer(args, averages.parameters, 1)
    lr_scheduler = build_lr_scheduler(args, optimizer, 10**6)
    network, optimizer = accelerator.prepare(network, optimizer)
    return {
        "args": args,
        "accelerator": accelerator,
        "seed": 0,
        "network": network,
        "averages": averages,
        "optimizer": optimizer,
        "guard": FiniteGuard(accelerator, optimizer),
        "lr_scheduler": lr_scheduler,
    }


def knowing(run: TextToImageRun, captions: dict[str, Any]) -> TextToImageRun:
    """The same run, where captions were encoded before."""
    encoder = CaptionEncoder(run.family, run.models, run.accelerator.device)
    encoder.kept = captions
    return replace(run, captions=encoder)


def with_sampler(run: TextToImageRun, *flags: str) -> TextToImageRun:
    """The same models and optimizer with another way to draw noise levels."""
    args, scheduler = arguments(*flags), run.levels.scheduler
    return replace(run, args=args, levels=Levels.of(args, scheduler, scheduler, run.seed))


def update(
    run: TextToImageRun, step: int, plan: BatchPlan, batches: Iterator[dict[str, Tensor]]
) -> tuple[LevelLosses, Tensor | None]:
    """One optimizer step of the training script."""
    return make_update(run, step, plan, batches, training_step)


def batch_plan(batch: int, accumulation: int = 1) -> BatchPlan:
    """The plan of one process."""
    return BatchPlan(10**4, batch, accumulation, 1, 0, 0)


def host_batches(
    sizes: Sizes, batch: int, pinned: bool, count: int = 3
) -> Iterator[dict[str, Tensor]]:
    """An endless cycle of random batches in the host's memory, as the loader would hand them on."""
    generator = torch.Generator().manual_seed(0)
    shape, tokens = (batch, 3, sizes.resolution, sizes.resolution), (batch, sizes.text_length)
    batches = [
        {
            "pixel_values": torch.rand(shape, generator=generator) * 2 - 1,
            "input_ids": torch.randint(sizes.vocabulary, tokens, generator=generator),
        }
        for _ in range(count)
    ]
    if pinned:
        batches = [{name: t.pin_memory() for name, t in entry.items()} for entry in batches]
    return itertools.cycle(batches)


def processors(unet: Any) -> list[str]:
    """Names of the attention processors in use."""
    return sorted({type(p).__name__ for p in unet.attn_processors.values()})


def require(package: str) -> None:
    """Raise Unavailable where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable(NOT_INSTALLED)


def use_xformers(unet: Any) -> None:
    """Switch to xformers, and make sure that it is in effect everywhere."""
    require("xformers")
    unet.enable_xformers_memory_efficient_attention()
    check_processors(processors(unet), xformers=True)


def check_processors(found: list[str], xformers: bool) -> None:
    """Raise CheckError unless the flag is in effect in every attention layer, or in none."""
    names = [name for name in found if ("XFormers" in name) != xformers]
    check(bool(found) and not names, f"xformers={xformers}, but the processors are {found}")
