"""Checks of what the command line says about a curriculum."""

from __future__ import annotations

import argparse
from itertools import pairwise

from diffusers_curriculum.training.errors import UsageError


def check_curriculum(args: argparse.Namespace) -> None:
    """Refuse a curriculum that cannot be.

    Raises:
        UsageError: with the value and the remedy.
    """
    if args.curriculum == "none":
        return
    if args.curriculum_clustering == "explicit":
        _check_boundaries(args.curriculum_boundaries)
    if args.curriculum_pacing == "fixed":
        _require(args, "curriculum_pacing", "curriculum_stage_steps")
    elif args.curriculum_pacing != "patience":
        _require(args, "curriculum_pacing", "curriculum_total_steps")
    longest = args.curriculum_max_stage_steps
    if longest is not None and longest < args.curriculum_min_stage_steps:
        raise UsageError(
            f"--curriculum_max_stage_steps is {longest}, below --curriculum_min_stage_steps "
            f"{args.curriculum_min_stage_steps}: raise the one or lower the other."
        )


def _require(args: argparse.Namespace, chosen: str, needed: str) -> None:
    if getattr(args, needed) is None:
        raise UsageError(f"--{chosen} is {getattr(args, chosen)}: it needs --{needed} INT.")


def _check_boundaries(starts: list[int] | None) -> None:
    if not starts:
        raise UsageError(
            "--curriculum_clustering is explicit: it needs --curriculum_boundaries, the first "
            "level of each cluster from clean to noisy, for example 0 250 500 750."
        )
    rising = all(a < b for a, b in pairwise(starts))
    if starts[0] != 0 or not rising:
        shown = " ".join(map(str, starts))
        raise UsageError(
            f"--curriculum_boundaries is {shown}: begin with 0, and let each be larger than "
            "the one before it."
        )
