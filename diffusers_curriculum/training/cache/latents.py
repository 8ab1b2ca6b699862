"""Every image encoded once, before training: mean and deviation of each crop and mirroring."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_curriculum.training.cache.files import CachedLatents, crop_draws, open_cache
from diffusers_curriculum.training.cache.filling import DTYPES, LatentWriter, Layout, WorkFolder
from diffusers_curriculum.training.data.checks import decoded
from diffusers_curriculum.training.data.decoding import RGB
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.storage.fingerprints import hash_config

__all__ = ["CachedLatents", "cache_latents"]

_AHEAD = 2  # batches that are decoded while one is encoded


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

    def of_row(self, row: int, images: range) -> list[Tensor]:
        """Those of a row's images (3, R, R) that are in ``images``."""
        own = range(row * self.each, (row + 1) * self.each)
        wanted = range(max(own.start, images.start), min(own.stop, images.stop))
        picture = decoded(self.rows[row][self.image_column], row, self.transform.decode)
        return [self._image(picture, image) for image in wanted]

    def _image(self, picture: Any, image: int) -> Tensor:
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
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> CachedLatents:
    """Encode every image of ``rows`` in every variant, unless the cache is there, and open it.

    Crop k of row r is drawn from ``host_generator(seed, r * crops + k, purpose="latent_crop")``.
    Processes share out whole batches, so that their number changes no bit. A run that was killed
    left nothing that is taken for a cache, and the next one goes on from there.

    Args:
        rows: with the image column undecoded, as `load_images` returns them.
        space: ``encode(pixels (B, C, R, R)) -> (mean, std or None)``, each (B, C, h, w).
        transform: geometry of the images; its ``random_flip`` must be ``flip``.
        crops: crops of each image; 1 where the middle is cropped.
        flip: keep each crop mirrored, too.
        batch_size: images encoded at once.
        fingerprint: which encoder, in which dtype, and which data set, as plain JSON data.
        dtype: of the files, "float32" or "float16".
        wait: returns when all processes have called it.

    Raises:
        UsageError: bad arguments; the folder holds something else, a cache of something else or a
            damaged one; too little space; an image that does not decode; latents not finite.
        DiskFullError: the disk filled up meanwhile.
    """
    final, flips = Path(folder).resolve(), 1 + flip
    _check(rows, transform, crops, flip, batch_size, dtype)
    asked = _fingerprint(rows, transform, crops, flip, seed, dtype, fingerprint)
    if (cache := open_cache(final, asked, hashes=rank == 0)) is not None:
        return cache
    layout = _layout(space, transform, (len(rows), crops, flips), device, dtype)
    work = WorkFolder(final, asked, layout, batch_size)
    work.require_space()
    wait()  # nobody looks any more at what rank 0 now changes
    if rank == 0:
        work.prepare()
    wait()
    variants = _Variants(rows, transform, image_column, crops, flips, seed)
    _fill(work, variants, space, device, range(rank, work.batches, world_size), progress)
    wait()
    if rank == 0:
        work.publish()
    wait()
    return CachedLatents(final, asked)


def _fill(
    work: WorkFolder, variants: _Variants, space: Any, device: Any, own: range, progress: bool
) -> None:
    """Encode those of a process's own batches that are not there yet."""
    done = work.done()
    todo = [batch for batch in own if not done[batch]]
    with LatentWriter(work) as writer:
        batches = _pixels(variants, work, todo)
        for batch, pixels in tqdm(batches, "Encoding", len(todo), disable=not progress):
            first = batch * work.batch_size
            writer.write(batch, *_encoded(space, pixels.to(device), work.layout, first))


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


def _fingerprint(
    rows: Any,
    transform: ImageTransform,
    crops: int,
    flip: bool,
    seed: int,
    dtype: str,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """All that the files depend on but the library versions, with a digest over it."""
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
    if transform.pixels != RGB:
        own |= {"pixels": asdict(transform.pixels)}
    taken = sorted(given.keys() & {*own, "sha256"})
    if taken:
        raise UsageError(f"The fingerprint of a latent cache must not have its own {taken}.")
    try:
        whole = json.loads(json.dumps({**given, **own}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"The fingerprint {dict(given)!r} is no JSON data: {error}.") from error
    return {**whole, "sha256": hash_config(whole)}


def _layout(
    space: Any, transform: ImageTransform, variants: tuple[int, int, int], device: Any, dtype: str
) -> Layout:
    """Shape of the files, told by a grey image."""
    side = transform.resolution
    with torch.no_grad():
        grey = torch.zeros(1, transform.pixels.channels, side, side, device=device)
        mean, std = space.encode(grey)
    return Layout((*variants, *mean.shape[1:]), dtype, std is not None)


def _pixels(
    variants: _Variants, work: WorkFolder, todo: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Number and images (b, 3, R, R) of each batch, decoded in threads a little ahead."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ahead: deque[tuple[int, list[Future[list[Tensor]]]]] = deque()
        try:
            for batch in todo:
                start = batch * work.batch_size
                images = range(start, min(start + work.batch_size, work.layout.images))
                own = range(images.start // variants.each, images[-1] // variants.each + 1)
                ahead.append((batch, [pool.submit(variants.of_row, row, images) for row in own]))
                if len(ahead) > _AHEAD:
                    yield _stacked(*ahead.popleft())
            while ahead:
                yield _stacked(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _stacked(batch: int, parts: list[Future[list[Tensor]]]) -> tuple[int, Tensor]:
    return batch, torch.stack([image for part in parts for image in part.result()])


def _encoded(space: Any, pixels: Tensor, layout: Layout, first: int) -> list[NDArray[Any]]:
    """Mean and, where there is one, deviation of a batch that begins with image ``first``."""
    with torch.no_grad():
        present = [part for part in space.encode(pixels) if part is not None]
    with np.errstate(over="ignore"):  # told below
        arrays = [
            np.ascontiguousarray(part.float().cpu().numpy(), dtype=DTYPES[layout.dtype])
            for part in present
        ]
    if not all(np.isfinite(array).all() for array in arrays):
        each = layout.shape[1] * layout.shape[2]
        raise UsageError(
            f"The latents of rows {first // each} to {(first + len(pixels) - 1) // each} are not "
            f"finite in {layout.dtype}: encode in float32 (an autoencoder may overflow in float16)."
        )
    return arrays
