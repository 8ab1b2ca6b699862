"""A perceptual distance over the features of any vision model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

# Where a model does not say how it wants its pixels: ImageNet's statistics.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
        """Load a transformers vision model from a local folder or the Hub, safetensors only.

        Raises:
            ValueError: it cannot be loaded, or is no vision model with an image size.
        """
        from transformers import AutoModel

        try:
            network: Any = AutoModel.from_pretrained(
                name, cache_dir=cache_dir, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, ImportError) as error:
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
        settings = _preprocessing(name, cache_dir)
        size = getattr(network.config, "image_size", None) or settings.get("size", 224)
        return cls(network, size, *(settings.get(k, d) for k, d in _DEFAULTS))

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


_DEFAULTS = (("image_mean", _MEAN), ("image_std", _STD))


def _preprocessing(name: str, cache_dir: str | None) -> dict[str, Any]:
    """Mean, std and side from the model's preprocessor config, as far as it has them."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name, cache_dir=cache_dir)
    except OSError:  # the model brings none
        return {}
    size = found.pop("size", None)
    side = size if isinstance(size, int) else next(iter((size or {}).values()), None)
    known = {key: tuple(found[key]) for key, _ in _DEFAULTS if found.get(key)}
    return known | ({"size": int(side)} if side else {})
