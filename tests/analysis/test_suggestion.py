"""What is suggested follows from the statistics, and trains from its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_curriculum import TimestepSampler
from diffusers_curriculum.analysis.gradients import gradient_statistics
from diffusers_curriculum.analysis.probes import Probe, make_grid, probe
from diffusers_curriculum.analysis.suggestion import (
    Profile,
    beyond_linear,
    cluster_starts,
    emergence,
    half_known,
    half_known_of_data,
    least_variance,
    progress,
    suggest,
)
from tests.analysis.known_denoisers import MODELS, best, drawn, objective_of, two_dimensional
from tests.analysis.test_probes import Scale
from tests.floors_fixtures import SCHEDULERS, levels_of

KINDS = ("laplace", "table", "moving", "curriculum")
AXIS = np.linspace(-8, 8, 161)


def laplace_profile(mu: float, b: float) -> Profile:
    return Profile("test", "a known law", AXIS, np.exp(-np.abs(AXIS - mu) / b))


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.5, 1.0), (-2.0, 0.7)])
def test_a_laplace_law_is_found_again(mu: float, b: float) -> None:
    found = laplace_profile(mu, b).laplace()
    assert found["mu"] == pytest.approx(mu, abs=0.02)
    assert found["b"] == pytest.approx(b, rel=0.05)


def test_a_peak_does_not_make_a_law_of_no_width() -> None:
    assert laplace_profile(0.0, 0.01).laplace()["b"] == 0.3


def test_directions_emerge_at_their_own_variance() -> None:
    levels = levels_of("linear")
    # of variance 1, S / (1 + S)^(3/2): half below S = 3 but for what the schedule's end cuts off
    one = emergence(levels, torch.ones(3)).laplace()
    assert one["mu"] == pytest.approx(np.log(2.92), abs=0.02)
    # of variance s far below 1, s^(3/2) S'^(3/2) / (1 + S')^2 of S' = S s: half below S' = 1.87
    small = emergence(levels, torch.full((3,), 0.01))
    tail = np.linspace(-20, float(levels.edges[0]) + np.log(0.01), 20001)
    exact = np.cumsum(np.exp(1.5 * tail) / (1 + np.exp(tail)) ** 2)
    half = tail[np.searchsorted(exact, exact[-1] / 2)] - np.log(0.01)
    assert small.quantile(0.5) == pytest.approx(half, abs=0.1)
    # a direction without variance has nothing to say
    with_none = emergence(levels, torch.tensor([1.0, 0.0]))
    assert with_none.laplace() == one


@pytest.mark.parametrize("variance", [1.0, 0.1])
@pytest.mark.parametrize("kind", [*MODELS, "data"])
def test_the_law_of_what_is_half_known(kind: str, variance: float) -> None:
    """For normal data cosh((l + ln s) / 2)^-6, whatever the network predicts."""
    levels = objective_of("sample" if kind == "data" else kind).levels
    grid = make_grid(levels)
    error = variance / (1 + variance * grid.log_snr.exp())
    law = half_known_of_data(levels, torch.full((3,), variance))
    if kind != "data":
        law = half_known(Probe(grid, error[:, None].expand(-1, 2), error, 3), variance)
    expected = np.cosh((law.log_snr + np.log(variance)) / 2) ** -6.0
    ours = law.weight / law.weight.sum()
    assert np.abs(ours - expected / expected.sum()).sum() / 2 < 0.02
    (_, table, *_) = suggest(SCHEDULERS["linear"](), [law])
    assert table.name == "half_known_table"
    assert table.sampler.learns is False


def test_where_nothing_is_half_known_nothing_is_suggested() -> None:
    grid = make_grid(levels_of("flow"))
    flat = torch.ones(len(grid.indices), 2, dtype=torch.float64)
    assert half_known(Probe(grid, flat * 0, flat[:, 0], 3), 0.0).empty
    assert half_known_of_data(grid.levels, torch.zeros(3)).empty


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_suggestions_train_from_their_files(name: str, tmp_path: Path) -> None:
    scheduler = SCHEDULERS[name]()
    found = suggest(scheduler, [laplace_profile(0.5, 1.0)], clusters=4)
    assert [each.name for each in found] == [f"test_{kind}" for kind in KINDS]
    for each in found:
        file = each.save(tmp_path)
        assert file.name == "timestep_sampler_config.json"
        again = TimestepSampler.from_config(json.loads(file.read_text()))
        assert torch.equal(again.probabilities(), each.sampler.probabilities())
        drawn_now = again.sample(64, step=0)
        assert torch.equal(drawn_now.indices, each.sampler.sample(64, step=0).indices)
    laplace, table = (each.sampler.probabilities() for each in found[:2])
    # the table is the law that the other one was fitted to
    assert float((laplace - table).abs().sum()) < 0.1


def test_clusters_have_equal_parts() -> None:
    levels, profile = levels_of("cosine"), laplace_profile(0.5, 1.0)
    starts = cluster_starts(levels, profile, 4)
    assert len(starts) == 4
    inner = levels.log_snr[torch.tensor(starts[1:])].numpy()
    parts = np.interp(inner, profile.log_snr, profile.below)
    np.testing.assert_allclose(parts, [0.75, 0.5, 0.25], atol=0.02)


def test_a_law_moves_over_the_middle_of_a_profile() -> None:
    (moving,) = (
        each.sampler
        for each in suggest(SCHEDULERS["cosine"](), [laplace_profile(0.5, 1.0)])
        if each.name.endswith("_moving")
    )
    # of a Laplace law four fifths lie below mu + b ln 2.5
    reach = float(np.log(2.5))
    config = moving.config
    assert config["location_start"] == pytest.approx(0.5 - reach, abs=0.03)
    assert config["location_end"] == pytest.approx(0.5 + reach, abs=0.03)
    assert config["scale_start"] == pytest.approx(0.5, abs=0.03)


def test_profiles_of_a_network_follow_its_statistics() -> None:
    mixture, objective = two_dimensional(), objective_of("sample")
    grid, samples = make_grid(objective.levels, 12, reach=6), drawn(mixture, 400)
    worse = probe(best(mixture, objective, 0.5), objective, samples, grid)
    better = probe(best(mixture, objective), objective, samples, grid)
    ahead, learned = beyond_linear(better), progress(better, worse)
    np.testing.assert_allclose(ahead.weight[1:-1], better.beyond_linear)
    # an offset of x0 costs the same at all levels, which times sqrt(1 + S) rises
    expected = 0.25 * np.sqrt(1 + np.exp(learned.log_snr))
    np.testing.assert_allclose(learned.weight, expected, rtol=0.3)
    assert progress(worse, better).empty
    assert suggest(SCHEDULERS["linear"](), [progress(worse, better)]) == []


def test_the_law_of_least_variance_is_told_per_timestep() -> None:
    """A tabulated law has per timestep the root of the second moment, times a constant."""
    objective, network = objective_of("sample"), Scale(0.2)
    grid = make_grid(objective.levels, 16, reach=5)
    samples = drawn(two_dimensional(), 40)
    found = gradient_statistics(network, network.parameters(), objective, samples, grid)
    table = suggest(SCHEDULERS["linear"](), [least_variance(found)])[1].sampler
    assert table.settings["importance_correction"] == 1.0
    mass = table.probabilities()[grid.indices]
    mass = mass - 0.1 / 1000  # without the floor
    ratio = mass / found.second_moment.value.sqrt()
    assert float(ratio[1:-1].std() / ratio[1:-1].mean()) < 0.1


def test_too_few_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="clusters=1 must be"):
        suggest(SCHEDULERS["linear"](), [laplace_profile(0, 1)], clusters=1)
