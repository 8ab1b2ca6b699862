"""`diffusers-curriculum calibrate`: a law before training, as a sampler's config."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_curriculum.cli.analyze import ANALYSIS, Found, check_useful, device_of, find_source
from diffusers_curriculum.cli.preview import add_flags
from diffusers_curriculum.cli.reconstruct_ema import check_output
from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.flag import Family

if TYPE_CHECKING:
    from diffusers_curriculum.analysis.suggestion import Profile
    from diffusers_curriculum.training.parts.analysed import Analysed

_TOLD = (0.05, 0.25, 0.5, 0.75, 0.95)  # shares of the law
*_DATA, _MEASURED = ANALYSIS.families
_KEPT = ("samples", "bins", "batch_size", "seed", "device")
CALIBRATION = CommandLine(
    "What a calibration knows of a training command.",
    (*_DATA, Family("calibration", tuple(f for f in _MEASURED.flags if f.name in _KEPT))),
)


def add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "calibrate",
        help="find the law of the noise levels at which images are half known, before training",
        description="Find a law of what is known before training: draws"
        " go to the noise levels at which the network half knows the images, or, of a scheduler"
        " alone, at which their mean and covariance half tell them. Writes a sampler's config for"
        " --timestep_sampler_config, which learns nothing and can be drawn from again.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="pipeline folder or --output_dir of a finished run, to train it further; or a"
        " scheduler's folder or config file (the data alone), to train from scratch",
    )
    add("--output_dir", required=True, help="where the config is written; a new folder")
    add_flags(parser, CALIBRATION)
    parser.set_defaults(handler=_calibrate)


def _calibrate(args: argparse.Namespace) -> tuple[str, int]:
    """Check, load, measure, write; imported late so that `--help` need not wait."""
    from diffusers_curriculum.analysis.suggestion import tabulated
    from diffusers_curriculum.training.parts.analysed import load_analysed
    from diffusers_curriculum.training.parts.study import half_known_by

    own = CALIBRATION.parse([word for flag in args.training_flags for word in flag])
    output, found = Path(args.output_dir).resolve(), find_source(args.source)
    check_output(output, [])
    check_useful(own, found, "bins")
    analysed = load_analysed(own, found.folder, found.scheduler, device_of(own.device))
    profile = half_known_by(own, analysed)
    tabulated(analysed.scheduler, profile).sampler.save_pretrained(str(output))
    file = output / "timestep_sampler_config.json"
    lines = [*_told(profile, analysed), *_warnings(own, found, analysed)]
    return "\n".join([*lines, f"--timestep_sampler_config {file}"]), 0


def _told(profile: Profile, analysed: Analysed) -> list[str]:
    """Where the law lies, and what uniform draws make of it."""
    from diffusers_curriculum.analysis.advice import normalised
    from diffusers_curriculum.analysis.difficulty import std_of

    low, first, middle, third, high = (profile.quantile(share) for share in _TOLD)
    log_snr = analysed.objective.levels.log_snr
    outside = float(((log_snr < low) | (log_snr > high)).double().mean())
    return [
        f"law: {profile.reason}",
        f"log-SNR: median {middle:.2f}, quartiles {first:.2f} and {third:.2f}, central 90 % from "
        f"{low:.2f} to {high:.2f}",
        normalised((first, middle, third), std_of(analysed.samples)),
        f"{outside:.0%} of uniform draws lie outside its central 90 %",
    ]


def _warnings(own: Any, found: Found, analysed: Analysed) -> list[str]:
    """What the reader of this very law should know."""
    if found.folder is None:
        count = len(analysed.samples)
        return [f"Mean and covariance were told from {count} samples: a network learns more."]
    return [
        f"The network was probed with {own.samples} samples of the data given. Give data that it "
        "was not trained on, else the law is that of what it remembers."
    ]
