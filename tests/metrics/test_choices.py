"""Which metric looks through which network."""

from __future__ import annotations

import pytest

from diffusers_curriculum.metrics.choices import (
    DINOV2,
    INCEPTION,
    METRICS,
    metrics_by_network,
    missing_packages,
    networks_of,
    value_names,
)


@pytest.mark.parametrize(
    ("metrics", "networks"),
    [
        (["fid", "kid"], [INCEPTION, INCEPTION]),
        (["fd_dinov2"], [DINOV2]),
        (["precision_recall"], [INCEPTION]),
        (["precision_recall", "fd_dinov2", "fid"], [DINOV2, DINOV2, INCEPTION]),
        (["fid", "precision_recall", "fd_dinov2"], [INCEPTION, INCEPTION, DINOV2]),
    ],
)
def test_default_networks(metrics: list[str], networks: list[str]) -> None:
    assert networks_of(metrics) == dict(zip(metrics, networks, strict=True))


def test_one_network_for_all() -> None:
    assert set(networks_of(METRICS, "mine").values()) == {"mine"}
    assert metrics_by_network(networks_of(METRICS, "mine")) == {"mine": METRICS}


def test_values_come_in_the_order_asked_for() -> None:
    assert value_names(["kid", "precision_recall", "fid"]) == ("kid", "precision", "recall", "fid")


def test_an_unknown_metric_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'fad'; choose from fid, kid"):
        networks_of(["fid", "fad"])


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"transformers"}
    found = lambda name: object() if name in there else None  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", found)
    assert missing_packages(["fid"], INCEPTION) == ("torchmetrics", "torch_fidelity", "torchvision")
    assert missing_packages(["precision_recall"], INCEPTION) == ("torch_fidelity", "torchvision")
    assert missing_packages(["fd_dinov2"], DINOV2) == ("torchmetrics",)
    assert missing_packages(["precision_recall"], "mine") == ()
