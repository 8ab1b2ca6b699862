"""One step or two: MeanFlow beside flow matching on scanned digits, class by class.

    python -m benchmarks.few_steps [--seeds 5] [--max_train_steps 400] [--kinds KIND ...]
                                   [--output_dir DIR] [--json PATH]

Trains the DiT of `make demo-class`, in the latents of its autoencoder, by flow matching, by
``--formulation mean_flow``, and by that with its intervals opened over half the run, or by some of
these, with each seed, and tells, after 1, 2 and 50 steps without guidance, the share of generated
digits that a classifier of scans recognises, and how far those of one class lie apart, as a share
of how far the scans do: the mean of a class is recognised, too, and has no spread. With 95 %
intervals over the seeds. A run that is finished in DIR is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from benchmarks.evidence.curves import mean_interval

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "class_conditional"
STEPS, SAMPLES = (1, 2, 50), 50  # of the pipeline; images of each digit


def kinds(length: int) -> dict[str, tuple[str, ...]]:
    """The flags of each kind of training, of so many steps."""
    mean = ("--formulation", "mean_flow")
    return {
        "flow": ("--formulation", "flow"),
        "mean_flow": mean,
        "mean_flow, opened": (*mean, "--interval_opening_steps", str(max(1, length // 2))),
    }


def run(*command: object) -> None:
    """Run a command of this interpreter in the repository; a CalledProcessError says it failed."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def prepare(folder: Path) -> None:
    """The scans, and an autoencoder of them, unless they are there."""
    scans, size = folder / "digits", ("--resolution", 32)
    if not scans.is_dir():
        script = ROOT / "examples" / "text_to_image" / "digits.py"
        held_out = ("--held_out_dir", folder / "held_out")
        run(script, "--by_class", "--output_dir", scans, *held_out, *size)
    if not (folder / "autoencoder").is_dir():
        where = ("--train_data_dir", scans, "--output_dir", folder / "autoencoder")
        make = ("-m", "diffusers_curriculum.cli", "make-tiny", "--vae_steps", 250, "--seed", 0)
        run(*make, *where, *size)


def train(folder: Path, output: Path, length: int, seed: int, *flags: str) -> None:
    """Train one pipeline, unless it is there."""
    if (output / "model_index.json").is_file():
        return
    data = ("--train_data_dir", folder / "digits", "--resolution", 32)
    latents = ("--cache_latents", "--latent_cache_dir", folder / "latents")
    latents += ("--pretrained_vae_model_name_or_path", folder / "autoencoder")
    rates = ("--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 50)
    run(
        *(EXAMPLES / "train_class_conditional_curriculum.py", *flags, *data, *latents, *rates),
        *("--model_config", EXAMPLES / "dit_digits.json", "--output_dir", output),
        *("--train_batch_size", 64, "--max_train_steps", length, "--seed", seed),
        *("--use_ema", "--ema_decay", 0.995, "--timestep_draw", "stratified"),
        *("--no_pictures", "--overwrite_output_dir"),
    )


def judged(pipeline: Path, classifier: Any, steps: int) -> dict[str, float]:
    """The share of digits that are recognised as what they should be, and their spread."""
    judging, classes = import_module("recognise"), import_module("recognise_classes")
    how = {"samples": SAMPLES, "seed": 0, "guidance_scale": 1.0, "num_inference_steps": steps}
    images = classes.generate(classes.load(str(pipeline)), argparse.Namespace(**how))
    scans = np.stack([judging.to_scan(image).reshape(-1) for image in images])
    known, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    drawn = spread(scans, np.repeat(np.arange(10), SAMPLES)) / spread(known, labels)
    return {"recognised": float(judging.judge(images, classifier).share), "spread": drawn}


def spread(scans: np.ndarray, labels: np.ndarray) -> float:
    """The root of the mean squared distance from the mean of the class, over the classes."""
    return float(np.mean([scans[labels == k].var(0).sum() for k in range(10)]) ** 0.5)


def measure(folder: Path, length: int, seeds: int, chosen: Sequence[str]) -> dict[str, Any]:
    """By what is judged, kind and number of steps, the values of all seeds."""
    sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent / "text_to_image")]
    prepare(folder)
    classifier, right = import_module("digits").train_classifier()
    found: dict[str, Any] = {"classifier": float(right), "max_train_steps": length}
    for seed, kind in product(range(seeds), chosen):
        output = folder / f"{kind.replace(', ', '_')}-{seed}"
        train(folder, output, length, seed, *kinds(length)[kind])
        for steps in STEPS:
            for what, value in judged(output, classifier, steps).items():
                of_kind = found.setdefault(what, {}).setdefault(kind, {})
                of_kind.setdefault(str(steps), []).append(value)
    return found


def table(found: dict[str, Any]) -> str:
    """The means and their intervals, as a table."""
    rows = ["| | training | 1 step | 2 steps | 50 steps |", "|---|---|---|---|---|"]
    for what in ("recognised", "spread"):
        for kind, by_steps in found[what].items():
            cells = (str(mean_interval(values)) for values in by_steps.values())
            rows.append(f"| {what} | {kind} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Recognised digits after one step, two and fifty.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max_train_steps", type=int, default=400)
    parser.add_argument("--kinds", nargs="+", choices=kinds(1), default=[*kinds(1)])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/few_steps"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found = measure(args.output_dir.resolve(), args.max_train_steps, args.seeds, args.kinds)
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
