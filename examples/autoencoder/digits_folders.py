"""Export scikit-learn's scanned digits as two image folders: to train on, and kept apart.

    python examples/autoencoder/digits_folders.py --output_dir digits --resolution 32

writes 1,500 scans to digits/train and 297 to digits/held_out, one sub-folder per digit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "text_to_image"))

from digits import Digits, split, to_image


def export(scans: Digits, folder: Path, resolution: int) -> int:
    """Write scans as folder/<digit>/<number>.png, and return how many there are."""
    for index, (scan, label) in enumerate(zip(scans.scans, scans.labels, strict=True)):
        file = folder / str(label) / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        to_image(scan, resolution).save(file)
    return len(scans.labels)


def main(argv: list[str] | None = None) -> int:
    """Export both folders from the command line."""
    parser = argparse.ArgumentParser(description="Export digits to train on and digits kept apart.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=32)
    args = parser.parse_args(argv)
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"--resolution {args.resolution}: take a positive multiple of 8")
    for name, scans in zip(("train", "held_out"), split(), strict=True):
        print(f"{export(scans, args.output_dir / name, args.resolution)} scans in "
              f"{args.output_dir / name}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
