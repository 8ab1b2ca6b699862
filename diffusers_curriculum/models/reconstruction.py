"""How far a reconstruction is from its image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from diffusers_curriculum.models.loading import load_whole

_EDGE = 0.1  # epsilon of arXiv 2102.12092, appendix A.3
# Where a model does not say how it wants its pixels: ImageNet's statistics.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def logit_laplace_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean negative log-likelihood under a logit-Laplace law (arXiv 2102.12092; in 2110.04627).

    If logit(y) has a Laplace law of centre m and width b, then y in (0, 1) has the density

        f(y) = exp(-|logit(y) - m| / b) / (2 b y (1 - y))

    because d logit(y) / dy = 1 / (y (1 - y)). Pixels x in [-1, 1] are moved off the ends of (0, 1)
    by y = (1 - 2 e) (x + 1) / 2 + e with e = 0.1. A decoder with one output per pixel gives the
    median and no width: m = logit(y of the reconstruction), b = 1. What is left of -log f, without
    the terms that do not depend on the reconstruction, is

        mean |logit(y) - logit(y_reconstruction)|

    Both are (B, C, H, W) in [-1, 1]; the reconstruction may leave this range, and no gradient comes
    from where it leaves it by more than 0.2.
    """
    pixels = (reconstruction.float().clamp(-1.2, 1.2), images.float().clamp(-1.2, 1.2))
    ours, theirs = (torch.logit((1 - 2 * _EDGE) * (x + 1) / 2 + _EDGE) for x in pixels)
    return (ours - theirs).abs().mean()


def squared_errors(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error (B,) of images in [-1, 1], the reconstruction clipped to that."""
    error = reconstruction.float().clamp(-1, 1) - images.float()
    return error.square().flatten(1).mean(1)


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels: 10 log10(2^2 / mean squared error), pixels in
    [-1, 1] having the peak-to-peak range 2."""
    return 10 * torch.log10(4.0 / squared_error)


class PerceptualDistance(nn.Module):
    """Mean over layers l of |f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)||^2 per place (arXiv 1801.03924).

    f_l are hidden states, divided at each place by their length over the channels. The learned
    weights of LPIPS are left out: they belong to networks that need torchvision.

    Args:
        network: a transformers vision model that gives hidden states (B, N, C) or (B, C, H, W).
        size: side that images are resized to.
        mean, std: of the pixels in [0, 1] that the model wants.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Any,
        size: int,
        mean: tuple[float, ...] = _MEAN,
        std: tuple[float, ...] = _STD,
    ) -> None:
        super().__init__()
        self.network, self.size = network.eval().requires_grad_(False), size
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    @classmethod
    def from_pretrained(cls, name: str, cache_dir: str | None = None) -> PerceptualDistance:
        """Load a transformers vision model from a local folder or the Hub, safetensors only; a
        ValueError says that it cannot be loaded, or is no vision model."""
        from transformers import AutoModel

        try:
            network, _ = load_whole(
                AutoModel,
                name,
                may_lack=("pooler.",),  # hidden states are compared
                cache_dir=cache_dir,
                dtype=torch.float32,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise ValueError(
                f"the perceptual model {name!r} cannot be loaded ({reason}). Give the folder or "
                "Hub id of a vision model of transformers with safetensors weights."
            ) from error
        network = getattr(network, "vision_model", network)  # CLIP's and SigLIP's image half
        if getattr(network, "main_input_name", None) != "pixel_values":
            raise ValueError(
                f"the perceptual model {name!r} is a {type(network).__name__}, which takes no "
                "images: give a vision model, such as facebook/dinov2-small."
            )
        settings: dict[str, Any] = {"size": 224} | _preprocessing(name, cache_dir)
        settings["size"] = getattr(network.config, "image_size", None) or settings["size"]
        return cls(network, **settings)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """The distance (), of images (B, 3, H, W) in [-1, 1]; the gradient goes to the first."""
        ours = self._features(reconstruction)
        with torch.no_grad():
            theirs = self._features(images)
        distances = [(a - b).square().sum(-1).mean() for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        """One (B, places, C) of unit vectors per layer, the embedding of the pixels left out."""
        pixels = interpolate(
            (images.float() + 1) / 2, (self.size, self.size), mode="bicubic", antialias=True
        )
        pixels = (pixels - self.mean) / self.std
        states = self.network(pixel_values=pixels, output_hidden_states=True).hidden_states
        flat = (s.flatten(2).transpose(1, 2) if s.ndim == 4 else s for s in states[1:])
        return [normalize(state.float(), dim=-1) for state in flat]


def _preprocessing(name: str, cache_dir: str | None) -> dict[str, Any]:
    """Mean, std and side from the model's preprocessor config, as far as it has them."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name, cache_dir=cache_dir)
    except OSError:  # the model brings none
        return {}
    size = found.pop("size", None)
    side = size if isinstance(size, int) else next(iter((size or {}).values()), None)
    names = [name for name in ("mean", "std") if found.get(f"image_{name}")]
    known: dict[str, Any] = {name: tuple(found[f"image_{name}"]) for name in names}
    return known | ({"size": int(side)} if side else {})
