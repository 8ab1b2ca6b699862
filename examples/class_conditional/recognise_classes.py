"""Generate digits class by class, and count how many a classifier of real scans recognises.

Prints one line, `recognised after=.. uniform=.. n=.. guidance=.. classifier=..`, and writes one
picture: a row per digit, a column per sample, a red frame around what was not recognised as the
row's digit.

    python examples/class_conditional/recognise_classes.py --pipeline dit-digits --output_dir .
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from diffusers_curriculum.models.loading import load_pipeline
from diffusers_curriculum.training.process.quiet import without_torchvision_lines

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text_to_image"))
from digits import WORDS, train_classifier
from recognise import Samples, judge, picture

SHOWN = 20  # samples of each digit in the picture


def load(folder: str) -> DiffusionPipeline:
    """Return a saved pipeline: DiTPipeline by its own name, else ClassConditionalPipeline."""
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler  # takes seconds

    from diffusers_curriculum.pipelines import ClassConditionalPipeline

    index = DiffusionPipeline.load_config(folder)
    own = "ClassConditionalPipeline" in index["_class_name"]
    kind = ClassConditionalPipeline if own else DiffusionPipeline
    pipeline = load_pipeline(kind, folder)
    if hasattr(pipeline.scheduler.config, "beta_schedule"):
        solver = DPMSolverMultistepScheduler
        pipeline.scheduler = solver.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def generate(pipeline: DiffusionPipeline, args: argparse.Namespace) -> list[Image.Image]:
    """Return the same number of images of each digit, digit by digit."""
    images = []
    for digit in range(len(WORDS)):
        generator = torch.Generator().manual_seed(args.seed + digit)
        images += pipeline(
            class_labels=[digit] * args.samples,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            generator=generator,
        ).images
    return images


def first_of_each(samples: Samples, each: int) -> Samples:
    """Return the first samples of each digit, as many as a picture shows."""
    kept = [digit * each + n for digit in range(len(WORDS)) for n in range(min(each, SHOWN))]
    return Samples([samples.images[i] for i in kept], samples.recognised[kept])


def main(argv: list[str] | None = None) -> int:
    """Judge a pipeline from the command line."""
    without_torchvision_lines()
    parser = argparse.ArgumentParser(description="Count the generated digits that are recognised.")
    parser.add_argument("--pipeline", required=True, help="folder of the trained pipeline")
    parser.add_argument("--uniform", help="folder of one trained on uniform timesteps")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the picture goes")
    parser.add_argument("--samples", type=int, default=50, help="samples per digit")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    classifier, right = train_classifier()
    given = {"after": args.pipeline, "uniform": args.uniform}
    judged = {
        name: judge(generate(load(folder), args), classifier)
        for name, folder in given.items()
        if folder is not None
    }
    samples = judged["after"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    grid = picture(first_of_each(samples, args.samples), phrasings=False)
    grid.save(args.output_dir / "digits_by_class.png")
    shares = " ".join(f"{name}={each.share:.2f}" for name, each in judged.items())
    print(
        f"recognised {shares} n={len(samples.images)} guidance={args.guidance_scale:g}"
        f" classifier={right:.2f}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
