"""Flags of the curriculum: which noise levels belong together, in which order they open, when."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from diffusers_curriculum.training.arguments.flag import (
    ABOVE_ZERO,
    DECAY,
    FROM_ZERO,
    LEVELS,
    NOT_NEGATIVE,
    Family,
    Need,
    at_least,
    choice,
    count,
    sharing,
    tracked,
)
from diffusers_curriculum.training.arguments.noise_levels import REPORTS, TIMESTEPS
from diffusers_curriculum.training.arguments.recipes import RECIPE
from diffusers_curriculum.training.errors import UsageError

# Copies of names in modules that load torch; a test keeps them equal.
ORDERS = ("easy_to_hard", "hard_to_easy", "random")
CLUSTERINGS = ("auto", "log_snr", "snr", "log_snr_width", "quantile", "uniform", "explicit")
WITHIN = ("base", "balanced")
PACINGS = ("patience", "fixed", "linear", "cosine", "root")


def _check_curriculum(args: Any) -> None:
    """Refuse a curriculum that cannot be, with the value and the remedy."""
    if args.curriculum == "none":
        return
    if args.curriculum_clustering == "explicit":
        _check_boundaries(args.curriculum_boundaries)
    pacing = args.curriculum_pacing
    needed = {"patience": None, "fixed": "curriculum_stage_steps"}
    name = needed.get(pacing, "curriculum_total_steps")
    if name is not None and args[name] is None:
        raise UsageError(f"--curriculum_pacing is {pacing}: it needs --{name} INT.")
    longest = args.curriculum_max_stage_steps
    if longest is not None and longest < args.curriculum_min_stage_steps:
        raise UsageError(
            f"--curriculum_max_stage_steps is {longest}, below --curriculum_min_stage_steps "
            f"{args.curriculum_min_stage_steps}: raise the one or lower the other."
        )


def _check_boundaries(starts: list[int] | None) -> None:
    if not starts:
        raise UsageError(
            "--curriculum_clustering is explicit: it needs --curriculum_boundaries, the first "
            "level of each cluster from clean to noisy, for example 0 250 500 750."
        )
    if starts[0] != 0 or not all(a < b for a, b in pairwise(starts)):
        raise UsageError(
            f"--curriculum_boundaries is {' '.join(map(str, starts))}: begin with 0, and let each "
            "be larger than the one before it."
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

CURRICULUM = Family.of(
    "curriculum",
    choice(
        "curriculum",
        ("none", "difficulty"),
        "none",
        "difficulty: open clusters of noise levels one by one (arXiv 2403.10348)",
    ),
    *sharing(
        choice("curriculum_order", ORDERS, "easy_to_hard", "easy means noisy"),
        tracked(
            "curriculum_clusters",
            int,
            20,
            "number of clusters",
            bound=at_least(2),
            most=LEVELS,
            needs=(_COUNTED,),
        ),
        choice(
            "curriculum_clustering",
            CLUSTERINGS,
            "auto",
            "auto: quantile, equal mass under the law that is drawn; log_snr for "
            "variance-preserving schedulers drawn uniformly; that of the run to resume",
        ),
        tracked(
            "curriculum_boundaries",
            int,
            help="first level of each cluster (0 = cleanest), for --curriculum_clustering explicit",
            nargs="+",
            bound=FROM_ZERO,
            most=LEVELS,
            needs=(_EXPLICIT,),
        ),
        count(
            "curriculum_min_size",
            help="fewest timesteps in a cluster",
            most=LEVELS,
            needs=(_PROGRAMMED,),
        ),
        choice(
            "curriculum_within",
            WITHIN,
            "base",
            "law over the open clusters: the sampler's own, or equal mass each",
        ),
        needs=_CURRICULUM,
    ),
    setting="sampler",
    check=_check_curriculum,
)
_PACING = sharing(
    choice(
        "curriculum_pacing",
        PACINGS,
        "patience",
        "patience: when the loss has stopped falling; others: by step count",
    ),
    *sharing(
        count("curriculum_patience", 200, "steps without a new best loss"),
        tracked(
            "curriculum_min_delta", float, 0.0, "a new best is lower by that", bound=NOT_NEGATIVE
        ),
        tracked("curriculum_smoothing", float, 0.0, "decay of the averaged loss", bound=DECAY),
        tracked("curriculum_min_stage_steps", int, 0, "shortest stage", bound=FROM_ZERO),
        count("curriculum_max_stage_steps", help="longest stage (default: no limit)"),
        needs=_PATIENT,
    ),
    count("curriculum_stage_steps", help="steps per stage of fixed pacing", needs=(_FIXED,)),
    count(
        "curriculum_total_steps",
        help="steps of a linear, cosine or root curriculum",
        needs=(_PLANNED,),
    ),
    setting="sampler",
)
PACING = Family.of(
    "curriculum pacing",
    *_PACING,
    tracked(
        "curriculum_max_share",
        float,
        0.3,
        "refuse a curriculum expected to take more than this share of the run",
        bound=ABOVE_ZERO,
    ),
    needs=_CURRICULUM,
)
NOISE_LEVELS = (RECIPE, TIMESTEPS, CURRICULUM, PACING, REPORTS)
