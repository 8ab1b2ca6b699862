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
from diffusers_curriculum.pipelines.denoising import (
    Generators,
    Guidance,
    Request,
    generate,
    the_network,
)
from diffusers_curriculum.pipelines.self_contained import SelfContained


class ClassConditionalPipeline(SelfContained, DiffusionPipeline):
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
        _check_labels(the_network(transformer, unet), id2label)
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet, vae=vae)
        self.register_to_config(id2label=id2label)
        known = self._names().items()
        pairs = sorted((name.strip(), label) for label, names in known for name in names.split(","))
        self.labels: dict[str, int] = dict(pairs)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return the classes of one name or several: a whole label, or one of its synonyms; a
        ValueError refuses a name that no class has, or several have."""
        return [self._label_id(name) for name in ([label] if isinstance(label, str) else label)]

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
        labels = torch.tensor(self._classes(class_labels), device=self._execution_device)
        request = Request(len(labels), generator, num_inference_steps, output_type)
        images = generate(self, request, labels, guidance)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _names(self) -> dict[int, str]:
        return {int(label): name for label, name in (self.config["id2label"] or {}).items()}

    def _label_id(self, name: str) -> int:
        known = self._names().items()
        whole = [label for label, names in known if names == name]
        found = whole or [n for n, names in known if name in map(str.strip, names.split(","))]
        if len(found) != 1:
            some = ", ".join(list(self.labels)[:20]) or "none: the pipeline has no id2label"
            raise ValueError(
                f"{name!r} is the name of {len(found)} classes {found}: give the number of one, or "
                f"another name (known: {some})."
            )
        return found[0]

    def _classes(self, labels: int | str | Sequence[int | str] | Tensor) -> list[int]:
        if isinstance(labels, Tensor):
            labels = labels.reshape(-1).tolist()
        given = [labels] if isinstance(labels, int | str) else list(labels)
        ids = [self._label_id(one) if isinstance(one, str) else int(one) for one in given]
        null = null_class(the_network(self.transformer, self.unet))
        allowed = {*(self._names() or range(null)), null}
        wrong = [label for label in ids if label not in allowed]
        if wrong or not ids:
            raise ValueError(
                f"class_labels={given}: {wrong or 'nothing'} is no class of this pipeline: give "
                f"some of {min(allowed)} to {max(allowed - {null}, default=null)}, or {null} for "
                "an image of any class."
            )
        return ids


def _check_labels(network: Any, id2label: dict[int, str] | None) -> None:
    if not takes_labels(network):
        raise ValueError(
            f"this {type(network).__name__} takes no class labels: use UnconditionalPipeline."
        )
    null = null_class(network)
    wrong = [label for label in id2label or {} if not 0 <= int(label) < null]
    if wrong:
        raise ValueError(
            f"id2label names the classes {wrong}, and the network has 0 to {null - 1}: give it the "
            "names of these only."
        )
