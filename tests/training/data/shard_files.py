"""Shards of small pictures, for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image


def picture(number: int, size: int = 8) -> bytes:
    """A PNG of which no two are alike."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar file of some members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_tars(folder: Path, counts: list[int]) -> Path:
    """Shards of so many samples each, in WebDataset's form, with captions and classes."""
    first = 0
    for shard, count in enumerate(counts):
        members = {}
        for number in range(first, first + count):
            members[f"{number:05}.png"] = picture(number)
            members[f"{number:05}.txt"] = f"picture number {number}\n".encode()
            members[f"{number:05}.cls"] = str(number % 3).encode()
            members[f"{number:05}.json"] = json.dumps({"title": f"title {number}"}).encode()
        first += count
        write_tar(folder / f"{shard:04}.tar", members)
    return folder


def write_parquet(folder: Path, counts: list[int]) -> Path:
    """The same pictures as Parquet, in row groups of two."""
    folder.mkdir(parents=True)
    features = Features({"image": ImageFeature(), "text": Value("string"), "label": Value("int64")})
    number = 0
    for shard, count in enumerate(counts):
        cells = [
            {
                "image": {"bytes": picture(n), "path": None},
                "text": f"picture number {n}",
                "label": n % 3,
            }
            for n in range(number, number + count)
        ]
        number += count
        rows = Dataset.from_list(cells, features=features)
        rows.to_parquet(str(folder / f"{shard:04}.parquet"), batch_size=2)
    return folder
