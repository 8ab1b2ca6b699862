"""From an image to a training tensor, by explicit numbers instead of a global generator.

The geometry is that of torchvision's Resize, CenterCrop / RandomCrop and RandomHorizontalFlip on
PIL images, which the official script uses; torchvision itself is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.decoding import RGB, Pixels, decode_image, decode_precisely
from diffusers_curriculum.training.errors import UsageError

# PIL has no "nearest exact"; torchvision maps both names to the same PIL filter.
INTERPOLATIONS = {name.lower(): each for name, each in Image.Resampling.__members__.items()}
INTERPOLATIONS["nearest_exact"] = Image.Resampling.NEAREST


def resized_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side = resolution, the longer one int(resolution *
    longer / shorter), as torchvision's Resize has it."""
    return covering_size(width, height, (resolution, resolution))


def covering_size(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of an image that is resized until it just covers ``size``, a (width,
    height), too: one side is that of ``size``, the other in proportion, rounded down."""
    if width * size[1] >= height * size[0]:
        return max(size[0], int(size[1] * width / height)), size[1]
    return size[0], max(size[1], int(size[0] * height / width))


class Crop(NamedTuple):
    """Where a training image lies in the one that it was cut out of, in pixels.

    Attributes:
        original: (height, width) of the upright image as it is stored.
        top_left: (y, x) of its corner, once that image has been resized, and mirrored if it is.
        size: (height, width) of itself.
    """

    original: tuple[int, int]
    top_left: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop, perhaps mirror, and scale to [-1, 1].

    Args:
        resolution: side of the square that is cut out, in pixels.
        interpolation: a key of `INTERPOLATIONS`.
        center_crop: crop the middle; otherwise uniformly over all places.
        random_flip: mirror left-right with probability 1/2.
        pixels: what images are turned into before.
        size: (width, height) of what is cut out, in the place of the square.
    """

    resolution: int = 512
    interpolation: str = "lanczos"
    center_crop: bool = False
    random_flip: bool = False
    pixels: Pixels = RGB
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"--image_interpolation_mode {self.interpolation!r} is unknown; choose one of: "
                f"{', '.join(INTERPOLATIONS)}."
            )
        if self.resolution < 1:
            raise UsageError(f"--resolution is {self.resolution}; it must be at least 1 pixel.")

    @classmethod
    def of(cls, args: Arguments, mode: str = "RGB") -> ImageTransform:
        """What the command line asks for."""
        pixels, filter = Pixels(mode, args.background), args.image_interpolation_mode
        return cls(args.resolution, filter, args.center_crop, args.random_flip, pixels)

    def of_size(self, size: tuple[int, int]) -> ImageTransform:
        """The same for another (width, height)."""
        return replace(self, size=size)

    @property
    def cut_size(self) -> tuple[int, int]:
        """Width and height of what is cut out."""
        return self.size or (self.resolution, self.resolution)

    def decode(self, cell: dict[str, Any]) -> Image.Image:
        """Decode a cell of an image column; see :func:`decoding.decode_image`."""
        return decode_image(cell, self.pixels)

    def decode_precisely(self, cell: dict[str, Any]) -> np.ndarray:
        """As :meth:`decode`, for :meth:`precise`."""
        return decode_precisely(cell, self.pixels)

    def __call__(self, image: Image.Image, u_top: float, u_left: float, u_flip: float) -> Tensor:
        """Return the (C, R, R) float32 tensor in [-1, 1] that three uniforms in [0, 1) select; (C,
        H, W) for a ``size``."""
        return to_tensor(self.cut(image, u_top, u_left, u_flip))

    def cut(self, image: Image.Image, u_top: float, u_left: float, u_flip: float) -> Image.Image:
        """Return what three uniforms in [0, 1) select."""
        image = self._cropped(image, u_top, u_left)
        return ImageOps.mirror(image) if self._mirrors(u_flip) else image

    def precise(self, pixels: np.ndarray, u_top: float, u_left: float, u_flip: float) -> Tensor:
        """As a call, for (H, W, C) float32 in [0, 1], each channel resized in float32."""
        planes = np.moveaxis(pixels, -1, 0)
        channels = (Image.fromarray(np.ascontiguousarray(plane)) for plane in planes)
        cropped = [np.array(self._cropped(channel, u_top, u_left)) for channel in channels]
        stacked = torch.from_numpy(np.stack(cropped))
        if self._mirrors(u_flip):
            stacked = stacked.flip(-1)
        return stacked.sub_(0.5).div_(0.5)

    def crop_of(self, size: tuple[int, int], u_top: float, u_left: float, u_flip: float) -> Crop:
        """Where that lies which a call cuts out of an image of (width, height)."""
        (width, height), (wide, high) = covering_size(*size, self.cut_size), self.cut_size
        left, top = self._offset(width - wide, u_left), self._offset(height - high, u_top)
        if self._mirrors(u_flip):
            left = width - wide - left
        return Crop((size[1], size[0]), (top, left), (high, wide))

    def may_cut_nothing(self, mask: Image.Image) -> bool:
        """Return whether a square that could be selected from a grey image is black throughout."""
        lit = np.array(self._resized(mask)).astype(bool)
        along = np.asarray(lit.any(axis=int(lit.shape[1] <= lit.shape[0])))  # the longer side
        if self.center_crop:
            first = self._offset(len(along) - self.resolution, 0.0)
            return not along[first : first + self.resolution].any()
        edges = np.flatnonzero(np.concatenate([[True], along, [True]]))
        return bool(np.diff(edges).max() > self.resolution)

    def _resized(self, image: Image.Image) -> Image.Image:
        size = covering_size(*image.size, self.cut_size)
        if size == image.size:
            return image
        return image.resize(size, INTERPOLATIONS[self.interpolation])

    def _cropped(self, image: Image.Image, u_top: float, u_left: float) -> Image.Image:
        image, (wide, high) = self._resized(image), self.cut_size
        left, top = (
            self._offset(image.width - wide, u_left),
            self._offset(image.height - high, u_top),
        )
        return image.crop((left, top, left + wide, top + high))

    def _mirrors(self, u_flip: float) -> bool:
        return self.random_flip and u_flip < 0.5

    def _offset(self, slack: int, u: float) -> int:
        return round(slack / 2.0) if self.center_crop else int(u * (slack + 1))


def to_tensor(image: Image.Image) -> Tensor:
    """Return an image (W, H) as a float32 tensor (C, H, W): v / 255, then (v - 0.5) / 0.5."""
    pixels = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(255).sub_(0.5).div_(0.5)
