"""Flags of the curriculum: which noise levels belong together, in which order they open, when."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from diffusers_curriculum.training.arguments.flag import (
    COUNT,
    DECAY,
    NOT_NEGATIVE,
    Bound,
    Family,
    Need,
    at_least,
    tracked,
)
from diffusers_curriculum.training.arguments.noise_levels import REPORTS, TIMESTEPS
from diffusers_curriculum.training.errors import UsageError

# Copies of names in modules that load torch; a test keeps them equal.
ORDERS = ("easy_to_hard", "hard_to_easy", "random")
CLUSTERINGS = ("auto", "log_snr", "snr", "log_snr_width", "quantile", "uniform", "explicit")
WITHIN = ("base", "balanced")
PACINGS = ("patience", "fixed", "linear", "cosine", "root")


def _check_curriculum(args: Any) -> None:
    """Refuse a curriculum that cannot be.

    Raises:
        UsageError: with the value and the remedy.
    """
    if args.curriculum == "none":
        return
    if args.curriculum_clustering == "explicit":
        _check_boundaries(args.curriculum_boundaries)
    if args.curriculum_pacing == "fixed":
        _require(args, "curriculum_stage_steps")
    elif args.curriculum_pacing != "patience":
        _require(args, "curriculum_total_steps")
    longest = args.curriculum_max_stage_steps
    if longest is not None and longest < args.curriculum_min_stage_steps:
        raise UsageError(
            f"--curriculum_max_stage_steps is {longest}, below --curriculum_min_stage_steps "
            f"{args.curriculum_min_stage_steps}: raise the one or lower the other."
        )


def _require(args: Any, needed: str) -> None:
    if getattr(args, needed) is None:
        raise UsageError(
            f"--curriculum_pacing is {args.curriculum_pacing}: it needs --{needed} INT."
        )


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


_CURRICULUM = Need("--curriculum difficulty", lambda a: a.curriculum != "none")
_EXPLICIT = Need(
    "--curriculum_clustering explicit", lambda a: a.curriculum_clustering == "explicit"
)
_COUNTED = Need(
    "a --curriculum_clustering other than explicit, whose boundaries fix the number",
    lambda a: a.curriculum_clustering != "explicit",
)
_PROGRAMMED = Need(
    "--curriculum_clustering auto, log_snr or snr",
    lambda a: a.curriculum_clustering in ("auto", "log_snr", "snr"),
)
_PATIENT = Need("--curriculum_pacing patience", lambda a: a.curriculum_pacing == "patience")
_FIXED = Need("--curriculum_pacing fixed", lambda a: a.curriculum_pacing == "fixed")
_PLANNED = Need(
    "--curriculum_pacing linear, cosine or root",
    lambda a: a.curriculum_pacing in ("linear", "cosine", "root"),
)

_SWITCH = tracked(
    "curriculum",
    str,
    "none",
    "difficulty: open clusters of noise levels one by one (arXiv 2403.10348)",
    choices=("none", "difficulty"),
    setting="sampler",
)
_OPTIONS = Family.of(
    "curriculum",
    tracked("curriculum_order", str, "easy_to_hard", "easy means noisy", choices=ORDERS),
    tracked(
        "curriculum_clusters",
        int,
        20,
        "number of clusters",
        bound=at_least(2),
        needs=(_COUNTED,),
    ),
    tracked(
        "curriculum_clustering",
        str,
        "auto",
        "auto: log_snr for variance-preserving schedulers, quantile for flow matching and EDM",
        choices=CLUSTERINGS,
    ),
    tracked(
        "curriculum_boundaries",
        int,
        help="first level of each cluster (0 = cleanest), for --curriculum_clustering explicit",
        nargs="+",
        needs=(_EXPLICIT,),
    ),
    tracked(
        "curriculum_min_size",
        int,
        help="fewest timesteps in a cluster",
        bound=COUNT,
        needs=(_PROGRAMMED,),
    ),
    tracked(
        "curriculum_within",
        str,
        "base",
        "law over the open clusters: the sampler's own, or equal mass each",
        choices=WITHIN,
    ),
    needs=_CURRICULUM,
    setting="sampler",
)
CURRICULUM = Family("curriculum", (_SWITCH, *_OPTIONS.flags), check=_check_curriculum)
_PACING = Family.of(
    "curriculum pacing",
    tracked(
        "curriculum_pacing",
        str,
        "patience",
        "patience: when the loss has stopped falling; others: by step count",
        choices=PACINGS,
    ),
    tracked(
        "curriculum_patience",
        int,
        200,
        "steps without a new best loss",
        bound=COUNT,
        needs=(_PATIENT,),
    ),
    tracked(
        "curriculum_min_delta",
        float,
        0.0,
        "a new best is lower by that",
        bound=NOT_NEGATIVE,
        needs=(_PATIENT,),
    ),
    tracked(
        "curriculum_smoothing",
        float,
        0.0,
        "decay of the averaged loss",
        bound=DECAY,
        needs=(_PATIENT,),
    ),
    tracked(
        "curriculum_min_stage_steps",
        int,
        0,
        "shortest stage",
        bound=NOT_NEGATIVE,
        needs=(_PATIENT,),
    ),
    tracked(
        "curriculum_max_stage_steps",
        int,
        help="longest stage (default: no limit)",
        bound=COUNT,
        needs=(_PATIENT,),
    ),
    tracked(
        "curriculum_stage_steps",
        int,
        help="steps per stage of fixed pacing",
        bound=COUNT,
        needs=(_FIXED,),
    ),
    tracked(
        "curriculum_total_steps",
        int,
        help="steps of a linear, cosine or root curriculum",
        bound=COUNT,
        needs=(_PLANNED,),
    ),
    needs=_CURRICULUM,
    setting="sampler",
)
_MAX_SHARE = tracked(
    "curriculum_max_share",
    float,
    0.3,
    "refuse a curriculum expected to take more than this share of the run",
    bound=Bound("greater than 0", lambda x: x > 0),
    needs=(_CURRICULUM,),
)
PACING = replace(_PACING, flags=(*_PACING.flags, _MAX_SHARE))
NOISE_LEVELS = (TIMESTEPS, CURRICULUM, PACING, REPORTS)
