"""Count the recognised digits at each checkpoint of two runs, and draw both curves in one picture.

Prints a row of shares per run, and how many steps the first one needs for the last share of the
other, and how many times fewer that is:

    python examples/text_to_image/learning_curve.py --run sd-digits --uniform sd-digits-uniform \
        --output_dir pictures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from digits import caption, train_classifier
from recognise import PHRASINGS, generate, judge
from sklearn.svm import SVC

from diffusers_curriculum.models.loading import load_model
from diffusers_curriculum.training.process.quiet import without_torchvision_lines

Curve = Sequence[tuple[int, float]]  # (steps, share)


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return steps and folder of each checkpoint of a run, in order."""
    found = {int(folder.name.split("-")[1]): folder for folder in run.glob("checkpoint-*")}
    return sorted(found.items())


def learning_curve(
    run: Path, prompts: Sequence[str], classifier: SVC, args: argparse.Namespace
) -> Curve:
    """Return the recognised share at each checkpoint, drawn with the averaged weights."""
    from diffusers import UNet2DConditionModel  # takes seconds

    shares, settings = [], {"steps": args.num_inference_steps, "seed": args.seed, "base": str(run)}
    for step, folder in checkpoints(run):
        unet = load_model(UNet2DConditionModel, str(folder), subfolder="unet_ema")
        images = generate(str(run), list(prompts), **settings, unet=unet)
        shares.append((step, judge(images, classifier).share))
    return shares


def steps_to(curve: Curve, share: float) -> float | None:
    """Return the steps after which a curve first comes up to a share, between checkpoints by a
    straight line; None if it never does."""
    if curve[0][1] >= share:
        return curve[0][0]
    for (before, below), (after, above) in pairwise(curve):
        if below < share <= above:
            return before + (after - before) * (share - below) / (above - below)
    return None


def in_words(curve: Curve, uniform: Curve) -> str:
    """Return both curves as rows, and what they mean in steps."""
    rows = [
        f"{name:8} " + " ".join(f"{step}:{share:.2f}" for step, share in each)
        for name, each in (("run", curve), ("uniform", uniform))
    ]
    steps, (total, share) = steps_to(curve, uniform[-1][1]), uniform[-1]
    if steps is None:
        return "\n".join([*rows, f"the run never recognises uniform's {share:.2f}"])
    told = f"{share:.2f}, uniform's after {total} steps, is reached after {steps:.0f}"
    return "\n".join([*rows, f"{told}: {total / steps:.2f} times fewer"])


def draw(curve: Curve, uniform: Curve, name: str, file: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for label, each in ((name, curve), ("uniform timesteps", uniform)):
        axes.plot(*zip(*each, strict=True), marker="o", label=label)
    axes.set(xlabel="training steps", ylabel="digits recognised as prompted", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Compare two runs from the command line."""
    without_torchvision_lines()
    parser = argparse.ArgumentParser(
        description="Recognised digits at each checkpoint of two runs."
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a run with checkpoints")
    parser.add_argument("--uniform", type=Path, required=True, help="the same on uniform timesteps")
    parser.add_argument(
        "--name", default="curriculum over laplace", help="of the run, in the picture"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where the picture goes")
    parser.add_argument("--samples", type=int, default=20, help="samples per digit")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for folder in (args.run, args.uniform):
        if not checkpoints(folder):
            parser.error(f"{str(folder)!r} holds no checkpoints: train with --checkpointing_steps")
    classifier, _ = train_classifier()
    group = max(1, args.samples // len(PHRASINGS))
    prompts = [caption(digit, k // group) for digit in range(10) for k in range(args.samples)]
    curves = [learning_curve(run, prompts, classifier, args) for run in (args.run, args.uniform)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(*curves, args.name, args.output_dir / "learning_curve.png")
    print(in_words(*curves))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
