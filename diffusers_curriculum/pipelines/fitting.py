"""The pipeline to save a trained network in: diffusers' own where it fits."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)

from diffusers_curriculum.models.network_config import DIT_PIPELINE_CLASSES
from diffusers_curriculum.models.networks import learns_variance, takes_labels
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.pipelines.class_conditional import ClassConditionalPipeline
from diffusers_curriculum.pipelines.denoising import LEARNED_VARIANCE
from diffusers_curriculum.pipelines.unconditional import UnconditionalPipeline


def fitting_pipeline(
    network: Any, vae: Any, scheduler: Any, id2label: dict[int, str] | None = None
) -> Any:
    """Return the pipeline of a trained network: diffusers' own where it would be right.

    With `id2label` it is class-conditional: DiTPipeline, or ClassConditionalPipeline where that
    would fail or draw other images (its null class is 1000, it decodes with an AutoencoderKL
    without a shift, and its schedulers start from noise of variance 1); the saved pipeline keeps
    the names. Without, it is unconditional: DDPMPipeline (a UNet2DModel in pixels with a
    DDPMScheduler), or UnconditionalPipeline.

    Args:
        network: a DiTTransformer2DModel or a UNet2DModel; one without labels and names for them is
            a ValueError.
        vae: None in pixels.
    """
    place = "transformer" if _is_dit(network) else "unet"
    parts = {"scheduler": scheduler, "vae": vae, place: network}
    if id2label is None:
        fits = _fits_ddpm_pipeline(network, vae, scheduler)
        return DDPMPipeline(network, scheduler) if fits else UnconditionalPipeline(**parts)
    if not _fits_dit_pipeline(network, vae, scheduler, id2label):
        return ClassConditionalPipeline(id2label=id2label, **parts)
    pipeline = DiTPipeline(network, vae, scheduler, id2label=id2label)
    pipeline.register_to_config(id2label=id2label)  # or saving would lose it
    return pipeline


def _fits_ddpm_pipeline(network: Any, vae: Any, scheduler: Any) -> bool:
    plain = isinstance(network, UNet2DModel) and not takes_labels(network) and vae is None
    noise = type(scheduler) is DDPMScheduler
    return plain and noise and learns_variance(network) == _learned(scheduler)


def _is_dit(network: Any) -> bool:
    return isinstance(network, DiTTransformer2DModel)


def _learned(scheduler: Any) -> bool:
    return scheduler.config.get("variance_type") in LEARNED_VARIANCE


def _fits_dit_pipeline(network: Any, vae: Any, scheduler: Any, names: dict[Any, str]) -> bool:
    if not (_is_dit(network) and isinstance(vae, AutoencoderKL)):
        return False
    dit, kl = network.config, vae.config
    outputs = dit["out_channels"] in (dit["in_channels"], 2 * dit["in_channels"])
    classes = dit["num_embeds_ada_norm"] == DIT_PIPELINE_CLASSES
    shifted = kl.get("shift_factor") or kl.get("latents_mean") is not None
    numbers = all(0 <= int(label) < DIT_PIPELINE_CLASSES for label in names)
    return outputs and classes and numbers and not shifted and _plain(scheduler)


def _plain(scheduler: Any) -> bool:
    """Whether DiTPipeline's loop is right for a scheduler."""
    if not hasattr(scheduler, "scale_model_input") or _learned(scheduler):
        return False
    unit = float(getattr(scheduler, "init_noise_sigma", 0.0)) == 1.0
    return unit and NoiseLevels.from_scheduler(scheduler).family == "vp"
