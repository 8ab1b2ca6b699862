"""How large images are, by their heads, remembered from one run to the next."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusers_curriculum.training.data.checks import decoded
from diffusers_curriculum.training.data.decoding import upright_size
from diffusers_curriculum.training.storage.files import write_atomically
from diffusers_curriculum.training.storage.fingerprints import dataset_digest

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 64  # rows read at once


def image_sizes(rows: Dataset, image_column: str, cache_dir: str | None) -> np.ndarray:
    """(n, 2) width and height of every image, upright.

    Raises:
        UsageError: one cannot be read; the message names it.
    """
    from datasets import config  # here, as it takes seconds

    digest = dataset_digest(rows, image_column, None, os.sep)
    stored = Path(cache_dir or config.HF_DATASETS_CACHE, "image_sizes", f"{digest}.npy")
    if stored.exists():
        return np.load(stored)
    images = rows.select_columns([image_column])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = pool.map(partial(_of_chunk, images, image_column), range(0, len(rows), _CHUNK))
        sizes = np.concatenate([*parts])
    stored.parent.mkdir(parents=True, exist_ok=True)
    sink = BytesIO()
    np.save(sink, sizes)
    write_atomically(stored, sink.getvalue())
    return sizes


def _of_chunk(images: Dataset, column: str, first: int) -> np.ndarray:
    cells = images[first : first + _CHUNK][column]
    return np.array(
        [decoded(cell, first + number, upright_size) for number, cell in enumerate(cells)],
        dtype=np.int32,
    )
