"""Latents of images in buckets: those of each image's own size, crop and mirroring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature

from diffusers_curriculum.training.cache.bucketed import cache_bucketed_latents
from diffusers_curriculum.training.data.buckets import Buckets
from diffusers_curriculum.training.data.decoding import decode_image
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from tests.training.cache.test_latent_cache import ALONE, IDENTITY, Pixels, make_rows

OF_ROW = np.array([0, 1, 1, 0, 1])
BUCKETS = Buckets(((16, 24), (24, 16)), OF_ROW, 1)
TRANSFORM = ImageTransform(16, random_flip=True)


def kept(folder: Path, space: Any, buckets: Buckets = BUCKETS) -> Any:
    rows = Dataset.from_list(make_rows(5, (30, 28))).cast_column(
        "image", ImageFeature(decode=False)
    )
    where = {"folder": folder, "fingerprint": IDENTITY, "processes": ALONE, "device": "cpu"}
    how = {"crops": 2, "flip": True, "seed": 0, "batch_size": 2, "sizes": True}
    return cache_bucketed_latents(rows, space, TRANSFORM, buckets=buckets, **where, **how)


def test_a_variant_is_that_of_the_draws_it_tells_at_the_size_of_the_bucket(tmp_path: Path) -> None:
    latents, rows = kept(tmp_path, Pixels()), make_rows(5, (30, 28))
    for row, picture in enumerate(rows):
        transform = TRANSFORM.of_size(BUCKETS.size_of(row))
        for u in ((0.1, 0.2), (0.9, 0.8)):
            mean, _ = latents.read(row, *u)
            pixels = transform(decode_image(picture["image"]), *latents.draws(row, *u))
            torch.testing.assert_close(mean, pixels[:, ::4, ::4], atol=1e-6, rtol=0)
        assert latents.size(row) == (30, 28)
    assert {path.name for path in tmp_path.iterdir()} == {"24x16", "16x24"}


def test_what_is_there_is_used_again_and_other_buckets_are_refused(tmp_path: Path) -> None:
    kept(tmp_path, Pixels())
    again = Pixels()
    kept(tmp_path, again)
    assert again.batches == []
    with pytest.raises(UsageError, match="in_bucket"):
        kept(tmp_path, Pixels(), Buckets(BUCKETS.sizes, 1 - OF_ROW, 1))
    (tmp_path / "mean.npy").touch()
    with pytest.raises(UsageError, match=r"mean\.npy, which is no latent cache of a bucket"):
        kept(tmp_path, Pixels())
