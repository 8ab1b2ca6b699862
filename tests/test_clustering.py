"""Clusters of noise levels against worked arrays and against all partitions of short tables."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_curriculum.clustering import (
    CLUSTERINGS,
    cluster_starts,
    log_snr_cells,
    optimal_partition,
)
from diffusers_curriculum.densities import make_density
from tests.floors_fixtures import levels_of, table


def _array(text: str) -> tuple[int, ...]:
    return tuple(int(v) for v in text.split(","))


# L1-optimal partitions, median, min_size 1: (starts, cost)
LOG_SNR = {
    ("linear", 5): ("0,153,394,624,823", 781.7405),
    ("linear", 10): ("0,47,132,245,370,493,608,715,816,911", 403.4357),
    ("linear", 20): (
        "0,15,40,75,120,173,232,295,358,421,484,545,602,657,710,761,812,861,908,955",
        204.5072,
    ),
    ("sd", 5): ("0,149,372,605,816", 482.7733),
    ("sd", 10): ("0,47,128,233,350,471,590,703,808,907", 250.2012),
    ("sd", 20): (
        "0,13,38,73,116,165,220,277,338,399,460,521,582,641,698,753,806,857,906,953",
        127.2564,
    ),
    ("cosine", 5): ("0,133,372,653,881", 705.5055),
    ("cosine", 10): ("0,45,124,235,372,521,668,797,898,967", 381.3229),
    ("cosine", 20): (
        "0,17,44,81,128,185,250,323,400,481,562,641,716,783,844,895,936,967,988,999",
        199.7724,
    ),
}
RAW_SNR = {
    ("linear", 5): ("0,1,2,5,18", 8074.7539),
    ("linear", 10): ("0,1,2,3,4,7,12,21,40,99", 3055.9829),
    ("linear", 20): ("0,1,2,3,4,5,6,7,8,9,12,15,18,23,30,41,58,87,140,263", 959.9184),
    ("sd", 5): ("0,1,6,29,136", 2414.7455),
    ("sd", 10): ("0,1,2,5,10,21,42,83,166,349", 1070.2936),
    ("sd", 20): ("0,1,2,3,4,5,6,9,12,17,24,33,46,63,88,123,172,245,354,535", 424.0625),
    ("cosine", 5): ("0,1,4,11,36", 24719.8166),
    ("cosine", 10): ("0,1,2,3,4,7,12,23,46,117", 10054.9497),
    ("cosine", 20): ("0,1,2,3,4,5,6,7,8,11,14,17,22,29,38,53,76,115,188,359", 3411.3357),
}
ANT = {
    ("linear", "log_snr", 5): "0,153,393,623,822",
    ("linear", "log_snr", 20): (
        "0,14,39,74,119,171,230,291,355,418,480,541,600,656,709,761,812,861,908,954"
    ),
    ("linear", "snr", 5): "0,1,2,7,22",
    ("linear", "snr", 20): "0,1,2,3,4,5,6,7,8,9,11,14,18,23,30,40,57,84,137,260",
    ("sd", "log_snr", 5): "0,149,372,605,816",
    ("sd", "log_snr", 20): (
        "0,13,37,71,114,163,218,276,336,397,460,521,581,640,697,752,805,856,905,953"
    ),
    ("sd", "snr", 5): "0,1,8,34,147",
    ("sd", "snr", 20): "0,1,2,3,4,5,7,10,14,19,26,36,49,68,93,128,178,251,361,541",
    ("cosine", "log_snr", 5): "0,133,372,653,881",
    ("cosine", "log_snr", 20): (
        "0,17,44,81,128,185,251,322,400,480,561,640,714,782,843,894,935,966,987,999"
    ),
    ("cosine", "snr", 5): "0,1,4,12,37",
    ("cosine", "snr", 20): "0,1,2,3,4,5,6,7,8,9,12,16,21,28,37,52,74,111,182,351",
}


@pytest.mark.parametrize(("name", "clusters"), LOG_SNR)
def test_optimal_partition_of_log_snr(name: str, clusters: int) -> None:
    starts, cost = LOG_SNR[name, clusters]
    levels = levels_of(name)
    assert cluster_starts(levels, clusters, min_size=1) == _array(starts)
    found, total = optimal_partition(levels.log_snr.numpy(), clusters)
    assert found == _array(starts)
    assert total == pytest.approx(cost, abs=1e-2)  # tables are float32


@pytest.mark.parametrize(("name", "clusters"), RAW_SNR)
def test_optimal_partition_of_raw_snr(name: str, clusters: int) -> None:
    starts, cost = RAW_SNR[name, clusters]
    levels = levels_of(name)
    assert cluster_starts(levels, clusters, "snr") == _array(starts)
    _, total = optimal_partition(np.exp(levels.log_snr.numpy()), clusters)
    assert total == pytest.approx(cost, rel=1e-3)


@pytest.mark.parametrize(("name", "method", "clusters"), ANT)
def test_partition_with_the_public_codes_center(name: str, method: str, clusters: int) -> None:
    starts = cluster_starts(levels_of(name), clusters, method, center="ant", min_size=1)
    assert starts == _array(ANT[name, method, clusters])


def test_the_default_min_size_changes_only_the_cosine_array_of_twenty() -> None:
    for (name, clusters), (starts, _) in LOG_SNR.items():
        found = cluster_starts(levels_of(name), clusters)
        if (name, clusters) == ("cosine", 20):
            assert found == _array(
                "0,15,40,75,118,171,232,299,372,449,526,603,676,745,808,863,908,945,972,991"
            )
        else:
            assert found == _array(starts)
    _, cost = optimal_partition(levels_of("cosine").log_snr.numpy(), 20, min_size=5)
    assert cost == pytest.approx(200.0031, abs=1e-2)


@pytest.mark.parametrize(
    ("name", "starts"),
    [("linear", "0,5,10,21,56"), ("sd", "0,5,18,59,198"), ("cosine", "0,5,10,23,64")],
)
def test_raw_snr_with_a_min_size(name: str, starts: str) -> None:
    assert cluster_starts(levels_of(name), 5, "snr", min_size=5) == _array(starts)


@pytest.mark.parametrize(
    ("clusters", "starts"),
    [
        (5, "0,189,452,699,888"),
        (20, "0,19,54,103,162,227,297,370,443,514,583,648,709,766,819,866,907,942,969,988"),
    ],
)
def test_the_terminal_level_joins_the_noisiest_cluster(clusters: int, starts: str) -> None:
    levels = levels_of("sd_zero_terminal")
    assert cluster_starts(levels, clusters) == _array(starts)


def test_a_level_of_infinite_snr_joins_the_cleanest_cluster() -> None:
    ends = table([torch.inf, 4, 3, 0, -1, -torch.inf])
    assert cluster_starts(ends, 2, min_size=1) == (0, 3)
    assert cluster_starts(ends, 2, "log_snr_width") == (0, 3)


@pytest.mark.parametrize(
    ("name", "clusters", "starts"),
    [
        ("linear", 5, "0,17,139,493,785"),
        ("linear", 10, "0,4,17,52,139,303,493,653,785,899"),
        ("sd", 5, "0,11,103,414,757"),
        ("sd", 10, "0,3,11,37,103,234,414,598,757,889"),
        ("cosine", 5, "0,74,760,987,999"),
    ],
)
def test_equal_widths_of_log_snr(name: str, clusters: int, starts: str) -> None:
    assert cluster_starts(levels_of(name), clusters, "log_snr_width") == _array(starts)


def test_equal_widths_leave_a_cell_of_the_cosine_schedule_empty() -> None:
    levels = levels_of("cosine")
    counts = np.bincount(log_snr_cells(levels.log_snr.numpy(), 10), minlength=10)
    assert counts.tolist() == [12, 62, 251, 435, 183, 44, 10, 2, 0, 1]
    with pytest.raises(ValueError, match="'log_snr_width' leaves 1 of 10 clusters empty"):
        cluster_starts(levels, 10, "log_snr_width")
    with pytest.raises(ValueError, match="leaves 3 of 20 clusters empty"):
        cluster_starts(levels, 20, "log_snr_width")


def test_uniform_clusters() -> None:
    assert cluster_starts(levels_of("sd"), 20, "uniform") == tuple(range(0, 1000, 50))
    assert cluster_starts(table([3, 2, 1, 0, -1, -2, -3]), 3, "uniform") == (0, 2, 4)


@pytest.mark.parametrize(
    ("law", "clusters", "sigma"),
    [
        ((-1.2, 1.2), 4, "0.13407 0.30119 0.67664"),
        ((-1.2, 1.2), 5, "0.10971 0.22224 0.40821 0.82691"),
        (
            (-1.2, 1.2),
            20,
            "0.04184 0.06471 0.08684 0.10971 0.13407 0.16053 0.18969 0.22224 0.25903 0.30119 "
            "0.35022 0.40821 0.47825 0.56512 0.67664 0.82691 1.04469 1.40195 2.16804",
        ),
        ((-0.4, 1.0), 5, "0.28892 0.52030 0.86359 1.55523"),
        ((-0.8, 1.6), 5, "0.11688 0.29959 0.67392 1.72736"),
    ],
)
def test_quantile_clusters_of_log_normal_sigma(
    law: tuple[float, float], clusters: int, sigma: str
) -> None:
    expected = np.array([float(v) for v in sigma.split()])
    normal = make_density("normal", torch.zeros(3), mean=-2 * law[0], std=2 * law[1])
    share = torch.arange(1, clusters, dtype=torch.float64) / clusters
    boundaries = torch.exp(-normal.icdf(1 - share) / 2).numpy()
    assert boundaries == pytest.approx(expected, abs=6e-6)
    # and on a dense table of levels the first sigma of a cluster is next to the boundary
    levels = table(torch.linspace(20, -20, 8001, dtype=torch.float64), "edm")
    starts = cluster_starts(levels, clusters, "quantile", masses=normal.masses(levels.edges))
    spacing = 40 / 8000
    found = -2 * np.log(levels.sigma[list(starts[1:])].numpy())
    assert np.abs(found + 2 * np.log(expected)).max() < spacing + 1e-4  # five digits


def test_quantile_clusters_of_a_logit_normal_noise_fraction() -> None:
    normal = make_density("normal", torch.zeros(3), mean=0.0, std=2.0)
    levels = table(torch.linspace(20, -20, 8001, dtype=torch.float64), "flow")
    starts = cluster_starts(levels, 5, "quantile", masses=normal.masses(levels.edges))
    t = levels.sigma[list(starts[1:])].tolist()
    assert t == pytest.approx([0.30119, 0.43700, 0.56300, 0.69881], abs=1e-3)


def test_quantile_clusters_of_uniform_masses_are_the_uniform_ones() -> None:
    levels = levels_of("flow")
    masses = torch.full((1000,), 1e-3, dtype=torch.float64)
    assert cluster_starts(levels, 20, "quantile", masses=masses) == tuple(range(0, 1000, 50))


def test_quantile_clusters_share_the_mass_equally() -> None:
    levels = levels_of("sd")
    masses = make_density("laplace", levels.edges, b=1.0).masses(levels.edges)
    starts = cluster_starts(levels, 8, "quantile", masses=masses)
    shares = [float(m.sum() / masses.sum()) for m in masses.tensor_split(list(starts[1:]))]
    assert shares == pytest.approx([1 / 8] * 8, abs=2 * float(masses.max()))


@pytest.mark.parametrize("boundaries", [(0, 2, 5), [0], range(0, 7, 3), np.array([0, 2, 5])])
def test_explicit_first_indices(boundaries: Any) -> None:
    levels = table([3, 2, 1, 0, -1, -2, -3])
    starts = cluster_starts(levels, method="explicit", boundaries=boundaries)
    assert starts == tuple(boundaries)


def test_explicit_log_snr_boundaries() -> None:
    levels = table([3, 2, 1, 0, -1, -2, -3])
    assert cluster_starts(levels, method="explicit", boundaries=[1.5, -0.5]) == (0, 2, 4)
    # a level on the boundary belongs to the noisier cluster
    assert cluster_starts(levels, method="explicit", boundaries=[1.0]) == (0, 2)
    terminal = levels_of("sd_zero_terminal")
    assert cluster_starts(terminal, method="explicit", boundaries=[-100.0]) == (0, 999)


@pytest.mark.parametrize(
    "boundaries",
    [[], [1, 3], [0, 3, 3], [0, 5, 2], [0, 7], [0, -1], [-0.5, 1.5], [4.0], [-9.0], [1.5, 1.5]],
)
def test_boundaries_that_do_not_partition_are_refused(boundaries: list[float]) -> None:
    levels = table([3, 2, 1, 0, -1, -2, -3])
    with pytest.raises(ValueError, match="do not partition 7 levels"):
        cluster_starts(levels, method="explicit", boundaries=boundaries)


@pytest.mark.parametrize("method", ["log_snr", "snr", "log_snr_width", "quantile", "uniform"])
def test_one_cluster_is_everything_and_starts_partition(method: str) -> None:
    levels = levels_of("sd")
    masses = torch.full((1000,), 1e-3, dtype=torch.float64) if method == "quantile" else None
    assert cluster_starts(levels, 1, method, masses=masses) == (0,)
    starts = cluster_starts(levels, 7, method, masses=masses)
    assert starts[0] == 0
    assert len(starts) == 7
    assert list(starts) == sorted(set(starts))


def test_as_many_clusters_as_levels() -> None:
    levels = table([3, 2, 1, 0, -1, -2, -3])
    for method in ("log_snr", "snr", "uniform"):
        assert cluster_starts(levels, 7, method) == tuple(range(7))


# -- brute force ----------------------------------------------------------------------------------


def _center(left: int, right: int, center: str) -> int:
    """The levels' index that stands for the run left..right."""
    if center == "median":
        return (left + right) // 2
    return min(max(round((left + right + 1) / 2), left), right)


def _brute_force(values: np.ndarray, clusters: int, center: str, min_size: int) -> float:
    best = np.inf
    for cuts in combinations(range(1, len(values)), clusters - 1):
        edges = [0, *cuts, len(values)]
        runs = list(pairwise(edges))
        if min(b - a for a, b in runs) >= min_size:
            costs = [np.abs(values[a:b] - values[_center(a, b - 1, center)]).sum() for a, b in runs]
            best = min(best, sum(costs))
    return best


@given(
    gaps=st.lists(st.floats(0.001, 10), min_size=2, max_size=10),
    clusters=st.integers(1, 5),
    center=st.sampled_from(["median", "ant"]),
    min_size=st.integers(1, 3),
)
def test_no_partition_is_cheaper(
    gaps: list[float], clusters: int, center: str, min_size: int
) -> None:
    values = 7.0 - np.cumsum([0, *gaps])
    if clusters * min_size > len(values):
        with pytest.raises(ValueError, match=r"do not fit|whole number"):
            optimal_partition(values, clusters, center=center, min_size=min_size)
        return
    starts, cost = optimal_partition(values, clusters, center=center, min_size=min_size)
    assert cost == pytest.approx(_brute_force(values, clusters, center, min_size), abs=1e-12)
    edges = [*starts, len(values)]
    sizes = np.diff(edges)
    assert (len(starts), starts[0], bool((sizes >= min_size).all())) == (clusters, 0, True)
    runs = pairwise(edges)
    own = sum(np.abs(values[a:b] - values[_center(a, b - 1, center)]).sum() for a, b in runs)
    assert own == pytest.approx(cost, abs=1e-12)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "kmeans"}, r"'kmeans' is unknown: choose from log_snr"),
        ({"clusters": 0}, r"clusters=0 must be a whole number from 1 to 1000"),
        ({"clusters": 1001}, r"clusters=1001 must be"),
        ({"clusters": 2.0}, r"clusters=2.0 must be"),
        ({"clusters": True}, r"clusters=True must be"),
        ({"center": "mean"}, r"center='mean' is unknown: choose from median, ant"),
        ({"min_size": 60}, r"20 clusters of at least min_size=60"),
        ({"min_size": 0}, r"min_size=0"),
        ({"method": "uniform", "min_size": 3}, r"min_size=3 has no effect"),
        ({"method": "quantile"}, r"pass masses"),
        ({"boundaries": [0, 5]}, r"boundaries=\[0, 5\] has no effect .*or choose from explicit\."),
        ({"method": "uniform", "center": "ant"}, r"center='ant' has no effect .* log_snr, snr\."),
        ({"minimal": 3}, r"minimal=3 has no effect with clustering 'log_snr': leave it out\."),
        ({"method": "explicit"}, r"'explicit' and boundaries go together"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_starts(levels_of("sd"), **arguments)


def test_a_quantile_cluster_narrower_than_a_level_is_refused() -> None:
    masses = torch.zeros(1000, dtype=torch.float64)
    masses[500] = 1.0
    with pytest.raises(ValueError, match="'quantile' leaves 1 of 4 clusters empty"):
        cluster_starts(levels_of("sd"), 4, "quantile", masses=masses)


def test_every_method_is_named() -> None:
    expected = {"log_snr", "snr", "log_snr_width", "quantile", "uniform", "explicit"}
    assert set(CLUSTERINGS) == expected
