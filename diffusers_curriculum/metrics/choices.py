"""Which metrics there are, and which network each of them looks through by default."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

METRICS = ("fid", "kid", "fd_dinov2", "precision_recall")
# Of what a model makes of real images, and so through no other network
OF_FEATURES = ("linear_probe",)
INCEPTION = "inception"
DINOV2 = "facebook/dinov2-large"
# What a metric reports, where that is not its own name.
_VALUES = {"precision_recall": ("precision", "recall")}
_OWN_NETWORKS = {"fid": INCEPTION, "kid": INCEPTION, "fd_dinov2": DINOV2}
# torch-fidelity imports torchvision as soon as it is imported itself.
_PACKAGES = {INCEPTION: ("torch_fidelity", "torchvision")}


def value_names(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the numbers that the metrics give, in the order asked for."""
    return tuple(name for metric in metrics for name in _VALUES.get(metric, (metric,)))


def networks_of(metrics: Sequence[str], feature_model: str | None = None) -> dict[str, str]:
    """Return the network that each metric looks through.

    FID and KID are defined with Inception (arXiv 1706.08500, 1801.01401), fd_dinov2 with DINOv2
    ViT-L/14 (arXiv 2306.04675). Precision and recall take the network of the first other metric,
    or Inception. `feature_model` replaces all; those of `OF_FEATURES` look through none. A
    ValueError refuses a name that is in neither.
    """
    metrics = [metric for metric in metrics if metric not in OF_FEATURES]
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(f"there is no metric {unknown[0]!r}; choose from {', '.join(METRICS)}")
    shared = next((_OWN_NETWORKS[m] for m in metrics if m in _OWN_NETWORKS), INCEPTION)
    return {m: feature_model or _OWN_NETWORKS.get(m, shared) for m in metrics}


def missing_packages(metrics: Sequence[str], network: str) -> tuple[str, ...]:
    """Return the packages that metrics through a network need and that are not there; nothing is
    imported."""
    needed = _PACKAGES.get(network, ("transformers",))
    if set(metrics) - {"precision_recall"}:
        needed = ("torchmetrics", *needed)
    return tuple(name for name in needed if importlib.util.find_spec(name) is None)


def metrics_by_network(networks: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the metrics that look through each network, in the order asked for."""
    named = dict.fromkeys(networks.values())
    return {network: tuple(m for m, own in networks.items() if own == network) for network in named}
