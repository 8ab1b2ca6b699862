"""Export scikit-learn's scanned handwritten digits as an image folder, with captions or by class.

1,797 real 8x8 scans come with scikit-learn, so nothing is downloaded. 297 of them are kept apart:
no model and no classifier of the demos is trained on those.

    python examples/text_to_image/digits.py --output_dir digits --resolution 32
    python examples/text_to_image/digits.py --output_dir classes --by_class --held_out_dir held_out
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = (
    "a handwritten {word}",
    "the digit {number}",
    "a scan of a handwritten {number}",
    "the number {word}",
    "{word}, written by hand",
)
HELD_OUT = 297
INK = 16  # load_digits counts the dark pixels of each 4x4 block of the original scan: 0 to 16.


@dataclass(frozen=True)
class Digits:
    """Scans (n, 8, 8) with values 0 to 16 and their labels (n,)."""

    scans: np.ndarray
    labels: np.ndarray


def split() -> tuple[Digits, Digits]:
    """Return the scans to train on and those kept apart; the same ones at every call."""
    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        data.images, data.target, test_size=HELD_OUT, stratify=data.target, random_state=0
    )
    return Digits(train_x, train_y), Digits(test_x, test_y)


def caption(digit: int, phrasing: int) -> str:
    """Return the caption of one digit in one of the phrasings (taken modulo their number)."""
    return PHRASINGS[phrasing % len(PHRASINGS)].format(word=WORDS[digit], number=digit)


def to_image(scan: np.ndarray, resolution: int) -> Image.Image:
    """Return a scan as a smooth grey image, resolution x resolution, ink white on black."""
    grey = np.round(scan * (255.0 / INK)).astype(np.uint8)
    return Image.fromarray(grey).resize((resolution, resolution), Image.Resampling.BICUBIC)


def to_scan(image: Image.Image) -> np.ndarray:
    """Return an image as an 8x8 scan again, each value the mean of its block: undoes `to_image`."""
    small = image.convert("L").resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) * (INK / 255.0)


def export(output_dir: str | Path, resolution: int, digits: Collection[int] = range(10)) -> int:
    """Write the training scans of some digits as PNG files with `metadata.jsonl`, and return their
    number.

    Raises ValueError if `resolution` is not a positive multiple of 8.
    """
    _check(resolution)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, _ = split()
    rows = []
    for index, (scan, label) in enumerate(zip(train.scans, train.labels, strict=True)):
        if label not in digits:
            continue
        name = f"{index:04d}.png"
        to_image(scan, resolution).save(folder / name)
        rows.append({"file_name": name, "text": caption(int(label), index)})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return len(rows)


def export_by_class(output_dir: str | Path, resolution: int, held_out: bool = False) -> int:
    """Write the training scans (or those kept apart) as PNG files, one folder per digit, named in
    words, and return their number.

    Raises ValueError if `resolution` is not a positive multiple of 8.
    """
    _check(resolution)
    digits = split()[1 if held_out else 0]
    for index, (scan, label) in enumerate(zip(digits.scans, digits.labels, strict=True)):
        folder = Path(output_dir, f"{label}_{WORDS[label]}")
        folder.mkdir(parents=True, exist_ok=True)
        to_image(scan, resolution).save(folder / f"{index:04d}.png")
    return len(digits.labels)


def _check(resolution: int) -> None:
    if resolution < 8 or resolution % 8:
        raise ValueError(f"resolution={resolution}: take a positive multiple of 8, the scans' side")


def train_classifier() -> tuple[SVC, float]:
    """Return a classifier of flattened scans, and how often it is right on those kept apart."""
    train, held_out = split()
    classifier = SVC(gamma=0.001, C=10.0)
    classifier.fit(train.scans.reshape(-1, 64), train.labels)
    return classifier, float(classifier.score(held_out.scans.reshape(-1, 64), held_out.labels))


def main(argv: list[str] | None = None) -> int:
    """Export the scans from the command line."""
    parser = argparse.ArgumentParser(description="Export digits as a captioned image folder.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--digits", type=int, nargs="+", default=[*range(10)], help="those alone")
    parser.add_argument("--by_class", action="store_true", help="a folder per digit, no captions")
    parser.add_argument("--held_out_dir", help="export the scans kept apart, too")
    args = parser.parse_args(argv)
    if not {*args.digits} <= {*range(10)}:
        parser.error(f"--digits {' '.join(map(str, args.digits))}: take digits from 0 to 9")
    if args.by_class and len({*args.digits}) < 10:
        parser.error("--digits goes with captions: leave out --by_class")
    try:
        if args.by_class:
            count = export_by_class(args.output_dir, args.resolution)
        else:
            count = export(args.output_dir, args.resolution, args.digits)
        if args.held_out_dir:
            export_by_class(args.held_out_dir, args.resolution, held_out=True)
    except ValueError as error:
        parser.error(str(error))
    kind = "scans by class" if args.by_class else "captioned scans"
    print(f"{count} {kind} in {args.output_dir}, {HELD_OUT} kept apart")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
