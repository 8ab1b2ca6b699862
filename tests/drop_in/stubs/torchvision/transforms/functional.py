"""Functions on PIL images and on (C, H, W) tensors."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(Enum):
    """Ways to resize, by torchvision's names."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) float32 in [0, 1]."""
    pixels = np.array(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def normalize(tensor: Tensor, mean: Any, std: Any) -> Tensor:
    """Per channel."""
    shape = (-1, 1, 1)
    return (tensor - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def resize(
    image: Image.Image, size: Any, interpolation: InterpolationMode = InterpolationMode.BILINEAR
) -> Image.Image:
    """To (height, width), or the shorter side to one number."""
    if isinstance(size, int):
        scale = size / min(image.size)
        size = (round(image.height * scale), round(image.width * scale))
    names = {"NEAREST_EXACT": "NEAREST"}
    method = Image.Resampling[names.get(interpolation.name, interpolation.name)]
    return image.resize((size[1], size[0]), method)


def size_of(image: Any) -> tuple[int, int]:
    """Height and width of a PIL image or of a tensor (..., H, W)."""
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    return image.height, image.width


def to_pil_image(pixels: Tensor) -> Image.Image:
    """An image of (C, H, W) uint8."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def crop(image: Any, top: int, left: int, height: int, width: int) -> Any:
    """The part whose upper left corner is (top, left)."""
    if isinstance(image, Tensor):
        return image[..., top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Any, size: Any) -> Any:
    """The middle."""
    height, width = (size, size) if isinstance(size, int) else size
    whole = size_of(image)
    top, left = (whole[0] - height) // 2, (whole[1] - width) // 2
    return crop(image, top, left, height, width)


def hflip(image: Image.Image) -> Image.Image:
    """Left and right exchanged."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
