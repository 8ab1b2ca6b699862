"""A preview tells the truth: every number is computed anew, in numpy or by drawing."""

from __future__ import annotations

import json
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffusers_curriculum import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    LossProportionalTimestepSampler,
    MovingTimestepSampler,
)
from diffusers_curriculum.analysis.preview import (
    QUANTILES,
    log_snr_histogram,
    make_preview,
    quantiles,
)
from diffusers_curriculum.samplers import AdaptiveTimestepSampler, AutoTimestepSampler
from diffusers_curriculum.samplers.sequence import SequenceTimestepSampler
from diffusers_curriculum.weighting import loss_weights
from tests.analysis.samplers import curriculum, laplace
from tests.floors_fixtures import SCHEDULERS, table

FAMILIES = ["sd", "sd_zero_terminal", "cosine", "flow", "flow_shift_3", "edm"]


def two_phases(switch: int) -> SequenceTimestepSampler:
    return SequenceTimestepSampler.two_phase(SCHEDULERS["sd"](), switch, floor=0.0)


# -- masses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", FAMILIES)
def test_the_mass_is_what_is_drawn(scheduler: str) -> None:
    sampler = laplace(scheduler, floor=0.1)
    preview = make_preview(sampler)
    np.testing.assert_array_equal(preview.mass, sampler.probabilities().numpy())
    drawn = sampler.sample(200_000, step=0).indices.numpy()
    tenths = [share.drawn for share in preview.shares]
    starts = [share.first for share in preview.shares]
    counted = np.add.reduceat(np.bincount(drawn, minlength=len(sampler.levels)), starts) / 200_000
    np.testing.assert_allclose(counted, tenths, atol=0.005)


@pytest.mark.parametrize("correction", ["none", 0.5, "full"])
def test_the_effective_law_is_mass_times_weight_times_importance(correction: Any) -> None:
    sampler = laplace(floor=0.1, importance_correction=correction)
    weights = loss_weights("soft_min_snr", sampler.levels)
    assert weights is not None
    p = sampler.probabilities().numpy()
    kappa = {"none": 0.0, 0.5: 0.5, "full": 1.0}[correction]
    expected = p * (0.001 / p) ** kappa * weights.numpy()
    effective = make_preview(sampler, weights).effective
    np.testing.assert_allclose(effective, expected / expected.sum(), rtol=1e-9)


def test_a_full_correction_gives_back_the_uniform_law() -> None:
    effective = make_preview(laplace(floor=0.1, importance_correction="full")).effective
    np.testing.assert_allclose(effective, 1e-3)


@pytest.mark.parametrize("stage", [1, 4])
def test_a_curriculum_is_shown_with_everything_open(stage: int) -> None:
    sampler = curriculum(stage_steps=10)
    for step in range(10 * (stage - 1)):
        sampler.observe(torch.tensor([900]), torch.ones(1), step)
    expected = laplace().probabilities().numpy()
    np.testing.assert_array_equal(make_preview(sampler).mass, expected)


@pytest.mark.parametrize("within", ["base", "balanced"])
def test_every_stage_has_the_law_that_the_sampler_draws_from(within: str) -> None:
    sampler = CurriculumTimestepSampler(
        laplace(floor=0.2),
        clusters=5,
        pacing="fixed",
        pacing_args={"stage_steps": 7},
        within=within,
    )
    preview = make_preview(sampler, None, 100)
    assert preview.training.starts.tolist() == [0, 7, 14, 21, 28]
    for start, row in zip(preview.training.starts, preview.training.masses, strict=True):
        np.testing.assert_allclose(row, sampler.probabilities(int(start)).numpy(), rtol=1e-12)


def test_a_curriculum_over_a_law_that_changes() -> None:
    base = two_phases(30)
    sampler = CurriculumTimestepSampler(
        base, clusters=4, pacing="fixed", pacing_args={"stage_steps": 20}
    )
    training = make_preview(sampler, None, 100).training
    assert training.starts.tolist() == [0, 20, 30, 40, 60]
    for start, row in zip(training.starts, training.masses, strict=True):
        np.testing.assert_allclose(row, sampler.probabilities(int(start)).numpy(), rtol=1e-12)


def test_a_sequence_changes_at_its_steps() -> None:
    preview = make_preview(two_phases(437), None, 1000)
    assert preview.training.starts.tolist() == [0, 437]
    np.testing.assert_allclose(preview.mass, 1e-3)
    first = two_phases(437).probabilities(0).numpy()
    np.testing.assert_allclose(preview.training.average, 0.437 * first + 0.563e-3, rtol=1e-9)


def moving(**settings: Any) -> MovingTimestepSampler:
    return MovingTimestepSampler(SCHEDULERS["sd"](), **settings)


def test_a_law_that_moves_is_shown_over_the_run() -> None:
    sampler = moving(move_steps=300, widen_steps=600)
    preview = make_preview(sampler, None, 1001)
    training = preview.training
    assert len(training.starts) > 50
    assert 300 in training.starts
    for start, row in zip(training.starts, training.masses, strict=True):
        np.testing.assert_array_equal(row, sampler.probabilities(int(start)).numpy())
    np.testing.assert_array_equal(preview.mass, sampler.probabilities(1000).numpy())
    course = preview.to_json()["training"]["course"]
    assert [each["step"] for each in course] == [0, 250, 500, 751, 1000]
    for each in course:
        mass = sampler.probabilities(each["step"])
        assert each["mass"] == mass.tolist()
        assert each["log_snr"] == list(quantiles(sampler.levels, mass.numpy()).log_snr)
    centres = [each["log_snr"][2] for each in course]
    assert centres[:2] == sorted(centres[:2])
    assert max(abs(centre - 2) for centre in centres[2:]) < 0.3


def test_a_law_that_moves_by_patience_is_shown_as_planned_and_then_as_it_went() -> None:
    patient = {"pacing": "patience", "pacing_args": {"patience": 10}, "positions": 4}
    sampler = moving(**patient, widen_steps=6, floor=0.0)
    training = make_preview(sampler, None, 100).training
    assert training.how == "stages as on a loss plateau"
    wanted = [0, 17.8, 35.6, 53.4, 55.4, 57.4, 59.4]
    assert training.starts.tolist() == pytest.approx(wanted, abs=0.1)
    for place, row in enumerate(training.masses):
        law = {"mu": -1.0 + min(place, 3), "b": 1 + max(place - 3, 0) / 3}
        still = DensityTimestepSampler(SCHEDULERS["sd"](), "laplace", law, floor=0.0)
        np.testing.assert_allclose(row, still.probabilities().numpy(), rtol=1e-9)
    for step in range(30):
        sampler.observe(torch.tensor([500]), torch.ones(1), step)
    training = make_preview(sampler, None, 100).training
    assert (training.starts.tolist(), training.how) == ([0, 11, 22], "stages as they opened")


def test_the_course_of_stages_of_phases_and_of_what_stays() -> None:
    assert [*make_preview(laplace(), None, 100).training.course] == [0]
    assert [*make_preview(two_phases(437), None, 1001).training.course] == [0, 500]
    assert [*make_preview(curriculum(stage_steps=10), None, 40).training.course] == [0, 10, 20, 30]


@pytest.mark.parametrize("kind", [LossProportionalTimestepSampler, AutoTimestepSampler])
def test_a_law_that_learns_says_whether_it_has(kind: type[AdaptiveTimestepSampler]) -> None:
    soon: dict[str, Any] = {"bins": 4, "warm_up": 0, "refresh_every": 1, "min_observations": 1}
    learning = kind(SCHEDULERS["sd"](), **soon)
    warm_up = DensityTimestepSampler(
        SCHEDULERS["sd"](),
        learning.config["warm_up_density"],
        learning.config["warm_up_density_args"],
        floor=learning.floor,
    )
    np.testing.assert_allclose(make_preview(learning).mass, warm_up.probabilities(), rtol=1e-12)
    over = CurriculumTimestepSampler(learning, 4)
    assert make_preview(learning).training.how == "of the warm-up: nothing is learned yet"
    assert over.stage_starts(9)[1].endswith("; the base of the warm-up: nothing is learned yet")
    learning.observe(torch.arange(1000), torch.linspace(0.1, 1, 1000), 0)
    assert not np.allclose(make_preview(learning).mass, warm_up.probabilities(), rtol=0.1)
    assert make_preview(learning).training.how == "as learned so far"
    assert over.stage_starts(9)[1].endswith("; the base as learned so far")


# -- shares ----------------------------------------------------------------------------------------


def test_shares_of_a_curriculum_are_those_of_its_clusters() -> None:
    sampler = curriculum(stage_steps=10)
    weights = loss_weights("p2", sampler.levels)
    preview = make_preview(sampler, weights, 200)
    assert weights is not None
    assert preview.grouped_by == "cluster"
    assert [share.first for share in preview.shares] == list(sampler.starts)
    for cluster, share in enumerate(preview.shares):
        members = slice(share.first, share.last + 1)
        product = preview.mass * weights.numpy()
        assert share.uniform == pytest.approx((share.last + 1 - share.first) / 1000)
        assert share.drawn == pytest.approx(preview.mass[members].sum())
        assert share.effective == pytest.approx(product[members].sum() / product.sum())
        assert share.log_snr_high == float(sampler.levels.log_snr[share.first])
        assert share.log_snr_low == float(sampler.levels.log_snr[share.last])
        assert share.opens == 10 * (3 - cluster)  # the noisiest opens first
    per_step = np.stack([sampler.probabilities(step).numpy() for step in range(200)]).mean(0)
    over_run = [share.over_run for share in preview.shares]
    np.testing.assert_allclose(over_run, [g.sum() for g in np.split(per_step, sampler.starts[1:])])


def test_a_cluster_that_never_opens_says_so() -> None:
    preview = make_preview(curriculum(stage_steps=60), None, 100)
    assert [share.opens for share in preview.shares] == [None, None, 60, 0]
    assert [share.over_run for share in preview.shares][:2] == [0, 0]


def test_equal_clusters_get_the_exposure_of_the_harmonic_law() -> None:
    # arXiv 2403.10348 with N equal clusters and stages of length L: by the end of stage N cluster j
    # (1 = first) has had L (H_N - H_{j-1}) samples of a batch of 1.
    sampler = CurriculumTimestepSampler.from_scheduler(
        SCHEDULERS["sd"](),
        clusters=20,
        clustering="uniform",
        pacing="fixed",
        pacing_args={"stage_steps": 10},
    )
    preview = make_preview(sampler, None, 200)
    harmonic = np.append(0, np.cumsum(1 / np.arange(1, 21)))
    expected = [(harmonic[20] - harmonic[j - 1]) / 20 for j in range(1, 21)]
    shares = [share.over_run for share in preview.shares]
    np.testing.assert_allclose(shares[::-1], expected, rtol=1e-9)


def test_without_a_curriculum_the_schedule_is_cut_into_tenths() -> None:
    preview = make_preview(laplace())
    assert preview.grouped_by == "tenth"
    assert [share.first for share in preview.shares] == list(range(0, 1000, 100))
    np.testing.assert_allclose([share.uniform for share in preview.shares], 0.1)


def test_fewer_levels_than_tenths() -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=4)  # type: ignore[call-arg]
    preview = make_preview(DensityTimestepSampler.from_scheduler(scheduler, density="uniform"))
    assert [share.first for share in preview.shares] == [0, 1, 2, 3]


# -- quantiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", FAMILIES)
def test_quantiles_are_those_of_a_million_draws(scheduler: str) -> None:
    sampler = laplace(scheduler, floor=0.1)
    found = make_preview(sampler).quantiles["drawn"]
    indices = sampler.sample(1_000_000, step=0).indices.numpy()
    for values, got in (
        (sampler.levels.timesteps.double().numpy(), found.timestep),
        (sampler.levels.log_snr.numpy(), found.log_snr),
    ):
        ordered = np.sort(values[indices])
        for q, value in zip(QUANTILES, got, strict=True):
            at_most = np.searchsorted(ordered, value, side="right") / len(ordered)
            below = np.searchsorted(ordered, value, side="left") / len(ordered)
            assert below - 0.003 <= q <= at_most + 0.003


@pytest.mark.parametrize("count", [20, 60, 100, 140, 1000])
def test_a_sum_of_equal_parts_is_exact(count: int) -> None:
    levels = table(torch.linspace(5, -5, count, dtype=torch.float64))
    found = quantiles(levels, np.full(count, 1 / count))
    expected = [count * percent // 100 - 1 for percent in (5, 25, 50, 75, 95)]
    assert list(found.timestep) == expected
    assert list(found.log_snr) == levels.log_snr.flip(0)[expected].tolist()


def test_quantiles_by_hand() -> None:
    levels = table([4.0, 2.0, 0.0, -2.0])
    found = quantiles(levels, np.array([0.05, 0.2, 0.7, 0.05]))
    assert found.timestep == (0, 1, 2, 2, 2)
    assert found.log_snr == (-2.0, 0.0, 0.0, 0.0, 2.0)


def test_published_timesteps_of_the_laplace_law() -> None:
    narrow = laplace("linear", density_args={"mu": 0.0, "b": 0.5})
    found = make_preview(narrow).quantiles["drawn"].timestep
    np.testing.assert_allclose(found, (161, 226, 258, 292, 372), atol=1)


# -- over log-SNR ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", FAMILIES)
def test_the_histogram_holds_all_of_the_mass(scheduler: str) -> None:
    sampler = laplace(scheduler, density_args={"mu": 0.0, "b": 3.0}, floor=0.1)
    edges, (density,) = log_snr_histogram(sampler.levels, sampler.probabilities().numpy()[None])
    mass, centres = density * np.diff(edges), (edges[:-1] + edges[1:]) / 2
    assert mass.sum() == pytest.approx(1)
    levels = sampler.levels.log_snr.clamp(edges[0], edges[-1])
    mean = float((sampler.probabilities() * levels).sum())
    assert (mass * centres).sum() == pytest.approx(mean, abs=(edges[1] - edges[0]) / 2)


def test_the_histogram_by_hand() -> None:
    levels = table([3.0, 1.0, -1.0, -3.0])  # cells from 4 to -4, 2 wide
    edges, density = log_snr_histogram(levels, np.array([[0.1, 0.2, 0.3, 0.4]]), bins=8)
    np.testing.assert_allclose(edges, np.arange(-4, 5))
    np.testing.assert_allclose(density[0], [0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05, 0.05])


# -- as JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", FAMILIES)
def test_json_holds_plain_numbers_and_no_infinity(scheduler: str) -> None:
    sampler = laplace(scheduler, floor=0.1)
    weights = loss_weights("p2", sampler.levels, "sample")
    preview = make_preview(sampler, weights, 100)
    told = json.loads(json.dumps(preview.to_json(), allow_nan=False))
    np.testing.assert_array_equal(told["mass"], preview.mass)
    np.testing.assert_array_equal(told["effective"], preview.effective)
    assert told["timesteps"] == sampler.levels.timesteps.tolist()
    log_snr = [-math.inf if x is None else x for x in told["log_snr"]]
    np.testing.assert_array_equal(log_snr, sampler.levels.log_snr.numpy())
    assert told["training"]["steps"] == [0, 100]
    assert np.shape(told["training"]["density"]) == (1, len(told["training"]["edges"]) - 1)
    assert told["quantiles"]["drawn"]["timestep"] == list(preview.quantiles["drawn"].timestep)
    assert told["shares"][0]["drawn"] == preview.shares[0].drawn


def test_json_of_a_curriculum_tells_what_never_opens() -> None:
    told = make_preview(curriculum(stage_steps=60), None, 100).to_json()
    assert [share["opens"] for share in told["shares"]] == [None, None, 60, 0]


# -- words and errors ------------------------------------------------------------------------------


def test_titles() -> None:
    assert make_preview(laplace(floor=0.1)).title == "laplace(mu=1.0, b=2.0), floor=0.1"
    assert make_preview(laplace(), title="mine").title == "mine"


def test_weights_of_another_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match="1000 noise levels"):
        make_preview(laplace(), torch.ones(999))


def test_looking_changes_nothing() -> None:
    sampler = curriculum("patience", patience=3)
    sampler.sample(4)
    before = sampler.state_dict()
    make_preview(sampler, None, 100)
    after = sampler.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(after[k])) for k in before)
