"""ViT-VQGAN (arXiv 2110.04627): images as a small grid of unit vectors, and back.

A vision transformer turns patches into tokens, a linear layer shortens these to a few numbers, and
the nearest codes of a learned codebook stand for them; the decoder is its mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffusers_curriculum.checks import one_of, whole
from diffusers_curriculum.models.vector_quantiser import VectorQuantiser
from diffusers_curriculum.models.vision_transformer import Transformer, check_sizes

_SMALL = {"dim": 512, "depth": 8, "heads": 8, "mlp": 2048}
_BASE = {"dim": 768, "depth": 12, "heads": 12, "mlp": 3072}
_WIDE = {"dim": 1280, "depth": 32, "heads": 16, "mlp": 5120}
VIT_VQ_SIZES: Mapping[str, tuple[Mapping[str, int], Mapping[str, int]]] = {
    "small": (_SMALL, _SMALL),
    "base": (_BASE, _BASE),
    "large": (_SMALL, _WIDE),
}


def vit_vq_config(size: str, resolution: int = 256, **changes: Any) -> dict[str, Any]:
    """Arguments of :class:`ViTVQModel` for a published size, patches of 8 and 8,192 codes of 32,
    with `changes` to them; a ValueError for a size that is not in `VIT_VQ_SIZES`."""
    one_of("size", size, VIT_VQ_SIZES)
    encoder, decoder = VIT_VQ_SIZES[size]
    config: dict[str, Any] = {"image_size": resolution, "patch_size": 8, "in_channels": 3}
    config |= {f"encoder_{name}": value for name, value in encoder.items()}
    config |= {f"decoder_{name}": value for name, value in decoder.items()}
    return config | {"codebook_size": 8192, "codebook_dim": 32} | changes


@dataclass
class ViTVQEncoderOutput(BaseOutput):
    """Output of the encoder: continuous latents (B, codebook_dim, h, w) of length 1."""

    latents: Tensor


@dataclass
class ViTVQOutput(BaseOutput):
    """Output of decoder and autoencoder.

    Attributes:
        sample: (B, C, H, W), about [-1, 1].
        commit_loss: () codebook and commitment loss; 0 where nothing was quantised.
        indices: (B, h, w) int64, None where nothing was quantised.
        latents: (B, codebook_dim, h, w) what the encoder gave, None after a decoding alone.
    """

    sample: Tensor
    commit_loss: Tensor
    indices: Tensor | None = None
    latents: Tensor | None = None


class ViTVQModel(ModelMixin, ConfigMixin):
    """ViT-VQGAN's autoencoder (arXiv 2110.04627), with the interface of diffusers' VQModel.

    To diffuse its latents, multiply them by `config.scaling_factor` and divide by it before
    :meth:`decode`, which brings every vector back to length 1. Unit vectors of d numbers have the
    root mean square 1/sqrt(d), hence the factor sqrt(d) if none is given. A ValueError refuses
    sizes that do not divide.

    Args:
        image_size: side of the square images in pixels, a multiple of `patch_size`.
        encoder_dim, decoder_dim: width, a multiple of the number of heads and of 4.
        encoder_mlp, decoder_mlp: width of the feed-forward blocks.
        codebook_dim: numbers per code and latent channels.
        commitment: beta of the codebook's loss.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["quantise"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 8,
        in_channels: int = 3,
        encoder_dim: int = 512,
        encoder_depth: int = 8,
        encoder_heads: int = 8,
        encoder_mlp: int = 2048,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 8,
        decoder_mlp: int = 2048,
        codebook_size: int = 8192,
        codebook_dim: int = 32,
        commitment: float = 0.25,
        scaling_factor: float | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ValueError(
                f"image_size={image_size} must be a positive multiple of patch_size={patch_size}."
            )
        for name, channels in (("in_channels", in_channels), ("codebook_dim", codebook_dim)):
            whole(name, channels, 1, 65_536)
        check_sizes(encoder_dim, encoder_depth, encoder_heads, encoder_mlp)
        check_sizes(decoder_dim, decoder_depth, decoder_heads, decoder_mlp)
        if scaling_factor is None:
            self.register_to_config(scaling_factor=math.sqrt(codebook_dim))
        side = image_size // patch_size
        self.patchify = nn.Conv2d(in_channels, encoder_dim, patch_size, patch_size)
        self.encoder = Transformer(side, encoder_dim, encoder_depth, encoder_heads, encoder_mlp)
        self.to_code = nn.Linear(encoder_dim, codebook_dim)
        self.quantise = VectorQuantiser(codebook_size, codebook_dim, commitment)
        self.from_code = nn.Linear(codebook_dim, decoder_dim)
        self.decoder = Transformer(side, decoder_dim, decoder_depth, decoder_heads, decoder_mlp)
        self.to_patch = nn.ConvTranspose2d(decoder_dim, in_channels, patch_size, patch_size)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> ViTVQEncoderOutput | tuple[Tensor]:
        """Encode images (B, C, H, W) in [-1, 1] as latents of length 1, not yet quantised; a
        ValueError refuses images of another size than the model's."""
        latents = _as_image(normalize(self._vectors(x).float(), dim=-1)).to(x.dtype)
        return ViTVQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> ViTVQOutput | tuple[Tensor, Tensor]:
        """Decode latents (B, codebook_dim, h, w), which may have any length over the channels:
        their nearest codes, or with `force_not_quantize` the vectors themselves."""
        unit = normalize(_as_tokens(h).float(), dim=-1).to(h.dtype)
        if force_not_quantize:
            output = ViTVQOutput(self._images(unit), h.new_zeros(()))
        else:
            codes, indices, loss = self.quantise(unit)
            output = ViTVQOutput(self._images(codes), loss, indices)
        return output if return_dict else (output.sample, output.commit_loss)

    def forward(self, sample: Tensor, return_dict: bool = True) -> ViTVQOutput | tuple[Tensor, ...]:
        """Reconstruct images (B, C, H, W) in [-1, 1] through the codebook; all four of
        :class:`ViTVQOutput` are set."""
        vectors = self._vectors(sample)
        codes, indices, loss = self.quantise(vectors)
        latents = _as_image(normalize(vectors.float(), dim=-1))
        output = ViTVQOutput(self._images(codes), loss, indices, latents)
        return output if return_dict else output.to_tuple()

    def indices(self, latents: Tensor) -> Tensor:
        """The code (B, h, w) int64 that stands for each vector of (B, codebook_dim, h, w)."""
        return self.quantise.nearest(_as_tokens(latents))

    def _vectors(self, x: Tensor) -> Tensor:
        """(B, h, w, codebook_dim), of any length."""
        config: Any = self.config  # annotated as a plain dict
        channels, side = config.in_channels, config.image_size
        if x.ndim != 4 or tuple(x.shape[1:]) != (channels, side, side):
            raise ValueError(
                f"images have shape {tuple(x.shape)}, the model takes (B, {channels}, {side}, "
                f"{side}): resize them, or build a model with another image_size."
            )
        return self.to_code(self.encoder(_as_tokens(self.patchify(x))))

    def _images(self, codes: Tensor) -> Tensor:
        return self.to_patch(_as_image(self.decoder(self.from_code(codes))))


def _as_tokens(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1)


def _as_image(tokens: Tensor) -> Tensor:
    return tokens.permute(0, 3, 1, 2).contiguous()
