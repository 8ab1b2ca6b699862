"""From an image file to upright pixels of the kind that is trained on."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from diffusers_curriculum.models.image_files import register_codecs
from diffusers_curriculum.training.data.shards import content_at

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # PIL's, by their channels
_PNG = b"\x89PNG\r\n\x1a\n"
_BESIDE = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks that no pixel depends on
_ORIENTATION = 0x0112  # EXIF's tag
_LYING = (5, 6, 7, 8)  # its values by which width and height change places
_TOLD_BY_HEAD = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class Pixels:
    """What images are turned into.

    Attributes:
        mode: "L" (grey), "RGB" or "RGBA".
        background: colour behind transparent pixels, as PIL names it; None drops alpha, so that the
            colours show that were stored where nothing was to be seen.
    """

    mode: str = "RGB"
    background: str | None = None

    @property
    def channels(self) -> int:
        return len(self.mode)


RGB = Pixels()


def decode_image(
    cell: dict[str, Any], pixels: Pixels = RGB, noted: list[str] | None = None
) -> Image.Image:
    """Decode one undecoded cell of a `datasets` image column, upright.

    The EXIF orientation is applied, the first frame of an animation is taken, 16-bit grey is
    scaled to 8 bits (PIL's own conversion clips it to white).

    Args:
        cell: {"path": str or None, "bytes": bytes or None}, from `datasets.Image(decode=False)`;
            the path may be a place in a shard.
        noted: takes what is wrong with the file that no pixel depends on.

    Raises:
        ValueError: no image in the cell, more pixels than PIL's bomb limit, or pixels of no known
            range; PIL's own errors for what it cannot read.
    """
    image = _upright(cell, [] if noted is None else noted)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if _is_deep(image):
        image = Image.fromarray((_grey_values(image) // 257).astype(np.uint8))
    return _converted(image, pixels)


def decode_precisely(cell: dict[str, Any], pixels: Pixels = RGB) -> np.ndarray:
    """As :func:`decode_image`, (H, W, channels) float32 in [0, 1] with the precision of 16-bit
    grey."""
    image = _upright(cell, [])
    if not _is_deep(image):
        found = np.asarray(decode_image(cell, pixels), dtype=np.float32) / 255
        return found.reshape(*found.shape[:2], -1)
    grey = _grey_values(image).astype(np.float32) / 65535
    deep = np.repeat(grey[:, :, None], pixels.channels, axis=2)
    if pixels.mode == "RGBA":
        deep[:, :, 3] = 1.0
    return deep


def upright_size(cell: dict[str, Any]) -> tuple[int, int]:
    """(width, height) of what :func:`decode_image` makes of a cell, of the file's head alone where
    that tells it."""
    content, path = _content(cell), cell.get("path")
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:  # pyright: ignore
            if image.format in _TOLD_BY_HEAD:
                width, height = image.size
                lies = image.getexif().get(_ORIENTATION, 1) in _LYING
                return (height, width) if lies else (width, height)
    except Exception:  # as above: told by the pixels, then
        pass
    return decode_image(cell).size


def refuse_bomb(width: int, height: int) -> None:
    """Raise ValueError where an image has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels are over the limit of {limit}; shrink it")


def _with_orientation_alone(image: Image.Image) -> Image.Image:
    """A copy whose EXIF says which way is up, as far as that can be read, and no more."""
    exif, plain = Image.Exif(), image.copy()
    try:
        exif[_ORIENTATION] = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # as above; stored upright, then
        exif[_ORIENTATION] = 1
    plain.info = {"exif": exif.tobytes()} | {
        key: value for key, value in image.info.items() if key == "transparency"
    }
    return plain


def _content(cell: dict[str, Any]) -> bytes | None:
    """The bytes of an image that is in no file of its own."""
    content, path = cell.get("bytes"), cell.get("path")
    return content_at(path) if content is None and path is not None else content


def _upright(cell: dict[str, Any], noted: list[str]) -> Image.Image:
    content, path = _content(cell), cell.get("path")
    source = path if content is None else io.BytesIO(content)
    if source is None:
        raise ValueError("there is no image")
    try:
        return _read(source, noted)
    except Exception as error:
        bare, beside = _bare_png(content, path), list[str]()
        try:
            image = None if bare is None else _read(io.BytesIO(bare), beside)
        except Exception:  # more than what stands beside the pixels is broken
            image = None
        if image is None:
            raise
        noted += [f"a text or profile in it cannot be read ({error})", *beside]
        return image


def _read(source: Any, noted: list[str]) -> Image.Image:
    with _opened(source) as image:
        refuse_bomb(*image.size)
        image.load()
        try:
            upright = image.getexif().get(_ORIENTATION, 1) == 1
            return image if upright else ImageOps.exif_transpose(image)
        # Readers of EXIF raise nearly every type on broken tags; the pixels are there.
        except Exception as error:
            noted.append(f"its EXIF cannot be read ({type(error).__name__}: {error})")
        return ImageOps.exif_transpose(_with_orientation_alone(image))


def _opened(source: Any) -> Image.Image:
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        register_codecs()  # only now, as few data sets need them
        return Image.open(source)


def _bare_png(content: bytes | None, path: str | None) -> bytes | None:
    """A PNG without what no pixel depends on; None for anything else, and where nothing goes."""
    if content is None:
        if path is None or not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            head = file.read(len(_PNG))
            content = head + file.read() if head == _PNG else b""
    if not content.startswith(_PNG):
        return None
    kept, place = [_PNG], len(_PNG)
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4])
        if content[place + 4 : place + 8] not in _BESIDE:
            kept.append(content[place:end])
        place = end
    bare = b"".join(kept)
    return bare if len(bare) < len(content) else None


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def _converted(image: Image.Image, pixels: Pixels) -> Image.Image:
    if image.mode in ("P", "PA") or (pixels.background and image.has_transparency_data):
        image = image.convert("RGBA")  # the same colours, without PIL's warning about transparency
    if pixels.background is not None and image.mode == "RGBA":
        behind = Image.new("RGBA", image.size, ImageColor.getrgb(pixels.background)[:3])
        image = Image.alpha_composite(behind, image)
    if pixels.mode == "RGBA" or image.mode == pixels.mode:
        return image.convert(pixels.mode)
    coloured = image.convert("RGB")
    return coloured if pixels.mode == "RGB" else coloured.convert(pixels.mode)


def _grey_values(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    return grey
