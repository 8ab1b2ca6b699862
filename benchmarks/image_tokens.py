"""Digits drawn code by code: the commands of examples/autoregressive/README.md, and what comes out.

    python -m benchmarks.image_tokens [--seeds 3] [--output_dir DIR] [--json PATH]

Trains the ViT-VQGAN of that page, and on its codes a language model with classes as the page does,
one with a curriculum over positions, and one without classes, with each seed, two at a time. Tells
of each, with 95 % intervals over the seeds, the bits per code of the scans that are kept apart, the
accuracy of a linear classifier on the features of its middle layer, beside one on pixels, and of
what it draws: the share of 500 digits that a classifier of scans recognises (with classes), and
precision and recall (arXiv 1904.06991) of 1,000 images in the features of another one. A run that
is finished in DIR is not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.evidence.curves import mean_interval
from benchmarks.evidence.data import pictures
from benchmarks.evidence.judge import distances, judge_of
from diffusers_curriculum.pipelines import ImageTokenPipeline

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "examples" / "autoregressive" / "README.md"
CURRICULUM = ("--curriculum", "difficulty", "--curriculum_clusters", "8")
CURRICULUM += ("--curriculum_pacing", "linear", "--curriculum_total_steps", "500")
INK, EACH, JUDGED = 16.0, 50, 1000  # of a scan's pixel; digits of each class; images in all
COLUMNS = ("bits", "linear_probe", "pixels", "recognised", "precision", "recall", "minutes")


def commands() -> list[list[str]]:
    """The words of the page's first commands: data, autoencoder and language model."""
    shell = re.findall(r"^```bash\n(.*?)^```", README.read_text("utf-8"), re.S | re.M)[:3]
    lines = [code.replace("\\\n", " ").replace("accelerate launch", "python") for code in shell]
    return [shlex.split(line) for line in lines]


def kinds() -> dict[str, list[str]]:
    """The command of each kind of training, without its seed and output folder."""
    words = _without(commands()[2], "--output_dir", "--seed")
    alone = [word for word in words if word != "--class_conditional"]
    return {
        "classes": words,
        "classes, curriculum": [*words, *CURRICULUM],
        "no classes": _without(alone, "--guidance_scale"),
    }


def _without(words: list[str], *flags: str) -> list[str]:
    """Words of a command but for some flags, each with its value."""
    left_out = {place for flag in flags for place in (words.index(flag), words.index(flag) + 1)}
    return [word for place, word in enumerate(words) if place not in left_out]


def run(words: Sequence[str], folder: Path) -> float:
    """Run a command of the page in a folder, and return how many minutes it took; a
    CalledProcessError says that it failed."""
    start, script = time.monotonic(), ROOT / words[1]
    with (folder / f"{words[-1]}.log").open("w") as log:
        command = [sys.executable, script, *words[2:]]
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=log)
    return (time.monotonic() - start) / 60


def train(folder: Path, seeds: int) -> dict[str, float]:
    """Minutes of each command, those of runs that are finished from when they were made."""
    kept = folder / "minutes.json"
    minutes = json.loads(kept.read_text()) if kept.is_file() else {}

    def once(name: str, words: Sequence[str]) -> None:
        if name not in minutes:
            minutes[name] = run(words, folder)
            kept.write_text(json.dumps(minutes, indent=2))

    for name, words in zip(("scans", "autoencoder"), commands(), strict=False):
        once(name, words)

    def one(made: tuple[str, int]) -> None:
        kind, seed = made
        output = output_of(kind, seed)
        once(output, [*kinds()[kind], "--seed", str(seed), "--output_dir", output])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, product(kinds(), range(seeds))))
    return minutes


def output_of(kind: str, seed: int) -> str:
    """The folder of a run."""
    return f"{kind}-{seed}".replace(", ", "-").replace(" ", "-")


def drawn(pipeline: Any, count: int, scale: float) -> list[Image.Image]:
    """As many images of each digit; of any where there are no classes."""
    images: list[Image.Image] = []
    for digit in range(10):
        asked: dict[str, Any] = {"batch_size": count}
        if pipeline.labels:
            asked = {"class_labels": [digit] * count, "guidance_scale": scale}
        images += pipeline(generator=torch.Generator().manual_seed(digit), **asked).images
    return images


def judged(output: Path, cache: Path) -> dict[str, float]:
    """What a finished run draws and knows."""
    lines = {
        name: json.loads((output / f"{name}.jsonl").read_text("utf-8").splitlines()[-1])
        for name in ("validation_loss", "linear_probe")
    }
    pipeline: Any = ImageTokenPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    digits, judging = import_module("digits"), import_module("recognise")
    real = pictures("digits")
    low, high = real.rows.min(), real.rows.max()
    images = drawn(pipeline, JUDGED // 10, 1.5)
    scans = np.stack([judging.to_scan(image).reshape(-1) for image in images])
    rows = torch.from_numpy(scans).float() / INK * (high - low) + low
    labels = torch.arange(10).repeat_interleave(JUDGED // 10)
    found = distances(judge_of("digits", cache), real, rows, labels)
    told = {"bits": lines["validation_loss"]["raw_bits"]}
    told |= {"linear_probe": lines["linear_probe"]["features"]}
    told |= {"pixels": lines["linear_probe"]["pixels"]}
    if pipeline.labels:
        classifier, _ = digits.train_classifier()
        told["recognised"] = float(judging.judge(drawn(pipeline, EACH, 1.5), classifier).share)
    return told | {name: found[name] for name in ("precision", "recall")}


def measure(folder: Path, seeds: int) -> dict[str, Any]:
    """Minutes of the first two commands, and by kind of training and by what is told of it the
    values of all seeds."""
    sys.path.insert(0, str(ROOT / "examples" / "text_to_image"))
    folder.mkdir(parents=True, exist_ok=True)
    minutes, told = train(folder, seeds), dict[str, dict[str, list[float]]]()
    for kind, seed in product(kinds(), range(seeds)):
        output = output_of(kind, seed)
        values = judged(folder / output, folder / "judge") | {"minutes": minutes[output]}
        for name, value in values.items():
            told.setdefault(kind, {}).setdefault(name, []).append(value)
    return {"minutes": {name: minutes[name] for name in ("scans", "autoencoder")}, "kinds": told}


def table(found: dict[str, Any]) -> str:
    """The means and their intervals, as a table."""
    rows = [f"| | {' | '.join(COLUMNS).replace('_', ' ')} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for kind, told in found["kinds"].items():
        cells = (str(mean_interval(told[name])) if name in told else "" for name in COLUMNS)
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description="Digits drawn code by code.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/image_tokens"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found = measure(args.output_dir.resolve(), args.seeds)
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
