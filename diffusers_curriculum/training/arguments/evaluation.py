"""Flags of the metrics that are computed while training, and their checks."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers_curriculum.metrics.choices import (
    INCEPTION,
    METRICS,
    metrics_by_network,
    missing_packages,
    networks_of,
)
from diffusers_curriculum.training.errors import UsageError

_AT_LEAST = {
    "eval_steps": 1,
    "eval_samples": 4,  # precision and recall look at the third neighbour of a sample
    "eval_num_inference_steps": 1,
    "eval_generation_batch_size": 1,
}
_PIP_NAMES = {"torch_fidelity": "torch-fidelity"}


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Metrics while training."""
    add = parser.add_argument_group("metrics while training").add_argument
    add("--eval_steps", type=int, metavar="N", help="compute metrics every N steps and at the end")
    add(
        "--eval_metrics",
        nargs="+",
        choices=METRICS,
        help="fid (arXiv 1706.08500), kid (1801.01401), fd_dinov2 (2306.04675), precision_recall "
        "(1904.06991)",
    )
    add(
        "--eval_samples",
        type=int,
        default=1000,
        help="images generated, and training images compared with; figures of different numbers "
        "cannot be compared, and published ones use 50000",
    )
    add("--eval_num_inference_steps", type=int, default=50, help="denoising steps per image")
    add(
        "--eval_generation_batch_size",
        type=int,
        default=32,
        help="images generated at once on each device",
    )
    add(
        "--eval_feature_model",
        metavar="PATH",
        help="compute all metrics with this network: a transformers vision model, such as a "
        "classifier of your own data, as a folder or a name on the Hub",
    )
    add(
        "--eval_feature_weights",
        metavar="PATH",
        help="file with the Inception weights of torch-fidelity, instead of a download",
    )


def check_evaluation(args: argparse.Namespace) -> None:
    """Refuse metrics that cannot be computed, and options that would do nothing.

    Raises:
        UsageError: with the value and the remedy.
    """
    if args.eval_steps is None and not args.eval_metrics:
        _refuse_without(args, _options(), "--eval_steps and --eval_metrics")
        return
    _check_pair(args)
    for name, least in _AT_LEAST.items():
        if getattr(args, name) < least:
            raise UsageError(f"--{name} is {getattr(args, name)}: it must be at least {least}.")
    _check_metrics(args)
    networks = networks_of(args.eval_metrics, args.eval_feature_model)
    if INCEPTION not in networks.values():
        _refuse_without(args, ("eval_feature_weights",), "a metric that looks through Inception")
    _check_paths(args)
    for network, metrics in metrics_by_network(networks).items():
        _check_packages(network, metrics)


def _options() -> tuple[str, ...]:
    defaults = vars(_defaults())
    return tuple(name for name in defaults if name not in ("eval_steps", "eval_metrics"))


def _defaults() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_evaluation_arguments(parser)
    return parser.parse_args([])


def _refuse_without(args: argparse.Namespace, names: tuple[str, ...], needs: str) -> None:
    defaults = _defaults()
    for name in names:
        if getattr(args, name) != getattr(defaults, name):
            raise UsageError(
                f"--{name} is {getattr(args, name)}, which has no effect without {needs}: add "
                f"that, or drop --{name}."
            )


def _check_pair(args: argparse.Namespace) -> None:
    if args.eval_steps is None:
        raise UsageError(
            f"--eval_metrics is {' '.join(args.eval_metrics)}: it needs --eval_steps N, which says "
            "when."
        )
    if not args.eval_metrics:
        raise UsageError(
            f"--eval_steps is {args.eval_steps}: it needs --eval_metrics, one or more of "
            f"{', '.join(METRICS)}."
        )


def _check_metrics(args: argparse.Namespace) -> None:
    names = args.eval_metrics
    if len(set(names)) < len(names):
        raise UsageError(f"--eval_metrics is {' '.join(names)}: name each metric once.")
    if args.eval_feature_model is not None and {"fid", "fd_dinov2"} <= set(names):
        raise UsageError(
            f"--eval_metrics is {' '.join(names)}: with --eval_feature_model "
            f"{args.eval_feature_model}, fid and fd_dinov2 are the same number: drop one of them."
        )


def _check_paths(args: argparse.Namespace) -> None:
    weights, model = args.eval_feature_weights, args.eval_feature_model
    if weights is not None and not Path(weights).expanduser().is_file():
        raise UsageError(f"--eval_feature_weights is {weights}: there is no such file.")
    if model is not None and model.startswith(("/", "./", "../", "~")):
        if Path(model).expanduser().is_dir():
            return
        raise UsageError(
            f"--eval_feature_model is {model}: there is no such folder. Give one that "
            "save_pretrained wrote, or the name of a repository on the Hub."
        )


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
