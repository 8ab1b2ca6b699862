"""Images without any condition, with any network, latents and scheduler."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_curriculum.models.networks import null_class, takes_labels
from diffusers_curriculum.pipelines.denoising import Generators, Request, generate, the_network
from diffusers_curriculum.pipelines.self_contained import SelfContained


class UnconditionalPipeline(SelfContained, DiffusionPipeline):
    """Images without any condition; like DDPMPipeline, but for any latents and scheduler.

    A network that takes labels is given its null class. The first noise is drawn on the CPU. No
    network, or two, are a ValueError.

    Args:
        scheduler: any diffusers scheduler: variance preserving, flow matching or EDM.
        transformer, unet: one of them: a DiTTransformer2DModel or a UNet2DModel.
        vae: an AutoencoderKL, VQModel or ViTVQModel; None: the network works in pixels.
    """

    model_cpu_offload_seq = "transformer->unet->vae"
    _optional_components = ["transformer", "unet", "vae"]  # noqa: RUF012

    def __init__(
        self,
        scheduler: SchedulerMixin,
        transformer: ModelMixin | None = None,
        unet: ModelMixin | None = None,
        vae: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        the_network(transformer, unet)
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Return `batch_size` images.

        Args:
            generator: one, or one per image; on the CPU, images do not depend on the device.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), all in [0, 1], or "latent"
                (scaled).

        Raises:
            ValueError: no images, no steps, a list of generators of another length.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} makes no image: give 1 or more.")
        network = the_network(self.transformer, self.unet)
        labels = None
        if takes_labels(network):
            labels = torch.full((batch_size,), null_class(network), device=self._execution_device)
        request = Request(batch_size, generator, num_inference_steps, output_type)
        images = generate(self, request, labels)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
