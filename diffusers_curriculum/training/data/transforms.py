"""From an image file to a training tensor, by explicit numbers instead of a global generator.

The geometry is that of torchvision's Resize, CenterCrop / RandomCrop and RandomHorizontalFlip on
PIL images, which the official script uses; torchvision itself is not needed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError

# PIL has no "nearest exact"; torchvision maps both names to the same PIL filter.
INTERPOLATIONS = {name.lower(): each for name, each in Image.Resampling.__members__.items()}
INTERPOLATIONS["nearest_exact"] = Image.Resampling.NEAREST


def decode_image(cell: dict[str, Any]) -> Image.Image:
    """Decode one undecoded cell of a `datasets` image column to RGB, upright.

    The EXIF orientation is applied, the first frame of an animation is taken, 16-bit grey is
    scaled to 8 bits (PIL's own conversion clips it to white), alpha is dropped.

    Args:
        cell: {"path": str or None, "bytes": bytes or None}, from `datasets.Image(decode=False)`.

    Raises:
        ValueError: no image in the cell, more pixels than PIL's bomb limit, or pixels of no known
            range; PIL's own errors for what it cannot read.
    """
    return _to_rgb(_upright(cell))


def decode_precisely(cell: dict[str, Any]) -> np.ndarray:
    """As :func:`decode_image`, (H, W, 3) float32 in [0, 1] with the precision of 16-bit grey."""
    image = _upright(cell)
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = _grey_values(image).astype(np.float32) / 65535
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(_to_rgb(image), dtype=np.float32) / 255


def _upright(cell: dict[str, Any]) -> Image.Image:
    content, path = cell.get("bytes"), cell.get("path")
    source = path if content is None else io.BytesIO(content)
    if source is None:
        raise ValueError("there is no image")
    with Image.open(source) as image:
        refuse_bomb(*image.size)
        return ImageOps.exif_transpose(image)


def refuse_bomb(width: int, height: int) -> None:
    """Raise ValueError where an image has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels are over the limit of {limit}; shrink it")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((_grey_values(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # the same colours, without PIL's warning about transparency
    return image.convert("RGB")


def _grey_values(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    return grey


def resized_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side = resolution, the longer one int(resolution *
    longer / shorter), as torchvision's Resize has it."""
    longer = int(resolution * max(width, height) / min(width, height))
    return (longer, resolution) if width >= height else (resolution, longer)


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop to a square, perhaps mirror, and scale to [-1, 1].

    Args:
        resolution: side of the square, in pixels.
        interpolation: a key of `INTERPOLATIONS`.
        center_crop: crop the middle; otherwise uniformly over all places.
        random_flip: mirror left-right with probability 1/2.
    """

    resolution: int = 512
    interpolation: str = "lanczos"
    center_crop: bool = False
    random_flip: bool = False

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"--image_interpolation_mode {self.interpolation!r} is unknown; choose one of: "
                f"{', '.join(INTERPOLATIONS)}."
            )
        if self.resolution < 1:
            raise UsageError(f"--resolution is {self.resolution}; it must be at least 1 pixel.")

    @classmethod
    def of(cls, args: Arguments) -> ImageTransform:
        """What the command line asks for."""
        return cls(
            args.resolution, args.image_interpolation_mode, args.center_crop, args.random_flip
        )

    def __call__(self, image: Image.Image, u_top: float, u_left: float, u_flip: float) -> Tensor:
        """Return the (3, R, R) float32 tensor in [-1, 1] that three uniforms in [0, 1) select."""
        image = self._cropped(image, u_top, u_left)
        if self.random_flip and u_flip < 0.5:
            image = ImageOps.mirror(image)
        return to_tensor(image)

    def precise(self, pixels: np.ndarray, u_top: float, u_left: float, u_flip: float) -> Tensor:
        """As a call, for (H, W, 3) float32 in [0, 1], each channel resized in float32."""
        channels = (Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(3))
        cropped = [np.array(self._cropped(channel, u_top, u_left)) for channel in channels]
        stacked = torch.from_numpy(np.stack(cropped))
        if self.random_flip and u_flip < 0.5:
            stacked = stacked.flip(-1)
        return stacked.sub_(0.5).div_(0.5)

    def _cropped(self, image: Image.Image, u_top: float, u_left: float) -> Image.Image:
        size = resized_size(*image.size, self.resolution)
        if size != image.size:
            image = image.resize(size, INTERPOLATIONS[self.interpolation])
        left, top = self._offset(size[0], u_left), self._offset(size[1], u_top)
        return image.crop((left, top, left + self.resolution, top + self.resolution))

    def _offset(self, side: int, u: float) -> int:
        slack = side - self.resolution
        return round(slack / 2.0) if self.center_crop else int(u * (slack + 1))


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image (W, H) as a float32 tensor (3, H, W): v / 255, then (v - 0.5) / 0.5."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(0.5).div_(0.5)
