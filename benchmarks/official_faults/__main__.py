"""Measure all rows in a process of its own, print the table, write the JSON."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.official_faults import source
from benchmarks.official_faults.report import ROWS, document, rows_of, table

ROOT = Path(__file__).parents[2]
# What must be set before the libraries are imported; the rest of the environment is kept.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
LEFT_OUT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if every row could be measured, 1 if not, 2 without an official script."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.official_faults")
    parser.add_argument("--only", nargs="+", default=[], choices=ROWS, metavar="ROW")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    place = os.environ.get("DIFFUSERS_SOURCE")
    if not place:
        return _refused("set DIFFUSERS_SOURCE to a checkout of diffusers")
    try:
        facts = source.facts(Path(place))
    except source.SourceError as error:
        return _refused(str(error))
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(_measured(Path(place), Path(folder), args.only))
    print(table(rows))
    if args.json:
        args.json.write_text(document(rows, facts), "utf-8")
    return int(not all(row.ran for row in rows))


def _measured(place: Path, folder: Path, only: list[str]) -> str:
    """The worker's document."""
    (folder / "train_text_to_image.py").write_text(source.runnable(source.official(place)), "utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    command = [sys.executable, "-m", "benchmarks.official_faults.worker", str(folder), *only]
    settings = SETTINGS | {"HF_HOME": str(folder / "home"), "TMPDIR": str(folder)}
    subprocess.run(command, env=kept | settings, cwd=folder, check=True)
    return (folder / "rows.json").read_text("utf-8")


def _refused(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
