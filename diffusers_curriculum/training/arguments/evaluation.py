"""Flags of the metrics that are computed while training, and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_curriculum.metrics.choices import (
    INCEPTION,
    METRICS,
    metrics_by_network,
    missing_packages,
    networks_of,
)
from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.flag import (
    BATCH,
    LEVELS,
    Family,
    Need,
    at_least,
    choice,
    count,
    place,
    sharing,
    tracked,
)
from diffusers_curriculum.training.errors import UsageError

_PIP_NAMES = {"torch_fidelity": "torch-fidelity"}

_MEASURED = Need(
    "--eval_steps and --eval_metrics", lambda a: a.eval_steps is not None or bool(a.eval_metrics)
)
_THROUGH_INCEPTION = Need(
    "a metric that looks through Inception",
    lambda a: INCEPTION in networks_of(a.eval_metrics or (), a.eval_feature_model).values(),
)


def _check(args: Any) -> None:
    """Refuse metrics that cannot be computed."""
    names = args.eval_metrics or ()
    given = f"--eval_metrics is {' '.join(names)}"
    if names and args.eval_steps is None:
        raise UsageError(f"{given}: it needs --eval_steps N, which says when.")
    if not names and args.eval_steps is not None:
        raise UsageError(
            f"--eval_steps is {args.eval_steps}: it needs --eval_metrics, one or more of "
            f"{', '.join(METRICS)}."
        )
    if len(set(names)) < len(names):
        raise UsageError(f"{given}: name each metric once.")
    if args.eval_feature_model is not None and {"fid", "fd_dinov2"} <= set(names):
        raise UsageError(
            f"{given}: with --eval_feature_model {args.eval_feature_model}, fid and fd_dinov2 are "
            "the same number: drop one of them."
        )


def _check_machine(args: Any) -> None:
    """Refuse files and packages that are not there."""
    if not args.eval_metrics:
        return
    weights, model = args.eval_feature_weights, args.eval_feature_model
    if weights is not None and not Path(weights).is_file():
        raise UsageError(f"--eval_feature_weights is {weights}: there is no such file.")
    environment.check_folder(args, "eval_feature_model", "a model that save_pretrained wrote")
    for network, metrics in metrics_by_network(networks_of(args.eval_metrics, model)).items():
        _check_packages(network, metrics)


def _check_packages(network: str, metrics: tuple[str, ...]) -> None:
    missing = [_PIP_NAMES.get(name, name) for name in missing_packages(metrics, network)]
    if not missing:
        return
    way_out = ""
    if network == INCEPTION and missing != ["torchmetrics"]:
        way_out = ", or give --eval_feature_model PATH, a network that is used instead of Inception"
    raise UsageError(
        f"--eval_metrics {' '.join(metrics)} needs {' and '.join(missing)} for the network "
        f"{network}, which cannot be found: pip install {' '.join(missing)}{way_out}."
    )


EVALUATION = Family.of(
    "metrics while training",
    count("eval_steps", help="compute metrics every N steps and at the end", metavar="N"),
    choice(
        "eval_metrics",
        METRICS,
        help="fid (arXiv 1706.08500), kid (1801.01401), fd_dinov2 (2306.04675), precision_recall "
        "(1904.06991)",
        nargs="+",
    ),
    *sharing(
        tracked(
            "eval_samples",
            int,
            1000,
            "images generated, and training images compared with; figures of different numbers "
            "cannot be compared, and published ones use 50000",
            bound=at_least(4),  # precision and recall look at the third neighbour of a sample
            most=10_000_000,  # whose features take 8 kB each
        ),
        count("eval_num_inference_steps", 50, "denoising steps per image", most=LEVELS),
        count(
            "eval_generation_batch_size", 32, "images generated at once on each device", most=BATCH
        ),
        place(
            "eval_feature_model",
            help="compute all metrics with this network: a transformers vision model, such as a "
            "classifier of your own data, as a folder or a name on the Hub",
            metavar="PATH",
        ),
        place(
            "eval_feature_weights",
            help="file with the Inception weights of torch-fidelity, instead of a download",
            metavar="PATH",
            needs=(_THROUGH_INCEPTION,),
        ),
        needs=_MEASURED,
    ),
    check=_check,
    check_machine=_check_machine,
)
