"""What a vision network wants done to images before it sees them.

Written here because transformers' own image processors need torchvision. Images are resized with
antialiasing as PIL's floating-point images are; PIL's 8-bit images are rounded and clipped after
each direction besides, which smooth pictures show as about one level of difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

# PIL's numbers of those filters that torch has too.
_FILTERS = {2: "bilinear", 3: "bicubic"}
_GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2, as PIL's conversion to "L"


class FeatureNetworkError(ValueError):
    """A feature network cannot be had or used; the message says what is missing and the remedy."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the middle, normalise.

    Args:
        mean, std: one number per channel of the network (3, or 1 for grey), in units of [0, 1].
        size: (height, width) to resize to, or the length of the shorter side; None leaves it.
        crop: (height, width) of the middle that is kept; None keeps all.
        filter: "bilinear" or "bicubic", both with antialiasing.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    filter: str = "bilinear"

    def __call__(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W), uint8 or floating in [0, 1], into what the network is fed with:
        (B, len(mean), h, w) float32."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if len(self.mean) == 1:
            pixels = (pixels * pixels.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)
        pixels = self._cropped(self._resized(pixels))
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _resized(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        size = self.size
        if isinstance(size, int):
            scale = size / min(height, width)
            size = (max(size, int(height * scale)), max(size, int(width * scale)))
        if size is None or size == (height, width):
            return pixels
        resized = interpolate(pixels, size, mode=self.filter, align_corners=False, antialias=True)
        return resized.clamp(0, 1)  # bicubic overshoots

    def _cropped(self, pixels: Tensor) -> Tensor:
        if self.crop is None:
            return pixels
        slack = [have - want for have, want in zip(pixels.shape[-2:], self.crop, strict=True)]
        # Negative padding cuts; images smaller than the crop get a black frame.
        (top, bottom), (left, right) = ((-(s // 2), -(s - s // 2)) for s in slack)
        return pad(pixels, (left, right, top, bottom))


# As the authors of arXiv 2306.04675 feed DINOv2: no crop, the whole image stretched to the square.
DINOV2_PREPROCESSING = Preprocessing(
    (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size=(224, 224), filter="bicubic"
)


def read_preprocessing(path: Path, channels: int) -> Preprocessing:
    """Read a preprocessor_config.json as transformers' image processors write it.

    Used: do_resize, size, resample, crop_pct, do_center_crop, crop_size, do_rescale, do_normalize,
    image_mean, image_std.

    Raises:
        FeatureNetworkError: a file that cannot be read, asks for something that is not here, or has
            a mean of another length than the network has channels.
    """
    try:
        return preprocessing_from(json.loads(path.read_bytes()), channels)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FeatureNetworkError(
            f"{path} cannot be followed: {type(error).__name__}: {error}. It must give size, "
            "image_mean and image_std as transformers' image processors write them."
        ) from error


def preprocessing_from(config: Mapping[str, Any], channels: int) -> Preprocessing:
    """Return the preprocessing that the fields of a preprocessor_config.json describe; a ValueError
    for one that is not supported, a KeyError where the mean or the deviation is missing."""
    if not config.get("do_rescale", True):
        raise ValueError("do_rescale is false, but the network's pixels must lie in [0, 1]")
    mean, std = (0.0,) * channels, (1.0,) * channels
    if config.get("do_normalize", True):
        mean, std = (_numbers(config, name, channels) for name in ("image_mean", "image_std"))
    resize, crop = config.get("do_resize", True), config.get("do_center_crop", False)
    size = _size(config.get("size")) if resize else None
    crop_to = _size(config.get("crop_size")) if crop else None
    if isinstance(crop_to, int):
        crop_to = crop_to, crop_to
    if isinstance(size, int) and "crop_pct" in config:
        size, crop_to = _by_share(size, config["crop_pct"])
    return Preprocessing(mean, std, size, crop_to, _filter(config) if resize else "bilinear")


def _by_share(size: int, share: float | None) -> tuple[Any, tuple[int, int]]:
    """ConvNeXt's way: below 384 pixels resize to more than is wanted, and keep the middle."""
    whole = size if size >= 384 or share is None else int(size / share)
    return ((size, size) if size >= 384 else whole), (size, size)


def _filter(config: Mapping[str, Any]) -> str:
    number = config.get("resample", 2)
    if number not in _FILTERS:
        raise ValueError(f"resample is {number}, but only 2 (bilinear) and 3 (bicubic) are known")
    return _FILTERS[number]


def _numbers(config: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...]:
    value = config[name]
    numbers = tuple(map(float, value if isinstance(value, list | tuple) else [value] * channels))
    good = all(math.isfinite(x) and (x > 0 or name == "image_mean") for x in numbers)
    if len(numbers) != channels or not good:
        raise ValueError(f"{name} is {value}, but the network has {channels} channels")
    return numbers


def _size(value: Any) -> tuple[int, int] | int:
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        return int(value["height"]), int(value["width"])
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        return int(value["shortest_edge"])
    if isinstance(value, int):
        return value, value
    raise ValueError(f"a size of {value} is neither height and width nor a shortest_edge")
