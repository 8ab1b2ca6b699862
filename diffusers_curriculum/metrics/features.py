"""Networks that turn images into feature vectors, from the Hub or a local folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from diffusers_curriculum.metrics.choices import DINOV2, INCEPTION
from diffusers_curriculum.metrics.preprocessing import DINOV2_PREPROCESSING, FeatureNetworkError


class FeatureNetwork:
    """A frozen network in eval mode.

    Args:
        name: for messages and records.
        module: (B, 3, H, W) uint8 images to (B, dim) features, preprocessing included.

    Raises:
        FeatureNetworkError: the module does not turn images into vectors.
    """

    def __init__(
        self, name: str, module: nn.Module, device: torch.device | str = "cpu", batch_size: int = 64
    ) -> None:
        self.name, self.batch_size, self.dim = name, batch_size, 0
        self.module = module.eval().requires_grad_(False)
        self.dim = self.to(device)._probe()

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, dim) float32 features, on the network's device, of images (B, 3, H, W): uint8,
        or floating in [0, 1], which is rounded to 8 bits, as what is judged is the picture that
        would be saved. A ValueError refuses another shape or type."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; give (B, 3, H, W)")
        if not len(images):
            return torch.empty(0, self.dim, device=self.device)
        batches = eight_bit(images).split(self.batch_size)
        # Mixed precision of the training must not reach in here.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return torch.cat([self.module(batch.to(self.device)).float() for batch in batches])

    def to(self, device: torch.device | str) -> FeatureNetwork:
        """Move to a device; returns itself."""
        self.module.to(device)
        self.device = torch.device(device)
        return self

    def _probe(self) -> int:
        """The number of features, found out with a black image."""
        try:
            features = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        except (RuntimeError, ValueError, TypeError) as error:
            raise FeatureNetworkError(
                f"the feature network {self.name} cannot look at an image: {error}. Its "
                "preprocessor_config.json must resize images to what it takes."
            ) from error
        if features.ndim != 2:
            raise FeatureNetworkError(
                f"the feature network {self.name} gives {tuple(features.shape)} for one image, "
                "not one vector: give an image classifier or a vision encoder."
            )
        return features.shape[1]


def eight_bit(images: Tensor) -> Tensor:
    """Return uint8 images; floating ones in [0, 1] are clamped, times 255 and rounded, and a
    ValueError refuses another type."""
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; give uint8, or floating in [0, 1]")
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def load_feature_network(
    name_or_path: str, *, inception_weights: str | None = None
) -> FeatureNetwork:
    """Load a network to compute metrics with, on the CPU.

    Args:
        name_or_path: "inception"; or a transformers vision model in safetensors, by its name on
            the Hub or its folder, of which the input of the classifier is taken, or without a
            classifier the pooled output or the CLS token.
        inception_weights: file with the published Inception weights, instead of a download.

    Raises:
        FeatureNetworkError: what is missing, and the remedy.
    """
    # Both load what the other does not need.
    if name_or_path == INCEPTION and not Path(name_or_path).is_dir():
        from diffusers_curriculum.metrics.inception import load_inception

        return FeatureNetwork(INCEPTION, load_inception(inception_weights))
    from diffusers_curriculum.metrics.vision_models import load_vision_model

    fixed = DINOV2_PREPROCESSING if name_or_path == DINOV2 else None
    return FeatureNetwork(name_or_path, load_vision_model(name_or_path, fixed))
