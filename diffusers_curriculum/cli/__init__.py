"""The `diffusers-curriculum` command: one subcommand per job, each added by one short function."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from diffusers_curriculum import __version__
from diffusers_curriculum.cli.analyze import add_analyze
from diffusers_curriculum.cli.calibrate import add_calibrate
from diffusers_curriculum.cli.compare import add_compare
from diffusers_curriculum.cli.demo import add_demo
from diffusers_curriculum.cli.preview import add_preview
from diffusers_curriculum.cli.reconstruct_ema import add_reconstruct_ema
from diffusers_curriculum.cli.train import add_train
from diffusers_curriculum.training.arguments.imports import IMPORT, import_modules
from diffusers_curriculum.training.arguments.parser import ShowDefaults
from diffusers_curriculum.training.process.quiet import without_torchvision_lines

# What a subcommand says, and its exit status.
Handler = Callable[[argparse.Namespace], tuple[str, int]]


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand: 0 when it succeeded, 2 with one line on stderr for bad input.

    A subcommand that judges something returns 1 for a bad verdict.
    """
    without_torchvision_lines()
    parser = build_parser()
    args = parser.parse_args(argv)
    handler: Handler = args.handler
    try:
        text, status = handler(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{parser.prog} {args.command}: error: {error}\n")
        return 2
    sys.stdout.write(text + "\n" if text else "")
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every subcommand in it."""
    parser = argparse.ArgumentParser(
        prog="diffusers-curriculum",
        description="Tools around curricula and timestep samplers for diffusers.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    add_demo(commands)
    _add_make_tiny(commands)
    _add_verify(commands)
    add_preview(commands)
    add_analyze(commands)
    add_calibrate(commands)
    add_compare(commands)
    add_reconstruct_ema(commands)
    return parser


def _add_make_tiny(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "make-tiny",
        help="build a small but real text-to-image pipeline, to try training anywhere",
        description="Build a small Stable Diffusion pipeline from configs. The autoencoder is"
        " trained briefly on the images, the tokenizer's words come from their captions; the text"
        " encoder and the U-Net start random. Another --type has random weights throughout."
        " Nothing is downloaded.",
        formatter_class=ShowDefaults,
    )
    add = parser.add_argument
    add("--type", default="sd", help="family of models, such as sdxl (docs/adding_a_family.md)")
    add(
        "--train_data_dir",
        help="image folder, captions in metadata.jsonl (default: none, and random weights)",
    )
    add("--output_dir", required=True, help="where the pipeline is saved")
    add("--resolution", type=int, help="side of the images in pixels (default: 32)")
    add("--vae_steps", type=int, help="training steps of the autoencoder (default: 250 on images)")
    add("--prediction_type", help="epsilon, v_prediction or sample (default: epsilon)")
    add("--seed", type=int, default=0, help="seed of all random weights and draws")
    parser.set_defaults(handler=_make_tiny)


def _make_tiny(args: argparse.Namespace) -> tuple[str, int]:
    """Build the pipeline; imported here so that `--help` need not wait for torch."""
    if args.type != "sd":
        return _make_tiny_family(args)
    from diffusers_curriculum.models.tiny import make_tiny_pipeline

    report = make_tiny_pipeline(
        args.train_data_dir,
        args.output_dir,
        resolution=32 if args.resolution is None else args.resolution,
        vae_steps=args.vae_steps,
        seed=args.seed,
        prediction_type=args.prediction_type or "epsilon",
        progress=True,
    )
    text = f"images={report.images} scaling_factor={report.scaling_factor:.4f}"
    if not math.isnan(report.reconstruction_error):  # of an autoencoder that was trained
        text += f" reconstruction_mse={report.reconstruction_error:.4f}"
    return f"{report.output_dir}: {text}", 0


def _make_tiny_family(args: argparse.Namespace) -> tuple[str, int]:
    """Build a pipeline of random weights; a ValueError tells an unknown family or an idle flag."""
    from diffusers_curriculum.training.parts.families.base import family_named

    family = family_named(args.type)
    for name in ("train_data_dir", "resolution", "vae_steps", "prediction_type"):
        value = vars(args)[name]
        if value is not None:
            raise ValueError(f"--{name} {value} has no effect with --type {args.type}: drop it.")
    if Path(args.output_dir).is_file():
        raise ValueError(f"{args.output_dir!r} is a file: give a folder to save in")
    family.save_tiny(Path(args.output_dir), args.seed)
    return f"{args.output_dir}: {family.pipeline} of random weights", 0


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="tell which checkpoints of a run are whole",
        description="Compare every file of every checkpoint with the checksums in its manifest."
        " Exit status: 0 if the newest one is whole, 1 if it is damaged, 2 if there is none.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the --output_dir of a training run")
    IMPORT.add_to(parser)
    parser.set_defaults(handler=_verify)


def _verify(args: argparse.Namespace) -> tuple[str, int]:
    """Check a run; imported here so that `--help` need not wait."""
    from diffusers_curriculum.training.checkpoint.verify import inspect_run, report_table

    import_modules("--import", args.imports)
    reports = inspect_run(args.run_dir)
    return report_table(reports), 0 if reports[-1].whole else 1
