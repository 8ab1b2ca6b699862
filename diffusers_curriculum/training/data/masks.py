"""Masks: how much each pixel of a sample counts in its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_curriculum.training.data.checks import decoded, describe
from diffusers_curriculum.training.data.decoding import Pixels, decode_image, upright_size
from diffusers_curriculum.training.data.transforms import ImageTransform, resized_size

_REMEDY = "repair it, crop the middle (--center_crop), or give --unmasked_weight a value above 0"


@dataclass(frozen=True)
class Masks:
    """The masks of a data set: a column of them, or the alpha of its images.

    What is white or opaque counts fully, what is black or transparent ``unmasked_weight``; an image
    whose cell in the column is empty counts as a whole.

    Args:
        image_column: of the images.
        column: of their masks, None for alpha.
        transform: geometry of the training images.
        unmasked_weight: in [0, 1].
    """

    image_column: str
    column: str | None
    transform: ImageTransform
    unmasked_weight: float = 0.0

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [self.image_column, *([] if self.column is None else [self.column])]

    def fault(self, cells: Mapping[str, Any]) -> str | None:
        """Return why a row's mask cannot be used, whatever crop is drawn; None if it can."""
        try:
            mask = self._decoded(cells)
        except Exception as error:  # as below
            return describe(error)
        if mask is None or self.unmasked_weight > 0 or not self._area.may_cut_nothing(mask):
            return None
        return f"a crop of it may hold nothing of its mask: {_REMEDY}"

    def read(self, cells: Mapping[str, Any], row: int, *draws: float) -> Tensor:
        """Return (1, R, R) float32 in [unmasked_weight, 1] of the crop that three uniforms select.

        Raises:
            UsageError: the mask does not decode, has another form than its image, or nothing of it
                lies in the crop; the message names the sample.
        """
        return decoded(cells[self.image_column], row, lambda _: self._weights(cells, *draws))

    def _weights(self, cells: Mapping[str, Any], *draws: float) -> Tensor:
        mask, side = self._decoded(cells), self.transform.resolution
        if mask is None:
            return torch.ones(1, side, side)
        share = np.array(self._area.cut(mask, *draws), dtype=np.float32) / 255
        if not (share.any() or self.unmasked_weight > 0):
            raise ValueError(f"nothing of its mask lies in the crop: {_REMEDY}")
        return torch.from_numpy(self.unmasked_weight + (1 - self.unmasked_weight) * share)[None]

    @property
    def _area(self) -> ImageTransform:
        return replace(self.transform, interpolation="box")

    def _decoded(self, cells: Mapping[str, Any]) -> Image.Image | None:
        image, cell = cells[self.image_column], None
        if self.column is not None and (cell := cells[self.column]) is None:
            return None
        try:
            if cell is None:
                return decode_image(image, Pixels("RGBA")).getchannel("A")
            mask = decode_image(cell, Pixels("L"))
        except Exception as error:  # decoders raise nearly every type on broken input
            raise ValueError(f"its mask cannot be read: {describe(error)}") from error
        sizes = mask.size, upright_size(image)
        if len({resized_size(*size, self.transform.resolution) for size in sizes}) > 1:
            raise ValueError("its mask has {} x {} pixels, and it {} x {}".format(*sum(sizes, ())))
        return mask
