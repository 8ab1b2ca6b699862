"""Every image encoded once, before training: mean and deviation of each crop and mirroring."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_curriculum.training.cache.arrays import Array, ArrayFolder, ArrayWriter, Layout
from diffusers_curriculum.training.cache.files import LATENTS, is_there, sealed
from diffusers_curriculum.training.cache.filling import Processes
from diffusers_curriculum.training.cache.reading import MEAN, SIZE, STD, CachedLatents, crop_draws
from diffusers_curriculum.training.data.checks import decoded
from diffusers_curriculum.training.data.decoding import RGB
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError

DTYPES = ("float32", "float16")
_AHEAD = 2  # batches that are decoded while one is encoded


class _Image(NamedTuple):
    """One to encode, and the size of what it was cut out of."""

    pixels: Tensor  # (C, H, W)
    size: tuple[int, int]  # width, height


@dataclass(frozen=True)
class _Variants:
    """The images to encode, in the order of the files: rows, then crops, then mirroring."""

    rows: Any
    transform: ImageTransform
    image_column: str
    crops: int
    flips: int
    seed: int

    @property
    def each(self) -> int:
        """How many images a row gives."""
        return self.crops * self.flips

    def of_row(self, row: int, images: range) -> list[_Image]:
        """Those of a row's images that are in ``images``."""
        own = range(row * self.each, (row + 1) * self.each)
        wanted = range(max(own.start, images.start), min(own.stop, images.stop))
        picture = decoded(self.rows[row][self.image_column], row, self.transform.decode)
        return [_Image(self._pixels(picture, image), picture.size) for image in wanted]

    def _pixels(self, picture: Any, image: int) -> Tensor:
        crop, flip = divmod(image, self.flips)  # crop counts on over the rows
        draws = crop_draws(self.seed, crop)
        return replace(self.transform, random_flip=bool(flip))(picture, *draws, 0.0)


def cache_latents(
    rows: Any,
    space: Any,
    transform: ImageTransform,
    *,
    folder: str | Path,
    image_column: str = "image",
    crops: int = 1,
    flip: bool = False,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    fingerprint: Mapping[str, Any],
    dtype: str = "float32",
    sizes: bool = False,
    processes: Processes | None = None,
) -> CachedLatents:
    """Encode every image of ``rows`` in every variant, unless the cache is there, and open it.

    Crop k of row r is drawn from ``host_generator(seed, r * crops + k, purpose="latent_crop")``.
    A run that was killed left nothing that is taken for a cache, and the next one goes on from
    there.

    Args:
        rows: with the image column undecoded, as `load_images` returns them.
        space: ``encode(pixels (B, C, R, R)) -> (mean, std or None)``, each (B, C, h, w).
        transform: geometry of the images; its ``random_flip`` must be ``flip``.
        crops: crops of each image; 1 where the middle is cropped.
        flip: keep each crop mirrored, too.
        batch_size: images encoded at once.
        fingerprint: which encoder, in which dtype, and which data set, as plain JSON data.
        dtype: of the files, "float32" or "float16".
        sizes: keep those of the images, too.
        processes: those that encode together; None for one alone.

    Raises:
        UsageError: bad arguments; the folder holds something else, a cache of something else or a
            damaged one; too little space; an image that does not decode; latents not finite.
        DiskFullError: the disk filled up meanwhile.
    """
    final, flips = Path(folder).resolve(), 1 + flip
    processes = processes or Processes()
    _check(rows, transform, crops, flip, batch_size, dtype)
    own = _own_facts(rows, transform, crops, flip, seed, dtype, sizes)
    asked = sealed(fingerprint, own, LATENTS)
    if is_there(final, LATENTS, asked, hashes=processes.rank == 0):
        return CachedLatents(final, asked)
    layout = _layout(space, transform, (len(rows), crops, flips), device, dtype, sizes)
    work = ArrayFolder(final, asked, layout, batch_size)
    variants = _Variants(rows, transform, image_column, crops, flips, seed)

    def encode(todo: Sequence[int]) -> None:
        with ArrayWriter(work) as writer:
            batches = _images(variants, work, todo)
            bar = tqdm(batches, "Encoding", len(todo), disable=not processes.progress)
            for batch, images in bar:
                writer.write(batch, _encoded(space, images, device, layout, batch * batch_size))

    work.fill(encode, processes)
    return CachedLatents(final, asked)


def _check(
    rows: Any, transform: ImageTransform, crops: int, flip: bool, batch_size: int, dtype: str
) -> None:
    problem = None
    if crops < 1 or batch_size < 1 or len(rows) < 1:
        problem = f"crops={crops}, batch_size={batch_size}, {len(rows)} rows: each must be >= 1"
    elif crops > 1 and transform.center_crop:
        problem = f"crops={crops} would all be the same with --center_crop: drop one of the two"
    elif transform.random_flip != flip:
        problem = f"flip={flip} and random_flip={transform.random_flip} disagree: give both alike"
    elif dtype not in DTYPES:
        problem = f"dtype={dtype!r} is unknown: choose from {', '.join(DTYPES)}"
    if problem:
        raise UsageError(f"Latents cannot be cached: {problem}.")


def _own_facts(
    rows: Any, transform: ImageTransform, crops: int, flip: bool, seed: int, dtype: str, sizes: bool
) -> dict[str, Any]:
    """What the files depend on besides the encoder and the data set."""
    own = {
        "rows": len(rows),
        "resolution": transform.resolution,
        "interpolation": transform.interpolation,
        "center_crop": transform.center_crop,
        "crops": crops,
        "flip": flip,
        "seed": None if transform.center_crop else seed,  # which then changes nothing
        "dtype": dtype,
    }
    own |= {"sizes": True} if sizes else {}
    own |= {} if transform.size is None else {"size": [*transform.size]}
    return own if transform.pixels == RGB else own | {"pixels": asdict(transform.pixels)}


def _layout(
    space: Any,
    transform: ImageTransform,
    variants: tuple[int, int, int],
    device: Any,
    dtype: str,
    sizes: bool,
) -> Layout:
    """Shape of the files, told by a grey image."""
    width, height = transform.cut_size
    with torch.no_grad():
        grey = torch.zeros(1, transform.pixels.channels, height, width, device=device)
        encoded = zip((MEAN, STD), space.encode(grey), strict=True)
    files = {n: Array(dtype, (*part.shape[1:],)) for n, part in encoded if part is not None}
    return Layout(variants, files | ({SIZE: Array("int32", (2,))} if sizes else {}))


def _images(
    variants: _Variants, work: ArrayFolder, todo: Sequence[int]
) -> Iterator[tuple[int, list[_Image]]]:
    """Number and images of each batch, decoded in threads a little ahead."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ahead: deque[tuple[int, list[Future[list[_Image]]]]] = deque()
        try:
            for batch in todo:
                start = batch * work.batch_size
                images = range(start, min(start + work.batch_size, work.layout.images))
                own = range(images.start // variants.each, images[-1] // variants.each + 1)
                ahead.append((batch, [pool.submit(variants.of_row, row, images) for row in own]))
                if len(ahead) > _AHEAD:
                    yield _waited_for(*ahead.popleft())
            while ahead:
                yield _waited_for(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _waited_for(batch: int, parts: list[Future[list[_Image]]]) -> tuple[int, list[_Image]]:
    return batch, [image for part in parts for image in part.result()]


def _encoded(
    space: Any, images: Sequence[_Image], device: Any, layout: Layout, first: int
) -> dict[str, NDArray[Any]]:
    """What each file has of a batch that begins with image ``first``."""
    with torch.no_grad():
        pixels = torch.stack([image.pixels for image in images]).to(device)
        encoded = zip((MEAN, STD), space.encode(pixels), strict=True)
    with np.errstate(over="ignore"):  # told below
        arrays = {
            name: part.float().cpu().numpy().astype(layout.files[name].dtype)
            for name, part in encoded
            if part is not None
        }
    if not all(np.isfinite(array).all() for array in arrays.values()):
        each = layout.variants[1] * layout.variants[2]
        raise UsageError(
            f"The latents of rows {first // each} to {(first + len(images) - 1) // each} are not "
            f"finite in {layout.files[MEAN].dtype}: encode in float32 (an autoencoder may overflow "
            "in float16)."
        )
    return arrays | {SIZE: np.array([image.size for image in images])}
