"""Latents that were encoded before, as samples read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusers_curriculum.randomness import host_generator

MEAN, STD, SIZE = "mean.npy", "std.npy", "size.npy"


@dataclass(frozen=True)
class CachedLatents:
    """Latents on disk; every process that reads maps the files for itself."""

    folder: Path
    fingerprint: Mapping[str, Any]  # what it was made from

    @cached_property
    def mean(self) -> NDArray[Any]:
        """(N, crops, flips, C, h, w), mapped read-only."""
        return self._mapped(MEAN)

    @cached_property
    def std(self) -> NDArray[Any] | None:
        """As `mean`; None where the encoder has no deviation."""
        return self._mapped(STD) if (self.folder / STD).is_file() else None

    @cached_property
    def _sizes(self) -> NDArray[Any]:
        return self._mapped(SIZE)

    def _mapped(self, name: str) -> NDArray[Any]:
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.mean)

    def __reduce__(self) -> tuple[Any, ...]:
        # a map would travel to loader workers as a copy of the whole file
        return CachedLatents, (self.folder, dict(self.fingerprint))

    def read(self, row: int, u_crop: float, u_flip: float) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation (C, h, w), float32, of the variant that two uniforms in [0, 1) select.

        As in ``ImageTransform``, an image is mirrored where ``u_flip < 1/2``, if at all.

        Raises:
            IndexError: there is no such row.
        """
        variant = self._variant(row, u_crop, u_flip)
        deviation = None if self.std is None else _tensor(self.std[variant])
        return _tensor(self.mean[variant]), deviation

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of the image of a row, of a cache that has the sizes."""
        width, height = self._sizes[row, 0, 0].tolist()
        return width, height

    def draws(self, row: int, u_crop: float, u_flip: float) -> tuple[float, float, float]:
        """The uniforms by which an ``ImageTransform`` made the variant that :meth:`read` gives."""
        _, crop, mirrored = self._variant(row, u_crop, u_flip)
        top, left = crop_draws(self.fingerprint["seed"], row * self.mean.shape[1] + crop)
        return top, left, 0.0 if mirrored else 1.0

    def _variant(self, row: int, u_crop: float, u_flip: float) -> tuple[int, int, int]:
        count, crops, flips = self.mean.shape[:3]
        if not 0 <= row < count:
            raise IndexError(f"row {row} is not in the latent cache, which has {count} rows.")
        return row, int(u_crop * crops), int(flips == 2 and u_flip < 0.5)


def crop_draws(seed: int | None, crop: int) -> tuple[float, float]:
    """The two uniforms, from top and from left, of a crop; they are counted on over the rows."""
    u_top, u_left = host_generator(seed or 0, crop, purpose="latent_crop").random(2).tolist()
    return u_top, u_left


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))
