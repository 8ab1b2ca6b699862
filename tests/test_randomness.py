"""Random numbers as pure functions: purity, marginals, evenness, independence, isolation."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusers_curriculum import randomness
from diffusers_curriculum.randomness import DRAWS, Slots, gaussian, host_generator, key, uniforms
from tests.floors_fixtures import untouched_global_generators

each_draw = pytest.mark.parametrize("draw", sorted(DRAWS))
STEPS = 4000
SIGNIFICANCE = 1e-4


def _whole(draw: str, total: int, step: int = 0, seed: int = 0) -> Tensor:
    return uniforms(draw, seed=seed, step=step, slots=Slots(0, total, total))


def _many(draw: str, total: int, steps: int, **kwargs: Any) -> np.ndarray:
    """(steps, total) the global batches of consecutive steps."""
    settings: dict[str, Any] = {"seed": 3} | kwargs
    slots = Slots(0, total, total)
    return np.stack([uniforms(draw, step=s, slots=slots, **settings).numpy() for s in range(steps)])


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]))


# -- slots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "count", "total"),
    [(-1, 2, 4), (0, 0, 4), (3, 2, 4), (4, 1, 4), (0, -1, 4), (0, 1, 0)],
)
def test_impossible_slots_are_refused(start: int, count: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"do not fit a global batch of {total}"):
        Slots(start, count, total)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (1, 3), (4, 2), (3, 5)])
def test_slots_of_all_ranks_and_micro_steps_tile_the_global_batch(
    ranks: int, accumulation: int
) -> None:
    slots = [
        Slots.of(2, rank=r, world_size=ranks, micro_step=a, accumulation=accumulation)
        for a, r in product(range(accumulation), range(ranks))
    ]
    total = 2 * ranks * accumulation
    assert [slot for s in slots for slot in s] == list(range(total))
    assert {s.total for s in slots} == {total}


def test_slots_here_follow_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Slots.here(5) == Slots(0, 5, 5)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert Slots.here(5) == Slots(10, 5, 20)


# -- purity ----------------------------------------------------------------------------------------


@each_draw
def test_same_arguments_same_numbers(draw: str) -> None:
    slots = Slots(2, 3, 8)
    first = uniforms(draw, seed=5, step=9, slots=slots)
    host_generator(1, purpose="in between").random(100)
    assert torch.equal(first, uniforms(draw, seed=5, step=9, slots=slots))
    assert first.dtype == torch.float64
    assert first.shape == (3,)
    for other in ({"seed": 6}, {"step": 10}, {"purpose": "other"}):
        arguments: dict[str, Any] = {"seed": 5, "step": 9, "slots": slots} | other
        assert not torch.equal(first, uniforms(draw, **arguments))


@each_draw
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_ranks_and_accumulation_share_out_one_global_batch(
    draw: str, ranks: int, accumulation: int
) -> None:
    batch = 16 // (ranks * accumulation)
    parts = [
        uniforms(
            draw,
            seed=1,
            step=4,
            slots=Slots.of(
                batch, rank=r, world_size=ranks, micro_step=a, accumulation=accumulation
            ),
        )
        for a, r in product(range(accumulation), range(ranks))
    ]
    assert torch.equal(torch.cat(parts), _whole(draw, 16, step=4, seed=1))
    assert len(set(torch.cat(parts).tolist())) == 16


def test_numbers_are_pinned() -> None:
    """A change of these makes every saved run irreproducible: it needs a note to users."""
    assert key(0, 1, 2, purpose="noise") == 0x812DA4F957ED5A6C19E209C7402AD715
    stratified = [0.22142340244298006, 0.7467090522632652, 0.6156860450491589]
    assert _whole("stratified", 3).tolist() == stratified
    sobol = [0.8827693616350556, 0.38276936163505565, 0.5077693616350556]
    assert _whole("sobol", 3, step=1).tolist() == sobol
    noise = gaussian((2,), seed=0, step=0, slots=Slots(0, 1, 1), purpose="noise")
    assert noise.tolist() == [[-0.5960759520530701, 1.4730345010757446]]


@pytest.mark.parametrize("arguments", [(0,), (3, 1, 2), (-5, 2**40)])
def test_generators_are_numpys_philox_with_that_key(arguments: tuple[int, ...]) -> None:
    ours = host_generator(*arguments, purpose="noise")
    theirs = np.random.Generator(np.random.Philox(key=key(*arguments, purpose="noise")))
    assert np.array_equal(ours.random(1000), theirs.random(1000))
    assert np.array_equal(ours.permutation(100), theirs.permutation(100))
    assert ours.standard_normal() == theirs.standard_normal()


@pytest.mark.parametrize("total", [1, 5, 64])
def test_each_draw_is_its_published_construction(total: int) -> None:
    """Written out with numpy alone, apart from the key."""

    def reference(draw: str) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=key(7, 12, purpose="timestep")))
        if draw == "iid":
            return rng.random(total)
        if draw == "antithetic":
            half = rng.random((total + 1) // 2)
            return rng.permutation(np.concatenate([half, 1 - half])[:total])
        if draw == "sobol":
            shift = key(7, purpose="timestep sequence") % 2**53
            bits = [f"{i:053b}"[::-1] for i in range(12 * total, 13 * total)]
            return rng.permutation([((int(b, 2) ^ shift) + 0.5) / 2**53 for b in bits])
        strata = rng.permutation(total)
        if draw == "systematic":
            return (strata / total + rng.random()) % 1
        return (strata + rng.random(total)) / total

    for draw in DRAWS:
        assert _whole(draw, total, step=12, seed=7).tolist() == reference(draw).tolist()


def test_bits_are_reversed() -> None:
    indices = [0, 1, 2, 3, 255, 256, 2**52, 2**53 - 1, 2**53, 2**63 + 5, 0xDEADBEEFCAFE]
    expected = [int(f"{i % 2**53:053b}"[::-1], 2) for i in indices]
    found = randomness._radical_inverse(np.array(indices, dtype=np.uint64))
    assert found.tolist() == expected


def test_keys_differ_in_every_argument() -> None:
    keys = {
        key(seed, *counters, purpose=purpose)
        for seed, counters, purpose in product(
            range(4), [(), (0,), (1,), (0, 1), (1, 0), (11,), (1, 1)], ["a", "b", "a:0", "a', 0"]
        )
    }
    assert len(keys) == 4 * 7 * 4
    assert all(0 <= k < 2**128 for k in keys)


# -- marginals and evenness ------------------------------------------------------------------------


@each_draw
def test_every_slot_is_uniform_over_many_steps(draw: str) -> None:
    numbers = _many(draw, 5, STEPS)
    worst = min(stats.kstest(column, "uniform").pvalue for column in numbers.T)
    assert worst > SIGNIFICANCE / (len(DRAWS) * 5)


@each_draw
def test_a_batch_of_one_is_uniform(draw: str) -> None:
    numbers = _many(draw, 1, STEPS)
    assert stats.kstest(numbers[:, 0], "uniform").pvalue > SIGNIFICANCE / len(DRAWS)


class _Constant:
    """A generator that always says the same and shuffles nothing."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self, size: int | None = None) -> Any:
        return self.value if size is None else np.full(size, self.value)

    def permutation(self, x: Any) -> np.ndarray:
        return np.arange(x) if isinstance(x, int) else np.asarray(x)


@each_draw
@pytest.mark.parametrize("value", [0.0, 1 - 2.0**-53])
def test_numbers_stay_inside_the_open_interval(
    draw: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randomness, "host_generator", lambda *a, **k: _Constant(value))
    for total in (1, 2, 3, 7, 49, 1000):
        u = _whole(draw, total)
        assert float(u.min()) > 0
        assert float(u.max()) < 1


def test_sobol_stays_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for shift in (0, 2**53 - 1):
        monkeypatch.setattr(randomness, "key", lambda *a, shift=shift, **k: shift)
        u = _whole("sobol", 4)
        assert float(u.min()) > 0
        assert float(u.max()) < 1


@pytest.mark.parametrize("total", [1, 2, 3, 4, 8, 49, 98, 103, 107, 1000])
@pytest.mark.parametrize("draw", ["stratified", "systematic"])
def test_each_stratum_is_hit_exactly_once(draw: str, total: int) -> None:
    for step in range(20):
        u = _whole(draw, total, step)
        if draw == "systematic":  # relative to its own shift
            u = (u - u.min()) + 0.5 / total
        assert torch.equal((u * total).long().sort().values, torch.arange(total))


def test_systematic_is_the_grid_of_its_paper() -> None:
    u = DRAWS["systematic"](_Constant(0.3), 4, 0, 0)  # type: ignore[arg-type]
    assert u == pytest.approx([0.3, 0.55, 0.8, 0.05])


@pytest.mark.parametrize("total", [2, 7, 16])
def test_antithetic_numbers_come_in_pairs(total: int) -> None:
    for step in range(10):
        u = _whole("antithetic", total, step)
        partners = (1 - u[:, None] - u[None, :]).abs() < 1e-12
        assert int(partners.any(1).sum()) == total - total % 2


@pytest.mark.parametrize(("total", "steps"), [(8, 4), (1, 32), (6, 16), (32, 1)])
def test_sobol_runs_on_over_the_steps(total: int, steps: int) -> None:
    """Whole blocks of 32 consecutive points have one in each 32nd of (0, 1)."""
    numbers = _many("sobol", total, steps)
    counts = np.bincount((numbers.ravel() * 32).astype(int), minlength=32)
    assert counts.tolist() == [total * steps // 32] * 32


def test_sobol_is_more_even_than_chance() -> None:
    def discrepancy(draw: str) -> float:
        return float(stats.kstest(_many(draw, 10, 100).ravel(), "uniform").statistic)

    assert discrepancy("sobol") < discrepancy("iid") / 5


@pytest.mark.parametrize("draw", ["stratified", "systematic", "sobol"])
def test_even_draws_have_less_variance_than_iid(draw: str) -> None:
    def variance(mode: str) -> float:
        return float(np.exp(_many(mode, 8, 2000)).mean(axis=1).var())

    assert variance(draw) < variance("iid") / 5


def test_strata_are_dealt_to_slots_in_random_order() -> None:
    strata = (_many("stratified", 4, STEPS) * 4).astype(int)
    table = np.stack([np.bincount(strata[:, slot], minlength=4) for slot in range(4)])
    assert stats.chisquare(table.ravel()).pvalue > SIGNIFICANCE


# -- independence ----------------------------------------------------------------------------------

INDEPENDENT = sorted(set(DRAWS) - {"sobol"})  # its points are even over the steps: not independent


@pytest.mark.parametrize("draw", INDEPENDENT)
def test_consecutive_steps_are_uncorrelated(draw: str) -> None:
    numbers = _many(draw, 4, STEPS + 1)
    for lag in (1, 2):
        a, b = numbers[:-lag, 0], numbers[lag:, 0]
        assert _correlation(a, b) < 4 / np.sqrt(len(a))


@pytest.mark.parametrize("draw", INDEPENDENT)
def test_purposes_and_seeds_are_uncorrelated(draw: str) -> None:
    numbers = _many(draw, 2, STEPS)
    bound = 4 / np.sqrt(STEPS)
    for slot in range(2):
        other = _many(draw, 2, STEPS, purpose="dropout")
        assert _correlation(numbers[:, slot], other[:, slot]) < bound
        other = _many(draw, 2, STEPS, seed=4)
        assert _correlation(numbers[:, slot], other[:, slot]) < bound


def test_iid_slots_are_uncorrelated() -> None:
    numbers = _many("iid", 4, STEPS)
    for a, b in [(0, 1), (0, 3), (1, 2)]:
        assert _correlation(numbers[:, a], numbers[:, b]) < 4 / np.sqrt(STEPS)


def test_noise_is_uncorrelated_between_slots_steps_seeds_and_purposes() -> None:
    def noise(**kwargs: Any) -> np.ndarray:
        arguments: dict[str, Any] = {"seed": 0, "step": 0, "purpose": "noise"} | kwargs
        slots = arguments.pop("slots", Slots(0, 1, 2))
        return gaussian((100, 100), slots=slots, **arguments).numpy()

    base = noise()
    for other in (
        noise(slots=Slots(1, 1, 2)),
        noise(step=1),
        noise(seed=1),
        noise(purpose="posterior"),
    ):
        assert _correlation(base, other) < 4 / np.sqrt(base.size)


def test_timesteps_and_noise_are_uncorrelated() -> None:
    slots = Slots(0, 1, 1)
    u = _many("iid", 1, STEPS)[:, 0]
    z = [gaussian((1,), seed=3, step=s, slots=slots, purpose="noise").item() for s in range(STEPS)]
    assert _correlation(u, np.array(z)) < 4 / np.sqrt(STEPS)


# -- Gaussian noise --------------------------------------------------------------------------------


def test_noise_is_standard_normal() -> None:
    slots = Slots(0, 50, 50)
    z = gaussian((4, 32, 32), seed=0, step=7, slots=slots, purpose="noise")
    assert z.dtype == torch.float32
    assert z.shape == (50, 4, 32, 32)
    values, n = z.double().numpy().ravel(), z.numel()
    assert abs(values.mean()) < 4 / np.sqrt(n)
    assert abs(values.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs((values**3).mean()) < 4 * np.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 4 * np.sqrt(96 / n)
    assert stats.kstest(values, "norm").pvalue > SIGNIFICANCE
    # one value of each sample over many slots
    first = gaussian((1,), seed=0, step=0, slots=Slots(0, 4000, 4000), purpose="noise")
    assert stats.kstest(first.numpy().ravel(), "norm").pvalue > SIGNIFICANCE


@pytest.mark.parametrize("shape", [(3, 2), ()])
def test_noise_of_a_slot_depends_on_nothing_but_the_slot(shape: tuple[int, ...]) -> None:
    settings: dict[str, Any] = {"seed": 1, "step": 2, "purpose": "noise"}
    whole = gaussian(shape, slots=Slots(0, 8, 8), **settings)
    parts = [gaussian(shape, slots=Slots(s, 2, 16), **settings) for s in (0, 2, 4, 6)]
    assert whole.shape == (8, *shape)
    assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(row.ravel().tolist()) for row in whole}) == 8


# -- isolation and errors --------------------------------------------------------------------------


@each_draw
def test_global_generators_are_left_alone(draw: str) -> None:
    with untouched_global_generators():
        _whole(draw, 8)
        gaussian((2, 2), seed=0, step=0, slots=Slots(0, 2, 2), purpose="noise")
    torch.manual_seed(0)
    first = _whole(draw, 8)
    torch.manual_seed(1)
    assert torch.equal(first, _whole(draw, 8))


def test_an_unknown_draw_is_refused() -> None:
    with pytest.raises(ValueError, match=r"draw 'halton' is unknown: choose from .*sobol"):
        uniforms("halton", seed=0, step=0, slots=Slots(0, 1, 1))


def test_a_lent_generator_is_at_the_beginning_of_its_stream() -> None:
    """Whatever was drawn from it before, and while another one is in use."""
    for step in range(3):
        first = randomness._lent(7, step, purpose="a")
        first.integers(0, 10, 3, dtype=np.uint32)  # half a word is left
        second = randomness._lent(7, step + 1, purpose="b")
        fresh = randomness.host_generator(7, step + 1, purpose="b")
        expected = fresh.integers(0, 2**32, 5, dtype=np.uint32), fresh.permutation(9)
        assert np.array_equal(second.integers(0, 2**32, 5, dtype=np.uint32), expected[0])
        assert np.array_equal(second.permutation(9), expected[1])
        assert first is not second
        randomness._IDLE.extend([first, second])


def test_a_draw_may_draw_inside() -> None:
    slots, iid = Slots(0, 8, 8), randomness.DRAWS.look_up("iid")
    plain = randomness.uniforms("iid", seed=3, step=5, slots=slots)

    @randomness.DRAWS.register("nested")
    def nested(rng: np.random.Generator, *rest: int) -> np.ndarray:
        randomness.uniforms("stratified", seed=4, step=9, slots=slots)
        return iid(rng, *rest)

    try:
        assert torch.equal(randomness.uniforms("nested", seed=3, step=5, slots=slots), plain)
    finally:
        randomness.DRAWS.remove("nested")
