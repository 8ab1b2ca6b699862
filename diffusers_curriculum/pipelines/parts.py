"""What the pipelines share: finding the network, and the way from noise to images."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from diffusers_curriculum.pipelines.denoising import (
    Generators,
    Guidance,
    check_output_type,
    denoise,
    initial_noise,
    predictor,
    to_images,
)


class Request(NamedTuple):
    """How many images, from which generators, in how many steps, and in which form."""

    count: int
    generator: Generators
    steps: int
    output_type: str


def the_network(transformer: Any, unet: Any) -> Any:
    """Return the one network that is there.

    Raises:
        ValueError: none, or two.
    """
    if (transformer is None) == (unet is None):
        count = "no network" if unet is None else "two networks"
        raise ValueError(f"{count}: give a transformer or a unet, one of them.")
    return unet if transformer is None else transformer


def input_shape(network: Any) -> tuple[int, int, int]:
    """Return (channels, height, width) of what a network denoises."""
    size = network.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return network.config["in_channels"], height, width


def generate(
    pipeline: Any,
    request: Request,
    labels: Tensor | None = None,
    guidance: Guidance | None = None,
) -> Any:
    """Return images of a pipeline with `scheduler`, `transformer` or `unet`, and `vae`."""
    check_output_type(request.output_type)
    network = the_network(pipeline.transformer, pipeline.unet)
    shape = input_shape(network)
    patch = network.config.get("patch_size") or 1
    latents = denoise(
        predictor(network, labels, guidance),
        pipeline.scheduler,
        initial_noise((request.count, *shape), request.generator, pipeline._execution_device),
        request.steps,
        request.generator,
        pipeline.progress_bar,
        tokens=shape[1] * shape[2] // patch**2,
    )
    images = to_images(latents, pipeline.vae, request.output_type)
    pipeline.maybe_free_model_hooks()
    return images
