"""How soon a run on very many images makes its first step, and what memory that takes.

    python -m benchmarks.starting [--rows 1000000] [--kinds tar parquet] [--json PATH] [--check]

Shards with one grey pixel and a caption for each row are written into a temporary folder. The
text-to-image script makes one step of a tiny pipeline on them, by --streaming, in two processes one
after the other: with an empty cache, and again. Seconds are those from the start of a process to
the end of its first step, beside those of the processor, which other work does not lengthen; memory
is the most that it held until then. With --check the exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet

from benchmarks.evidence.measuring import processor
from diffusers_curriculum.models.tiny import MINUSCULE, make_tiny_pipeline

ROOT = Path(__file__).parents[1]
KINDS = ("tar", "parquet")
SHARD = 10_000  # rows of each
SECONDS, BYTES = 30.0, 2 * 2**30  # to the first step, at most
_RUN = """
import os, resource, sys
from diffusers_curriculum.training.loop import job
from train_text_to_image_curriculum import main

make_update = job.make_update

def once(*args):
    make_update(*args)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, flush=True)
    os._exit(0)

job.make_update = once
main(sys.argv[1:])
"""


def pixel() -> bytes:
    """A PNG of one pixel."""
    sink = io.BytesIO()
    Image.new("RGB", (1, 1)).save(sink, "PNG")
    return sink.getvalue()


def write_parquet(path: Path, first: int, count: int) -> None:
    """A shard in row groups of a thousand."""
    features = Features({"image": ImageFeature(), "text": Value("string")})
    cells = {
        "image": [{"bytes": pixel(), "path": None}] * count,
        "text": [f"caption of row {number}" for number in range(first, first + count)],
    }
    parquet.write_table(pa.table(cells, schema=features.arrow_schema), path, row_group_size=1000)


def write_tar(path: Path, first: int, count: int) -> None:
    """A shard in WebDataset's form."""
    image = pixel()
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            text = f"caption of row {number}".encode()
            for suffix, content in (("png", image), ("txt", text)):
                member = tarfile.TarInfo(f"{number:08}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_shards(kind: str, rows: int, folder: Path) -> Path:
    """All shards of a kind."""
    folder.mkdir()
    write = {"tar": write_tar, "parquet": write_parquet}[kind]
    for shard, first in enumerate(range(0, rows, SHARD)):
        write(folder / f"{shard:05}.{kind}", first, min(SHARD, rows - first))
    return folder


def start(shards: Path, pipeline: Path, work: Path, name: str) -> dict[str, float]:
    """One run of one step."""
    words = [
        *("--pretrained_model_name_or_path", str(pipeline), "--dataset_name", str(shards)),
        *("--streaming", "--cache_dir", str(work / "cache"), "--output_dir", str(work / name)),
        *("--resolution", "8", "--train_batch_size", "16", "--max_train_steps", "1"),
        *("--report_to", "none", "--seed", "0"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *words],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - begun
    processor_seconds, memory = map(float, done.stdout.split()[-2:])
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds, 1),
        "gib": round(memory / 2**30, 2),
    }


def figures(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, by kind of shards."""
    found: dict[str, Any] = {"rows": args.rows, "processor": processor()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_pipeline(None, folder / "tiny", resolution=8, vae_steps=0, sizes=MINUSCULE)
        for kind in args.kinds:
            work = folder / kind
            work.mkdir()
            shards = write_shards(kind, args.rows, work / "shards")
            runs = {each: start(shards, folder / "tiny", work, each) for each in ("first", "again")}
            found[kind] = runs
    return found


def faults(found: dict[str, Any]) -> list[str]:
    """What the check fails for, in words."""
    return [
        f"{kind}, {name}: {run['seconds']} s, {run['gib']} GiB"
        for kind in KINDS
        for name, run in found.get(kind, {}).items()
        if run["gib"] * 2**30 > BYTES or (name == "again" and run["seconds"] > SECONDS)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starting")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--check", action="store_true", help="fail where a bar is missed")
    args = parser.parse_args(argv)
    found = figures(args)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    missed = faults(found) if args.check else []
    for fault in missed:
        print(f"failed: {fault}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
