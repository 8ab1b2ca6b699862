"""Images drawn code by code, by a causal language model and an autoencoder with a codebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from diffusers_curriculum.checks import one_of
from diffusers_curriculum.models.code_space import CodeSpace
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.pipelines.class_names import ClassNames
from diffusers_curriculum.pipelines.denoising import Generators, images_of
from diffusers_curriculum.pipelines.self_contained import SelfContained

CODE_OUTPUT_TYPES = ("pil", "np", "pt", "codes")


@dataclass(frozen=True)
class Choice:
    """How a code is chosen by the logits of all.

    Attributes:
        guidance: classifier-free: logits(null) + guidance (logits(class) - logits(null)); 1 or
            less switches it off.
        temperature: what logits are divided by; below 1, likely codes become more likely.
        top_k: how many of the likeliest are in the choice; None: all.
        top_p: the least total probability of those in the choice, likeliest first; None: 1.

    Raises:
        ValueError: a number out of range.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        self.warpers()

    def warpers(self) -> LogitsProcessorList:
        """What changes logits, one after another."""
        found: list[Any] = [TemperatureLogitsWarper(float(self.temperature))]
        found += [] if self.top_k is None else [TopKLogitsWarper(self.top_k)]
        found += [] if self.top_p is None else [TopPLogitsWarper(float(self.top_p))]
        return LogitsProcessorList(found)

    def codes(self, logits: Tensor, u: Tensor) -> Tensor:
        """The codes (B,) that numbers u (B,) in [0, 1) choose, of logits (B, K), or of (2 B, K)
        where the second half is of no class: through the inverse of the cumulative probability."""
        if self.guidance > 1:
            logits, without = logits.chunk(2)
            logits = without + self.guidance * (logits - without)
        nothing: Any = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
        mass = self.warpers()(nothing, logits).softmax(-1).to(u.dtype).cumsum(-1)
        total = mass[:, -1:]
        points = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(mass, points, right=True)[:, 0]


@torch.no_grad()
def draw_codes(
    transformer: Any,
    labels: Tensor,
    u: Tensor,
    choice: Choice,
    progress_bar: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Tensor:
    """Draw images (B, N) code by code; keys and values of those before are kept.

    Args:
        transformer: an ImageTokenTransformer.
        labels: (B,) classes.
        u: (B, N) in [0, 1), by which the codes are chosen.
    """
    guided = choice.guidance > 1
    if guided:
        labels = torch.cat([labels, transformer.no_class(labels)])
    tokens, cache, codes = transformer.first_tokens(labels), None, []
    for position in progress_bar(range(u.shape[1])):
        logits, cache = transformer.following(tokens, cache)
        codes.append(choice.codes(logits, u[:, position]))
        tokens = codes[-1].repeat(1 + guided)[:, None]
    return torch.stack(codes, 1)


def uniform_numbers(shape: tuple[int, int], generator: Generators, device: Any) -> Tensor:
    """Return (B, N) numbers in [0, 1) on ``device``, drawn where the generator is, or by torch's
    global one; a ValueError refuses a list of generators of another length than the batch."""
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    if not isinstance(generator, list):
        source = None if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(
            f"{len(generator)} generators for {shape[0]} images: give one, or one per image."
        )
    each = (torch.rand(shape[1], generator=g, device=g.device, dtype=dtype) for g in generator)
    return torch.stack([numbers.to(device) for numbers in each])


class ImageTokenPipeline(SelfContained, ClassNames, DiffusionPipeline):
    """Images whose codes are drawn one after another in raster order (arXiv 2110.04627).

    The numbers that codes are chosen by are drawn on the CPU.

    Args:
        transformer: an ImageTokenTransformer.
        vae: a ViTVQModel or VQModel with its codes.
        id2label: class number to name, as in DiTPipeline: synonyms with commas between them.

    Raises:
        ValueError: an autoencoder without a codebook, or with another one than the transformer's;
            names of classes that there are not.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self, transformer: ModelMixin, vae: ModelMixin, id2label: dict | None = None
    ) -> None:
        super().__init__()
        config: Any = transformer.config
        space, (known, places) = CodeSpace.of(LatentSpace.of(vae)), _sizes(config)
        if space.codebook_size != known or space.positions not in (places, None):
            raise ValueError(
                f"the transformer knows {known} codes in {places} places, and the autoencoder has "
                f"{space.codebook_size} in {space.positions or 'any'}: give the one that it was "
                "trained with."
            )
        self.register_modules(transformer=transformer, vae=vae)
        self._register_names(id2label, config["num_classes"])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        batch_size: int = 1,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Return one image per class label, or `batch_size` images of any class.

        Args:
            class_labels: class numbers or names; None: images of any class.
            guidance_scale: strength of classifier-free guidance; 1 or less switches it off.
            temperature: below 1, likely codes become more likely.
            top_k: draw among that many of the likeliest codes; None: among all.
            top_p: draw among the likeliest codes that have this probability together; None: all.
            generator: one, or one per image; on the CPU, images do not depend on the device.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), all in [0, 1], or "codes"
                (B, h, w).

        Raises:
            ValueError: unknown labels, no images, a number out of range, a list of generators of
                another length.
        """
        one_of("output_type", output_type, CODE_OUTPUT_TYPES)
        if class_labels is None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} makes no image: give 1 or more.")
        model: Any = self.transformer
        null, device = model.null_class, self._execution_device
        given = [null] * batch_size if class_labels is None else self._classes(class_labels, null)
        labels = torch.tensor(given, device=device)
        scale = 1.0 if class_labels is None else guidance_scale  # without a class to be guided to
        choice = Choice(scale, temperature, top_k, top_p)
        u = uniform_numbers((len(given), _sizes(model.config)[1]), generator, device)
        bar: Any = self.progress_bar
        codes = draw_codes(model, labels, u, choice, bar)
        codes = codes.unflatten(1, self._grid())
        decoded: Any = codes
        if output_type != "codes":
            decoded = images_of(CodeSpace.of(LatentSpace.of(self.vae)).decode(codes), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=decoded) if return_dict else (decoded,)

    def _grid(self) -> tuple[int, int]:
        """Rows and columns of codes: those of a square image."""
        side = round(_sizes(self.transformer.config)[1] ** 0.5)
        return side, side


def _sizes(config: Any) -> tuple[int, int]:
    """How many codes there are, and how many an image has."""
    return config["codebook_size"], config["num_positions"]
