"""Callable forms of the functions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode


class Compose:
    """One after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    """Any function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, image: Any) -> Any:
        return self.function(image)


class ToTensor:
    """PIL image to (C, H, W) float32 in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        return functional.to_tensor(image)


class PILToTensor:
    """PIL image to (C, H, W) uint8."""

    def __call__(self, image: Image.Image) -> Tensor:
        return (255 * functional.to_tensor(image)).round().byte()


class ConvertImageDtype:
    """uint8 to floats in [0, 1]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, image: Tensor) -> Tensor:
        return image.to(self.dtype) / 255 if self.dtype.is_floating_point else image


class Normalize:
    """Per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, tensor: Tensor) -> Tensor:
        return functional.normalize(tensor, self.mean, self.std)


class Resize:
    """The shorter side to one number, or to (height, width)."""

    def __init__(
        self, size: Any, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        return functional.resize(image, self.size, self.interpolation)


class CenterCrop:
    """The middle."""

    def __init__(self, size: Any) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        return functional.center_crop(image, self.size)


class RandomCrop:
    """A random part of (height, width)."""

    def __init__(self, size: Any) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    @staticmethod
    def get_params(image: Any, output_size: Any) -> tuple[int, int, int, int]:
        """top, left, height, width."""
        whole, (height, width) = functional.size_of(image), output_size
        top = random.randint(0, whole[0] - height)
        return top, random.randint(0, whole[1] - width), height, width

    def __call__(self, image: Any) -> Any:
        return functional.crop(image, *self.get_params(image, self.size))


class RandomHorizontalFlip:
    """Left and right exchanged, with probability p."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return functional.hflip(image) if random.random() < self.p else image
