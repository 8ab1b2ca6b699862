"""The files that people's image folders really hold: broken ones, and odd ones that are fine."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Twelve colours that no conversion below can confuse; JPEG keeps 16 x 16 blocks of them.
COLOURS = np.random.Generator(np.random.Philox(5)).integers(0, 256, (4, 3, 3), dtype=np.uint8)
BLOCKS = COLOURS.repeat(16, 0).repeat(16, 1)
NOISE = np.random.Generator(np.random.Philox(6)).integers(0, 256, (32, 32, 3), dtype=np.uint8)

# EXIF orientation -> what makes the stored pixels upright
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: np.rot90,
}


@dataclass(frozen=True)
class Corpus:
    """An image folder with metadata; entries by what is wrong with them.

    Attributes:
        folder: holds the images and metadata.jsonl.
        bad: file name -> part of the reason that must be told.
        good: file name -> RGB pixels to be read.
        tolerance: file name -> largest error of a lossy format; 0 where not named.
    """

    folder: Path
    bad: dict[str, str]
    good: dict[str, np.ndarray]
    tolerance: dict[str, int]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(orientation: int, kind: str = "PNG") -> bytes:
    """The blocks, stored as a camera held in that way stores them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(BLOCKS), kind, exif=exif)


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims to have side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def describe_images(folder: Path, entries: Iterable[tuple[str, Any]]) -> Path:
    """Write the metadata of an image folder; a caption of ``...`` is left out."""
    lines = (
        json.dumps({"file_name": name} | ({} if text is ... else {"text": text})) + "\n"
        for name, text in entries
    )
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def make_corpus(folder: Path) -> Corpus:
    """Write all files and their metadata, bad ones between good ones."""
    folder.mkdir(parents=True)
    bad = _write_bad(folder)
    good, tolerance = _write_good(folder)
    captions: dict[str, Any] = {name: ["a caption"] for name in sorted([*bad, *good])}
    captions |= {"caption_none.png": [], "caption_null.png": ["a", None], "both.png": []}
    captions |= {"caption_missing.png": ..., "cmyk.tiff": ["two", "phrasings"], "grey.png": [""]}
    describe_images(folder, captions.items())
    return Corpus(folder, bad, good, tolerance)


def _write_bad(folder: Path) -> dict[str, str]:
    picture = Image.fromarray(NOISE)
    png, jpeg, gif = (encoded(picture, kind) for kind in ("PNG", "JPEG", "GIF"))
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0x10
    unknown = "cannot identify image file"
    contents = {
        "zero.png": (b"", unknown),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "Truncated"),
        "truncated.gif": (gif[: len(gif) // 2], "truncated"),
        "header.png": (png[:33], unknown),
        "flipped_bit.png": (bytes(damaged), "broken"),
        "text.png": (b"this is not a picture\n", unknown),
        "page.jpg": (b"<!DOCTYPE html><title>404</title>", unknown),
        "bomb.png": (bomb(40_000), "decompression bomb"),
        "float.tiff": (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point pixels"),
        "line\nbreak.png": (b"", unknown),
        "\u00fcml\u00e4ut \u6587\u5b57 \U0001f426.png": (b"", unknown),
        "caption_missing.png": (png, "the caption is missing"),
        "caption_none.png": (png, "the list of captions is empty"),
        "caption_null.png": (png, "holds None, which is not a string"),
        "both.png": (b"", "; the list of captions is empty"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    return {name: reason for name, (_, reason) in contents.items()} | {
        "folder.png": "it is not a file",
        "dangling.png": "FileNotFoundError",
        "absent.png": "FileNotFoundError",
        "loop.png": "OSError",
        "pipe.png": "it is not a file",
    }


def _inked(inks: np.ndarray) -> Image.Image:
    return Image.frombytes("CMYK", inks.shape[1::-1], inks.tobytes())


def _write_good(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    rgb = Image.fromarray(COLOURS)
    inks = np.array([[[255, 0, 0, 0], [0, 255, 255, 0]], [[0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)
    mixed = np.array([[[0, 255, 255], [255, 0, 0]], [[0, 0, 0], [255, 255, 255]]], np.uint8)
    deep = np.array([[0, 2570, 65535], [256, 257, 30000]], np.uint16)
    shallow = np.array([[0, 10, 255], [0, 1, 116]], np.uint8)  # v // 257
    palette = rgb.quantize(12)
    palette.info["transparency"] = bytes([0, 128] * 6)
    other = Image.fromarray(255 - COLOURS).quantize(12)
    files: dict[str, tuple[bytes, np.ndarray]] = {
        "cmyk.tiff": (encoded(_inked(inks), "TIFF"), mixed),
        "cmyk.jpg": (
            encoded(_inked(inks.repeat(16, 0).repeat(16, 1)), "JPEG", quality=95),
            mixed.repeat(16, 0).repeat(16, 1),
        ),
        "deep.png": (encoded(Image.fromarray(deep), "PNG"), _grey(shallow)),
        "deep.tiff": (encoded(Image.fromarray(deep), "TIFF"), _grey(shallow)),
        "palette_alpha.png": (encoded(palette, "PNG"), COLOURS),
        "palette.gif": (encoded(rgb.quantize(12), "GIF"), COLOURS),
        "animation.gif": (
            encoded(rgb.quantize(12), "GIF", save_all=True, append_images=[other]),
            COLOURS,
        ),
        "alpha.png": (encoded(rgb.convert("RGBA"), "PNG"), COLOURS),
        "grey.png": (encoded(Image.fromarray(shallow), "PNG"), _grey(shallow)),
        "bits.png": (
            encoded(Image.fromarray(shallow > 5), "PNG"),
            _grey(np.where(shallow > 5, 255, 0)),
        ),
        "rotated.jpg": (with_orientation(6, "JPEG"), np.rot90(BLOCKS, -1)),
        "one_pixel.png": (encoded(rgb.crop((0, 0, 1, 1)), "PNG"), COLOURS[:1, :1]),
        "really_a_jpeg.png": (encoded(Image.fromarray(BLOCKS), "JPEG"), BLOCKS),
        "good line\nbreak.png": (encoded(rgb, "PNG"), COLOURS),
        "good \u00fc \u6587\u5b57 \U0001f426.png": (encoded(rgb, "PNG"), COLOURS),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "link.png").symlink_to(folder / "alpha.png")
    good = {name: pixels for name, (_, pixels) in files.items()} | {"link.png": COLOURS}
    # chroma is stored at half the resolution: only the middles of the blocks are compared
    return good, dict.fromkeys(("cmyk.jpg", "rotated.jpg", "really_a_jpeg.png"), 8)


def _grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1).astype(np.uint8)
