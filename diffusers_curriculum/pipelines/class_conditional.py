"""Images of given classes with any network, latents and scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_curriculum.models.networks import null_class, takes_labels
from diffusers_curriculum.pipelines.class_names import ClassNames
from diffusers_curriculum.pipelines.denoising import (
    Generators,
    Guidance,
    Request,
    generate,
    the_network,
)
from diffusers_curriculum.pipelines.self_contained import SelfContained


class ClassConditionalPipeline(SelfContained, ClassNames, DiffusionPipeline):
    """Images of given classes; like DiTPipeline, but for any network, latents and scheduler.

    The null class of the guidance is the network's own, and the first noise is drawn on the CPU.

    Args:
        scheduler: any diffusers scheduler: variance preserving, flow matching or EDM.
        transformer, unet: one of them: a DiTTransformer2DModel, or a UNet2DModel with class
            embeddings whose last row is the null class.
        vae: an AutoencoderKL, VQModel or ViTVQModel; None: the network works in pixels.
        id2label: class number to name, as in DiTPipeline: synonyms with commas between them.

    Raises:
        ValueError: no network or two, a network without labels, class numbers it does not have.
    """

    model_cpu_offload_seq = "transformer->unet->vae"
    _optional_components = ["transformer", "unet", "vae"]  # noqa: RUF012

    def __init__(
        self,
        scheduler: SchedulerMixin,
        transformer: ModelMixin | None = None,
        unet: ModelMixin | None = None,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
    ) -> None:
        super().__init__()
        network = the_network(transformer, unet)
        if not takes_labels(network):
            raise ValueError(
                f"this {type(network).__name__} takes no class labels: use UnconditionalPipeline."
            )
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet, vae=vae)
        self._register_names(id2label, null_class(network))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        guidance_scale: float = 4.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Return one image per class label.

        Args:
            class_labels: class numbers or names; the network's null class gives an image of any.
            guidance_scale: strength of classifier-free guidance; 1 or less switches it off.
            generator: one, or one per image; on the CPU, images do not depend on the device.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), all in [0, 1], or "latent"
                (scaled).
            guidance_interval: the part of the steps that is guided, 0 = first, 1 = end.

        Raises:
            ValueError: unknown labels, no steps, a list of generators of another length.
        """
        guidance = Guidance(guidance_scale, guidance_interval)
        null = null_class(the_network(self.transformer, self.unet))
        labels = torch.tensor(self._classes(class_labels, null), device=self._execution_device)
        request = Request(len(labels), generator, num_inference_steps, output_type)
        images = generate(self, request, labels, guidance)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
