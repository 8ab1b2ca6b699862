"""Generate digits with pipelines, and count how many a classifier of real scans recognises.

Prints one line, `recognised before=.. after=.. uniform=.. n=.. classifier=..`, with --learned one
more for those digits and one for the others, and writes one picture per pipeline: a row per digit,
a column per sample, the prompts above, a red frame around what was not recognised as the digit that
the prompt asked for. A folder of an adapter is loaded into the pipeline of --before.

    python examples/text_to_image/recognise.py --before tiny-sd --after sd-digits \
        --uniform sd-digits-uniform --output_dir pictures
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import PHRASINGS, caption, to_scan, train_classifier
from PIL import Image, ImageDraw, ImageFont
from sklearn.svm import SVC

from diffusers_curriculum.models.loading import load_pipeline
from diffusers_curriculum.training.process.quiet import without_torchvision_lines

CELL = 56  # side of one sample in the picture, in pixels
INDEX, ADAPTER = "model_index.json", "pytorch_lora_weights.safetensors"  # of folders
LEFT, TOP = 64, 28  # room for the words beside the rows and above the columns


@dataclass(frozen=True)
class Samples:
    """Generated images, digit by digit, and whether each was recognised as its prompt's digit."""

    images: list[Image.Image]
    recognised: np.ndarray

    @property
    def share(self) -> float:
        """Return the share of images that were recognised."""
        return float(self.recognised.mean())

    def share_of(self, digits: Collection[int]) -> float:
        """Return the share among those of some digits."""
        return float(self.recognised.reshape(10, -1)[sorted(digits)].mean())


def is_adapter(folder: str) -> bool:
    """Return whether a folder holds an adapter, and no pipeline of its own."""
    return Path(folder, ADAPTER).is_file() and not Path(folder, INDEX).is_file()


def generate(
    folder: str, prompts: list[str], *, base: str, steps: int, seed: int, **parts: Any
) -> list[Image.Image]:
    """Return one image per prompt, all in one batch, by a pipeline or by an adapter in the base,
    but for the parts given."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline  # takes seconds

    pipeline = load_pipeline(
        StableDiffusionPipeline, base if is_adapter(folder) else folder, **parts
    )
    if is_adapter(folder):
        pipeline.load_lora_weights(folder, weight_name=ADAPTER)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    # No guidance: the training never drops a caption, so there is no unconditional model.
    output: Any = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=1.0, generator=generator
    )
    return output.images


def judge(images: list[Image.Image], classifier: SVC) -> Samples:
    """Return images, which come in equal runs of the digits 0 to 9, with the verdicts on them."""
    answers = classifier.predict(np.stack([to_scan(image).reshape(-1) for image in images]))
    return Samples(images, answers == np.repeat(np.arange(10), len(images) // 10))


def picture(samples: Samples, phrasings: bool = True) -> Image.Image:
    """Return all samples as one picture, a row per digit; phrasings of prompts above if wanted."""
    columns = len(samples.images) // 10
    grid = Image.new("RGB", (LEFT + columns * CELL, TOP + 10 * CELL), "white")
    draw = ImageDraw.Draw(grid)
    _label(draw, columns if phrasings else 0)
    for index, image in enumerate(samples.images):
        row, column = divmod(index, columns)
        left, top = LEFT + column * CELL, TOP + row * CELL
        inner = image.convert("RGB").resize((CELL - 6, CELL - 6), Image.Resampling.NEAREST)
        if not samples.recognised[index]:
            draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill="red")
        grid.paste(inner, (left + 3, top + 3))
    return grid


def _label(draw: ImageDraw.ImageDraw, columns: int) -> None:
    """Write the digits beside the rows, and the phrasings above their columns if there are any."""
    font = ImageFont.load_default(size=14)
    for digit in range(10):
        words = caption(digit, 3).removeprefix("the number ")
        draw.text((6, TOP + digit * CELL + CELL // 2 - 8), words, fill="black", font=font)
    width = columns // len(PHRASINGS) * CELL
    for index, phrasing in enumerate(PHRASINGS if columns else ()):
        text = phrasing.format(word="..", number="..")
        draw.text((LEFT + index * width + 4, 7), text, fill="black", font=font)


def pipelines(args: argparse.Namespace) -> dict[str, str]:
    """Return the folders to compare, by the names that the figures have."""
    given = {name: vars(args)[name] for name in ("before", "after", "uniform")}
    return {name: folder for name, folder in given.items() if folder is not None}


def recognise(args: argparse.Namespace) -> str:
    """Write the pictures and return the line of figures."""
    classifier, right = train_classifier()
    group = args.samples // len(PHRASINGS)
    prompts = [caption(digit, k // group) for digit in range(10) for k in range(args.samples)]
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Samples] = {}
    for name, pipeline_dir in pipelines(args).items():
        settings = {"steps": args.num_inference_steps, "seed": args.seed}
        images = generate(pipeline_dir, prompts, base=args.before, **settings)
        drawn[name] = judge(images, classifier)
        picture(drawn[name]).save(folder / f"digits_{name}.png")
    told = " ".join(f"{name}={samples.share:.2f}" for name, samples in drawn.items())
    line = f"recognised {told} n={len(prompts)} classifier={right:.2f}"
    return "\n".join([line, *by_part(drawn, args.learned or ())])


def by_part(drawn: Mapping[str, Samples], learned: Collection[int]) -> list[str]:
    """Return a line for the digits that were learned, and one for those that may be forgotten."""
    parts = {"learned": learned, "other": {*range(10)} - {*learned}} if learned else {}
    return [
        f"of the {part} digits "
        + " ".join(f"{name}={samples.share_of(digits):.2f}" for name, samples in drawn.items())
        for part, digits in parts.items()
        if digits
    ]


def main(argv: list[str] | None = None) -> int:
    """Compare pipelines from the command line."""
    without_torchvision_lines()
    parser = argparse.ArgumentParser(description="Count the generated digits that are recognised.")
    parser.add_argument("--before", required=True, help="folder of the pipeline before training")
    parser.add_argument("--after", required=True, help="folder of the pipeline after training")
    parser.add_argument("--uniform", help="folder of one trained on uniform timesteps")
    parser.add_argument(
        "--learned", type=int, nargs="+", choices=range(10), help="digits that were new to --after"
    )
    parser.add_argument("--output_dir", required=True, help="where the pictures go")
    parser.add_argument("--samples", type=int, default=20, help="samples per digit")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.samples < 1 or args.samples % len(PHRASINGS):
        parser.error(f"--samples {args.samples}: take a multiple of {len(PHRASINGS)}")
    for folder in pipelines(args).values():
        if not Path(folder, INDEX).is_file() and (folder == args.before or not is_adapter(folder)):
            parser.error(f"{folder!r} is not a pipeline folder: it has no {INDEX}")
    print(recognise(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
