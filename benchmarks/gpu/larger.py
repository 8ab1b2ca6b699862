"""Larger networks with random weights: LoRA of Stable Diffusion XL, and a DiT-XL, from caches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.gpu import flops, speed, subject
from benchmarks.gpu.caches import CAPTION, cached_batches
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.settings import Settings
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.models.networks import build_network
from diffusers_curriculum.training.loop.run import make_update
from diffusers_curriculum.training.parts.adapters import add_adapters
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.sdxl import StableDiffusionXL
from diffusers_curriculum.training.parts.images import ImageModels
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.text_to_image_lora_sdxl import (
    CaptionedNetwork,
    TextToImageLoraSDXL,
)

SDXL_STEP = "examples.text_to_image.train_text_to_image_lora_sdxl_curriculum"
DIT_STEP = "examples.class_conditional.train_class_conditional_curriculum"
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# run, training step, and batches of a size
Built = tuple[Any, Any, Callable[[int], speed.Batches]]
SDXL_BATCHES, DIT_BATCHES, RANK = (4, 1, 8), (32, 128, 8), 16


def measure(findings: Findings, settings: Settings) -> None:
    """Each network at several batches, with its share of the matrix peak."""
    peak = flops.matrix_peak(settings)
    kinds = {  # each is built once, when its first row needs it
        "SDXL LoRA": (cache(partial(sdxl_lora, settings)), SDXL_BATCHES),
        "DiT-XL/2": (cache(partial(dit, settings)), DIT_BATCHES),
    }
    rows = {
        f"{name}, batch {batch}": partial(_rate, settings, build, batch, peak)
        for name, (build, batches) in kinds.items()
        for batch in ((2,) if settings.smoke else batches)
    }
    findings.attempt_all(rows)


def _rate(settings: Settings, build: Any, batch: int, peak: float) -> dict[str, Any]:
    run, training_step, batches_of = build()
    steps, plan, batches = itertools.count(), subject.batch_plan(batch), batches_of(batch)
    step = lambda: make_update(run, next(steps), plan, batches, training_step)  # noqa: E731
    per_image = flops.counted(step) / batch
    trained = sum(p.numel() for p in run.averages.parameters)
    all_of_it = sum(p.numel() for p in run.network.parameters())
    found = speed.rate(settings, step, batch)
    sizes = {"parameters": all_of_it, "trained_parameters": trained}
    speed.free(run, settings)
    return sizes | found | flops.share(found["step"]["images_per_second"], per_image, peak)


def sdxl_lora(settings: Settings) -> Built:
    """The script for LoRA of Stable Diffusion XL at 1024 pixels."""
    subject.require("peft")
    family, dtype = StableDiffusionXL(), torch.bfloat16
    args = TextToImageLoraSDXL().parse(
        ["--pretrained_model_name_or_path", "random", "--rank", str(RANK), *subject.CURRICULUM],
        machine=False,
    )
    tiny: dict[str, Any] = family.tiny()
    with torch.device(settings.device):
        unet: Any = tiny["unet"] if settings.smoke else UNet2DConditionModel(**SDXL)
    unet.to(settings.device, dtype).train()
    models = Components(unet, tiny["vae"])
    targets = {family.network: family.adapter_targets(unet.config)}
    averages = Averages(add_adapters(args, {family.network: unet}, targets, 0))
    accelerator = subject.new_accelerator(settings.device, "bf16")
    network: Any = CaptionedNetwork(family, models, [])
    scheduler = subject.stable_diffusion_scheduler()
    parts: dict[str, Any] = {"family": family, "models": models, "averages": averages}
    run = subject.text_to_image_run(accelerator, args, scheduler, network=network, **parts)
    side, width = unet.config["sample_size"], unet.config["cross_attention_dim"]
    sizes = 6 * unet.config["addition_time_embed_dim"]
    pooled = unet.config["projection_class_embeddings_input_dim"] - sizes
    caption = {
        "encoder_hidden_states": torch.randn(1, 77, width).to(dtype),
        "text_embeds": torch.randn(1, pooled).to(dtype),
    }
    run = subject.knowing(run, {CAPTION: caption})
    time_ids = torch.tensor([8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side])
    channels = unet.config["in_channels"]
    latents, told = (channels, side, side), {"time_ids": time_ids}
    batches = partial(cached_batches, latents=latents, told=told, pinned=settings.cuda)
    return run, import_module(SDXL_STEP).training_step, batches


def dit(settings: Settings) -> Built:
    """The class-conditional script with a DiT-XL/2 on latents of 32 x 32,
    those of 256 pixels."""
    name, side = ("DiT-S/8", 8) if settings.smoke else ("DiT-XL/2", 32)
    task = ClassConditional()
    flags = ["--model_config", name, "--dataset_name", "random", *subject.CURRICULUM]
    args = task.parse(flags, machine=False)
    task.choose(args, 0)
    network = build_network(name, channels=4, sample_size=side, num_classes=1000)
    network.to(settings.device).train()
    pixels = LatentSpace.of(None)
    task.models = ImageModels(network, pixels, pixels)
    accelerator, averages = subject.new_accelerator(settings.device, "bf16"), Averages(network)
    common = subject.common_parts(accelerator, args, network, averages)
    job: Any = None
    run = task.make_run(job, **common)
    latents, told = (4, side, side), {"label": torch.zeros((), dtype=torch.int64)}
    batches = partial(cached_batches, latents=latents, told=told, captions=(), pinned=settings.cuda)
    return run, import_module(DIT_STEP).training_step, batches
