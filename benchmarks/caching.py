"""What it takes to encode every image once, and how soon a cache of many rows is used again.

    python -m benchmarks.caching [--images 1000] [--side 512] [--rows 1000000] [--json PATH]
                                 [--check]

JPEGs of smooth noise are decoded and encoded by a small AutoencoderKL, as --cache_latents does it;
the processor time that decoding, cropping and encoding take is told as a share of all of it. Then
the cache is opened again, and one of ``rows`` rows, whose latents and captions are made up: the
images are told apart by the digest of their names, sizes and captions, as at every start. With
--check the exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.training.cache.filling import Processes
from diffusers_curriculum.training.cache.latents import cache_latents
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.storage.fingerprints import dataset_digest

SHARE = 0.9  # of the processor time that decoding and encoding take at least
SECONDS = {"again": 2.0, "again_many": 5.0}  # to use a cache again, at most
ENCODER: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


@dataclass(frozen=True)
class TimedTransform(ImageTransform):
    """An ImageTransform that notes its processor time, in whichever thread it runs."""

    spent: list[float] = field(default_factory=list, compare=False)

    def decode(self, cell: dict[str, Any]) -> Image.Image:
        return self._timed(super().decode, cell)

    def __call__(self, *arguments: Any) -> torch.Tensor:
        return self._timed(super().__call__, *arguments)

    def _timed(self, work: Any, *arguments: Any) -> Any:
        start = time.thread_time()
        try:
            return work(*arguments)
        finally:
            self.spent.append(time.thread_time() - start)


class TimedSpace:
    """The latents of a small AutoencoderKL; notes its processor time."""

    def __init__(self) -> None:
        self.spent: list[float] = []

    @cached_property
    def space(self) -> LatentSpace:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LatentSpace.of(AutoencoderKL(**ENCODER).eval())

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        start = time.thread_time()
        try:
            return self.space.encode(pixels)
        finally:
            self.spent.append(time.thread_time() - start)


def smooth_jpeg(number: int, side: int) -> bytes:
    """An image that takes about as long to decode as a photograph."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side + side // 4, side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def rows_of(images: pa.Array, names: Sequence[str]) -> Dataset:
    """A data set of images by their bytes, undecoded, with captions."""
    column = pa.StructArray.from_arrays([images, pa.array(names)], ["bytes", "path"])
    table = pa.table({"image": column, "text": pa.array([f"caption of {name}" for name in names])})
    return Dataset(table).cast_column("image", ImageFeature(decode=False))


def opened(rows: Dataset, folder: Path, transform: ImageTransform, space: Any, dtype: str) -> float:
    """Seconds until a cache can be read: the digest of the data set, and filling or opening it."""
    start = time.perf_counter()
    latents = cache_latents(
        rows,
        space,
        transform,
        folder=folder,
        seed=0,
        batch_size=16,
        device="cpu",
        fingerprint={"data": dataset_digest(rows, "image", "text", str(folder))},
        dtype=dtype,
        processes=Processes(progress=False),
    )
    latents.read(len(latents) - 1, 0.5, 0.5)
    return time.perf_counter() - start


class OnePixel:
    """Latents of one number, as many rows are made up."""

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = pixels.mean((1, 2, 3), keepdim=True)
        return mean, torch.ones_like(mean)


def filled(images: int, side: int, folder: Path) -> dict[str, float]:
    """What filling a cache takes, by parts, and how soon it is used again."""
    pictures = pa.array([smooth_jpeg(number, side) for number in range(images)], pa.binary())
    rows = rows_of(pictures, [f"{number:07}.jpg" for number in range(images)])
    transform, space = TimedTransform(side, center_crop=True), TimedSpace()
    before = time.process_time()
    seconds = opened(rows, folder, transform, space, "float16")
    whole = time.process_time() - before
    decoding, encoding = sum(transform.spent), sum(space.spent)
    return {
        "images": images,
        "seconds": seconds,
        "decoding": decoding / whole,
        "encoding": encoding / whole,
        "rest": 1 - (decoding + encoding) / whole,
        "again": opened(rows, folder, transform, space, "float16"),
    }


def reused(rows: int, folder: Path) -> float:
    """Seconds until a cache of so many rows is used again."""
    one = smooth_jpeg(0, 8)
    many = rows_of(pa.array([one] * rows, pa.binary()), [f"{n:07}.jpg" for n in range(rows)])
    transform = ImageTransform(8, "nearest", center_crop=True)
    opened(many, folder, transform, OnePixel(), "float16")
    return opened(many, folder, transform, OnePixel(), "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 where --check finds a bar missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.caching")
    parser.add_argument("--images", type=int, default=1000, help="JPEGs, default %(default)s")
    parser.add_argument("--side", type=int, default=512, help="of them, default %(default)s")
    parser.add_argument("--rows", type=int, default=1_000_000, help="made up, default %(default)s")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--check", action="store_true", help="fail where a bar is missed")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = filled(args.images, args.side, Path(folder, "cache"))
        figures |= {"rows": args.rows, "again_many": reused(args.rows, Path(folder, "many"))}
    print(
        f"{args.images} JPEGs of {args.side} pixels: decoding {figures['decoding']:.0%}, encoding "
        f"{figures['encoding']:.0%}, all else {figures['rest']:.0%} of the processor time"
    )
    print(
        f"used again within {figures['again']:.2f} s; of {args.rows:,} rows, within "
        f"{figures['again_many']:.2f} s"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    missed = [name for name, most in SECONDS.items() if figures[name] > most]
    missed += ["rest"] if figures["rest"] > 1 - SHARE else []
    if args.check and missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return int(bool(args.check and missed))


if __name__ == "__main__":
    sys.exit(main())
