"""Arguments that say which noise levels are trained on; the same for every training script.

Importing this module loads no model code.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from diffusers_curriculum.training.errors import UsageError

# Copies of names in modules that load torch; a test keeps them equal.
DRAWS = ("iid", "stratified", "antithetic", "systematic", "sobol")
ORDERS = ("easy_to_hard", "hard_to_easy", "random")
CLUSTERINGS = ("auto", "log_snr", "snr", "log_snr_width", "quantile", "uniform", "explicit")
WITHIN = ("base", "balanced")
PACINGS = ("patience", "fixed", "linear", "cosine", "root")


def is_file(timestep_sampler: str) -> bool:
    """Whether ``--timestep_sampler`` names a file and not a law."""
    return timestep_sampler.endswith(".json")


def add_timestep_arguments(parser: argparse.ArgumentParser) -> None:
    """Which noise levels are drawn, and how their losses are weighted."""
    add = parser.add_argument_group("timesteps").add_argument
    add(
        "--timestep_sampler",
        metavar="NAME",
        default="uniform",
        help="density over log-SNR that timesteps are drawn from, or sampler that learns one while "
        "the model trains (docs/catalogue.md); two_phase; or the file timestep_sampler_config.json "
        "of any sampler",
    )
    add(
        "--timestep_sampler_args",
        metavar="KEY=VALUE",
        nargs="+",
        help="its parameters, for example mu=0 b=0.5",
    )
    add(
        "--timestep_draw",
        choices=DRAWS,
        help="how a batch is drawn (default: iid; a sampler that learns has its own)",
    )
    add(
        "--timestep_floor",
        type=float,
        help="share of the uniform law mixed in, so that no level starves (default: 0.1)",
    )
    add(
        "--importance_correction",
        type=_correction,
        metavar="none|full|EXPONENT",
        help="weight losses by (uniform mass / drawn mass)^EXPONENT; full = 1 (default: none; a "
        "sampler that learns has its own)",
    )
    add(
        "--loss_weighting",
        metavar="NAME",
        default="none",
        help="loss weight as a function of log-SNR (docs/catalogue.md); uncertainty: a learned one",
    )
    add("--loss_weighting_args", metavar="KEY=VALUE", nargs="+", help="its parameters")
    _add_bias_arguments(add)
    add(
        "--show_timesteps",
        metavar="FILE|terminal",
        help="show what would be trained on in a .png, .svg or .json file, or as text, then exit",
    )


def _add_bias_arguments(add: Callable[..., object]) -> None:
    """The flags of diffusers' SDXL script, short for --timestep_sampler timestep_bias."""
    add(
        "--timestep_bias_strategy",
        choices=("none", "earlier", "later", "range"),
        default="none",
        help="draw the cleanest or the noisiest timesteps, or a range of them, more often",
    )
    add("--timestep_bias_multiplier", type=float, default=1.0, help="how much more often")
    add("--timestep_bias_begin", type=int, default=0, help="first timestep of the range")
    add("--timestep_bias_end", type=int, default=1000, help="first timestep after the range")
    add("--timestep_bias_portion", type=float, default=0.25, help="share of earlier or later ones")


def add_curriculum_arguments(parser: argparse.ArgumentParser) -> None:
    """Which noise levels belong together, and in which order they open."""
    add = parser.add_argument_group("curriculum").add_argument
    add(
        "--curriculum",
        choices=("none", "difficulty"),
        default="none",
        help="difficulty: open clusters of noise levels one by one (arXiv 2403.10348)",
    )
    add("--curriculum_order", choices=ORDERS, default="easy_to_hard", help="easy means noisy")
    add("--curriculum_clusters", type=int, default=20, help="number of clusters")
    add(
        "--curriculum_clustering",
        choices=CLUSTERINGS,
        default="auto",
        help="auto: log_snr for variance-preserving schedulers, quantile for flow matching and EDM",
    )
    add(
        "--curriculum_boundaries",
        type=int,
        nargs="+",
        help="first level of each cluster (0 = cleanest), for --curriculum_clustering explicit",
    )
    add("--curriculum_min_size", type=int, help="fewest timesteps in a cluster")
    add(
        "--curriculum_within",
        choices=WITHIN,
        default="base",
        help="law over the open clusters: the sampler's own, or equal mass each",
    )


def add_pacing_arguments(parser: argparse.ArgumentParser) -> None:
    """When the next cluster opens."""
    add = parser.add_argument_group("curriculum pacing").add_argument
    add(
        "--curriculum_pacing",
        choices=PACINGS,
        default="patience",
        help="patience: when the loss has stopped falling; others: by step count",
    )
    add("--curriculum_patience", type=int, default=200, help="steps without a new best loss")
    add("--curriculum_min_delta", type=float, default=0.0, help="a new best is lower by that")
    add("--curriculum_smoothing", type=float, default=0.0, help="decay of the averaged loss")
    add("--curriculum_min_stage_steps", type=int, default=0, help="shortest stage")
    add("--curriculum_max_stage_steps", type=int, help="longest stage (default: no limit)")
    add("--curriculum_stage_steps", type=int, help="steps per stage of fixed pacing")
    add("--curriculum_total_steps", type=int, help="steps of a linear, cosine or root curriculum")
    add(
        "--curriculum_max_share",
        type=float,
        default=0.3,
        help="refuse a curriculum expected to take more than this share of the run",
    )


def _correction(text: str) -> str | float:
    if text in ("none", "full"):
        return text
    try:
        exponent = float(text)
    except ValueError:
        exponent = math.nan
    if not 0 <= exponent <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not none, full or an exponent in [0, 1]")
    return exponent


def resolve_bias(args: argparse.Namespace) -> None:
    """Turn diffusers' bias flags into the density that they stand for, drawn without a floor.

    Raises:
        UsageError: another sampler is asked for as well.
    """
    strategy = args.timestep_bias_strategy
    if strategy == "none":
        return
    if args.timestep_sampler != "uniform":
        raise UsageError(
            f"--timestep_bias_strategy {strategy} and --timestep_sampler {args.timestep_sampler} "
            "both say what is drawn: drop one of the two."
        )
    names = ("begin", "end") if strategy == "range" else ("portion",)
    args.timestep_sampler = "timestep_bias"
    args.timestep_sampler_args = {"strategy": strategy} | {
        name: getattr(args, f"timestep_bias_{name}") for name in ("multiplier", *names)
    }
    if args.timestep_floor is None:
        args.timestep_floor = 0.0
