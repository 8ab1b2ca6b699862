"""What the pipelines share: from noise to latents with any diffusers scheduler, and to images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils.pil_utils import numpy_to_pil
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_curriculum.checks import one_of
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.models.networks import null_class

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LEARNED_VARIANCE = ("learned", "learned_range")
Generators = torch.Generator | list[torch.Generator] | None
Predict = Callable[[Tensor, Tensor, float], Tensor]


class Request(NamedTuple):
    """How many images, from which generators, in how many steps, and in which form."""

    count: int
    generator: Generators
    steps: int
    output_type: str


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): `p(null) + scale * (p(label) - p(null))`.

    Attributes:
        scale: 1 or less switches it off.
        interval: the part of the steps it is used in, 0 = first and noisiest, 1 = end
            (arXiv 2404.07724).

    Raises:
        ValueError: an interval that is not inside [0, 1], or runs backwards.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        start, stop = self.interval
        if not 0.0 <= start <= stop <= 1.0:
            raise ValueError(
                f"guidance_interval={self.interval} is no part of the steps: give two numbers from "
                "0 (first step) to 1 (end), the smaller one first."
            )

    def at(self, progress: float) -> bool:
        """Whether the step that starts at `progress` in [0, 1) is guided."""
        return self.scale > 1.0 and self.interval[0] <= progress < self.interval[1]


def predictor(
    network: Any, labels: Tensor | None = None, guidance: Guidance | None = None
) -> Predict:
    """Return `predict(latents, timesteps, progress)`, guided; in the network's dtype inside.

    ``labels`` are (B,) int64, None for a network that takes none. Where the network learns a
    variance, only its prediction is guided; the variance is the label's.
    """
    guidance = guidance or Guidance()

    def call(latents: Tensor, timesteps: Tensor, classes: Tensor | None) -> Tensor:
        extra = {} if classes is None else {"class_labels": classes}
        return network(latents.to(network.dtype), timesteps, return_dict=False, **extra)[0].float()

    def predict(latents: Tensor, timesteps: Tensor, progress: float) -> Tensor:
        if labels is None or not guidance.at(progress):
            return call(latents, timesteps, labels)
        both = torch.cat([labels, torch.full_like(labels, null_class(network))])
        outputs = call(torch.cat([latents] * 2), torch.cat([timesteps] * 2, -1), both)
        with_label, without = outputs.chunk(2)
        channels = latents.shape[1]
        null = without[:, :channels]
        guided = null + guidance.scale * (with_label[:, :channels] - null)
        return torch.cat([guided, with_label[:, channels:]], dim=1)

    return predict


def initial_noise(
    shape: tuple[int, ...], generator: Generators, device: torch.device | str
) -> Tensor:
    """Return standard normal noise, float32, drawn where the generator is; without one, from
    torch's global one on the CPU, so that images do not depend on the device. A ValueError refuses
    a list of generators of another length than the batch."""
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(
            f"{len(generator)} generators for {shape[0]} images: give one, or one per image."
        )
    first = generator[0] if isinstance(generator, list) else generator
    source = torch.device("cpu") if first is None else first.device
    return randn_tensor(shape, generator=generator, device=source).to(device)


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: Any,
    noise: Tensor,
    num_inference_steps: int,
    generator: Generators = None,
    progress_bar: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    tokens: int | None = None,
    two_times: bool = False,
) -> Tensor:
    """Return the latents at the end of the scheduler's way from noise, float32.

    Args:
        predict: the network, see :func:`predictor`; called with the input as the scheduler scales
            it, (B,) or (2, B) timesteps and how far the way is done.
        noise: (B, C, h, w) standard normal.
        generator: for schedulers that add noise in between.
        tokens: of the network's input, for a flow schedule with `use_dynamic_shifting`; None: h*w.
        two_times: the network is told (2, B) the time and how far the step goes, as one that gives
            the average velocity between is (arXiv 2505.13447).

    Raises:
        ValueError: no steps, a scheduler without `step`, one that needs a learned variance from a
            network without one, one without straight steps for a network of two times, or a network
            whose output has another number of channels.
    """
    if not hasattr(scheduler, "step"):
        raise ValueError(f"{type(scheduler).__name__} has no step(): choose another scheduler.")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps} does nothing: give 1 or more.")
    scheduler, uses_variance = _with_usable_variance(scheduler)
    settings: dict[str, Any] = _even_steps(scheduler, num_inference_steps) if two_times else {}
    if scheduler.config.get("use_dynamic_shifting"):
        settings["mu"] = _shift(scheduler.config, tokens or noise.shape[-2] * noise.shape[-1])
    scheduler.set_timesteps(num_inference_steps, device=noise.device, **settings)
    latents = noise.float() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    scale = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
    extra = {"generator": generator} if "generator" in _parameters(scheduler.step) else {}
    timesteps = scheduler.timesteps
    for index, t in enumerate(progress_bar(timesteps)):
        told = _batch_of(t, latents)
        if two_times:
            following = timesteps[index + 1 : index + 2].sum()  # 0 after the last
            told = torch.stack([told, told - _batch_of(following, latents)])
        output = predict(scale(latents, t), told, index / len(timesteps))
        output = _for_step(output, latents.shape[1], uses_variance)
        latents = scheduler.step(output, t, latents, return_dict=False, **extra)[0].float()
    return latents


def to_images(latents: Tensor, vae: Any, output_type: str) -> Any:
    """Decode latents to images in [0, 1]: "pil", "np" (B, H, W, C), "pt" (B, C, H, W); or "latent"
    for the scaled latents themselves."""
    if output_type == "latent":
        return latents
    return images_of(LatentSpace.of(vae).decode(latents), output_type)


def images_of(decoded: Tensor, output_type: str) -> Any:
    """Images (B, C, H, W) about in [-1, 1] as those in [0, 1] of an output type."""
    images = (decoded / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    arrays = images.cpu().permute(0, 2, 3, 1).numpy()
    return numpy_to_pil(arrays) if output_type == "pil" else arrays


def the_network(transformer: Any, unet: Any) -> Any:
    """Return the one network that is there; a ValueError says that there is none, or two."""
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
    pipeline: Any, request: Request, labels: Tensor | None = None, guidance: Guidance | None = None
) -> Any:
    """Return images of a pipeline with `scheduler`, `transformer` or `unet`, and `vae`."""
    one_of("output_type", request.output_type, OUTPUT_TYPES)
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
        two_times=getattr(network, "two_times", False),
    )
    images = to_images(latents, pipeline.vae, request.output_type)
    pipeline.maybe_free_model_hooks()
    return images


def _parameters(function: Any) -> Any:
    return inspect.signature(function).parameters


def _with_usable_variance(scheduler: Any) -> tuple[Any, bool]:
    """The scheduler, and whether its steps use a learned variance.

    Some schedulers that have no use for one cut the output to three channels where their config,
    taken over from another scheduler, speaks of it: these are made anew without it.
    """
    if scheduler.config.get("variance_type") not in LEARNED_VARIANCE:
        return scheduler, False
    variance = getattr(scheduler, "_get_variance", None)
    if variance is not None and "predicted_variance" in _parameters(variance):
        return scheduler, True
    return type(scheduler).from_config(scheduler.config, variance_type=None), False


def _even_steps(scheduler: Any, count: int) -> dict[str, Any]:
    """The settings of ``count`` steps of one length from noise to data, of a straight path."""
    known = _parameters(scheduler.set_timesteps)
    curved = {"beta_schedule", "sigma_data"} & set(scheduler.config)
    if curved or "sigmas" not in known:
        raise ValueError(
            f"{type(scheduler).__name__} does not go straight from one time to another, as a "
            "network of two times is meant for: take a FlowMatchEulerDiscreteScheduler."
        )
    return {"sigmas": torch.linspace(1.0, 1.0 / count, count).tolist()}


def _shift(config: Any, tokens: int) -> float:
    """The logarithm of the shift, linear in the number of tokens, as FLUX has it."""
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - fewest) / (most - fewest)


def _batch_of(timestep: Any, latents: Tensor) -> Tensor:
    timestep = torch.as_tensor(timestep)
    if timestep.is_floating_point():
        timestep = timestep.float()  # some devices have no float64
    return timestep.to(latents.device).expand(len(latents))


def _for_step(output: Tensor, channels: int, uses_variance: bool) -> Tensor:
    """What the scheduler's step takes: without the learned variance where it has no use for it."""
    found = output.shape[1]
    if found not in (channels, 2 * channels) or (uses_variance and found == channels):
        need = f"{2 * channels}" if uses_variance else f"{channels} or {2 * channels}"
        raise ValueError(
            f"the network gives {found} channels, and the scheduler needs {need}: a learned "
            "variance_type of a scheduler needs a network that learns the variance."
        )
    return output if uses_variance else output[:, :channels]
