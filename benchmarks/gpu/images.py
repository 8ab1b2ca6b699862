"""A small captioned image folder: scanned digits where scikit-learn is there, else generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCANS, GENERATED = "scanned digits", "generated images"


def write_images(folder: Path, count: int, side: int) -> str:
    """Write ``count`` images with metadata.jsonl, and return SCANS or GENERATED."""
    kind, pictures = _pictures(count)
    folder.mkdir(parents=True)
    rows = []
    for index, (grey, label) in enumerate(pictures):
        name = f"{index:03d}.png"
        small = Image.fromarray(grey)
        small.resize((side, side), Image.Resampling.BICUBIC).convert("RGB").save(folder / name)
        rows.append({"file_name": name, "text": f"a handwritten {WORDS[label]}"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return kind


def _pictures(count: int) -> tuple[str, list[tuple[np.ndarray, int]]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        rng = np.random.Generator(np.random.Philox(key=1))
        made = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        return GENERATED, [(image, index % 10) for index, image in enumerate(made)]
    digits: Any = load_digits()
    scans = np.round(digits.images[:count] * (255 / 16)).astype(np.uint8)
    return SCANS, [
        (scan, int(label)) for scan, label in zip(scans, digits.target[:count], strict=True)
    ]
