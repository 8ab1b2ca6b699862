"""Reading a small image folder whole, with its captions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from PIL import Image

from diffusers_curriculum.models.image_files import list_folder, warn_of_left_out


class TinyModelError(ValueError):
    """A tiny pipeline was asked for with sizes or images that cannot work."""


def read_images(
    images_dir: str | Path | None, resolution: int, generator: torch.Generator
) -> tuple[torch.Tensor, list[str]]:
    """Return images (n, 3, resolution, resolution) in [-1, 1] and captions, "" where none.

    Without a folder: 16 random images and no captions.
    """
    if images_dir is None:
        return torch.rand((16, 3, resolution, resolution), generator=generator) * 2.0 - 1.0, []
    folder = Path(images_dir)
    if not folder.is_dir():
        raise TinyModelError(f"{str(folder)!r} is not a folder: give an image folder")
    found = list_folder(folder)
    warn_of_left_out(str(folder), found, found.images)
    if not found.images:
        raise TinyModelError(f"{str(folder)!r} holds no images: put some in it")
    files = sorted(map(Path, found.images))
    captions = _read_captions(folder / "metadata.jsonl")
    images = torch.stack([_read_image(path, resolution) for path in files])
    root = Path(os.path.abspath(folder))
    return images, [captions.get(path.relative_to(root).as_posix(), "") for path in files]


def _read_captions(path: Path) -> dict[str, str]:
    """Return file name -> caption from a `metadata.jsonl`; empty where there is no such file."""
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            captions[row["file_name"]] = str(row.get("text", ""))
        except (ValueError, KeyError, TypeError) as error:
            raise TinyModelError(
                f"{str(path)!r}, line {number}: {line[:80]!r} is not a JSON object with a file_name"
            ) from error
    return captions


def _read_image(path: Path, resolution: int) -> torch.Tensor:
    """Return an image (3, resolution, resolution) in [-1, 1]: shorter side fitted, centre cut."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    factor = resolution / min(image.size)
    width, height = (max(resolution, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(resolution, resolution, 3).permute(2, 0, 1) / 127.5 - 1.0
