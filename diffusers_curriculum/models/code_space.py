"""Images as grids of codes, and back: what an autoencoder with a codebook tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.models.latent_space import LatentSpace

WITH_CODEBOOK = ("ViTVQModel", "VQModel")


@dataclass(frozen=True, eq=False)
class CodeSpace:
    """The codes of a ViTVQModel or a VQModel.

    Attributes:
        space: its continuous latents.
    """

    space: LatentSpace

    @classmethod
    def of(cls, space: LatentSpace) -> CodeSpace:
        """The codes of a latent space; a ValueError refuses an autoencoder without a codebook."""
        if space.kind not in WITH_CODEBOOK:
            raise ValueError(
                f"{space.kind} has no codebook: give an autoencoder that has one, "
                f"{' or '.join(WITH_CODEBOOK)}."
            )
        return cls(space)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        config = self.space.model.config
        return config["codebook_size" if self.space.kind == "ViTVQModel" else "num_vq_embeddings"]

    @property
    def positions(self) -> int | None:
        """Codes of an image; None where it may have any number."""
        if self.space.kind != "ViTVQModel":
            return None
        return (self.space.model.config.image_size // self.space.downsampling) ** 2

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The codes (B, h, w) int64 of images (B, 3, H, W) in [-1, 1], on the model's device."""
        return torch.cat([self._encode(part) for part in self._parts(pixels)])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32, about in [-1, 1], of codes (B, h, w)."""
        parts = codes.split(self.space.batch_size)
        return torch.cat([self._decode(part).float() for part in parts])

    def _parts(self, pixels: Tensor) -> list[Tensor]:
        return list(pixels.to(self.space.model.dtype).split(self.space.batch_size))

    def _encode(self, pixels: Tensor) -> Tensor:
        model: Any = self.space.model
        latents = model.encode(pixels, return_dict=False)[0]
        if self.space.kind == "ViTVQModel":
            return model.indices(latents)
        found = model.quantize(latents)[2][2]
        return found.reshape(len(latents), *latents.shape[2:])

    def _decode(self, codes: Tensor) -> Tensor:
        model: Any = self.space.model
        if self.space.kind == "ViTVQModel":
            vectors = model.quantise.codebook()[codes].permute(0, 3, 1, 2)
        else:
            shape = (*codes.shape, self.space.channels)
            vectors = model.quantize.get_codebook_entry(codes.flatten(), shape)
        return model.decode(vectors.to(model.dtype), force_not_quantize=True, return_dict=False)[0]
