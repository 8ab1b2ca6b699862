"""Curves of convergence: what they say of known losses, and of networks that really learn."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffusers_curriculum.analysis.convergence import Curves, Trial, convergence, follow, starts_of
from diffusers_curriculum.analysis.probes import make_grid
from tests.analysis.known_denoisers import drawn, objective_of, two_dimensional


def exponential(rates: list[float], floors: list[float], steps: int = 400) -> Curves:
    """Losses that fall at known rates to known floors."""
    step = -1

    def train(number: int) -> None:
        nonlocal step
        step = number

    def measure() -> list[float]:
        return [f + math.exp(-r * (step + 1)) for r, f in zip(rates, floors, strict=True)]

    return follow(train, measure, steps, 5, [str(r) for r in rates])


def test_speed_is_told_apart_from_the_floor() -> None:
    curves = exponential([0.05, 0.05, 0.02], [0.0, 5.0, 0.1])
    assert curves.steps[:3] == (0, 5, 10)
    # the same speed over another floor is the same difficulty
    torch.testing.assert_close(curves.remaining[:, 0], curves.remaining[:, 1])
    areas = curves.area.tolist()
    assert areas[0] == pytest.approx(1 / 0.05 / 400, rel=0.03)
    assert areas[2] == pytest.approx(1 / 0.02 / 400, rel=0.03)
    # ln 2 / rate and ln 10 / rate, on the grid of probes
    assert curves.steps_to(0.5) == [15, 15, 35]
    assert curves.steps_to(0.1)[:2] == [50, 50]


def test_what_does_not_fall_is_told_as_unknown() -> None:
    curves = Curves(("a",), (0, 1, 2, 3), torch.tensor([[1.0], [1.0], [2.0], [3.0]]).double())
    assert bool(curves.remaining.isnan().all())
    assert curves.steps_to(0.5) == [None]
    assert curves.to_json()["area"] == [None]


class Network(nn.Module):
    """A small one that knows where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, noisy: Tensor, at: Tensor, where: Tensor) -> Tensor:
        return self.inner(torch.cat([noisy, at[:, None] / 500 - 1], 1))


def build() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Network()


def trial(**changes: object) -> Trial:
    samples = drawn(two_dimensional(), 600).float()
    settings: dict = {"held_out": 100, "batch_size": 64, "learning_rate": 0.01} | changes
    return Trial(build, objective_of("v_prediction"), samples, **settings)


def test_networks_alone_and_together_start_alike_and_learn() -> None:
    one = trial()
    grid = make_grid(one.objective.levels, 9)
    starts = starts_of(grid, 3)
    assert len(starts) == 3
    seen: list[None] = []
    found = convergence(one, grid, starts, 120, 40, each_step=lambda: seen.append(None))
    alone, joint = found["one network each"], found["one network for all"]
    assert alone.steps == joint.steps == (0, 40, 80, 120)
    assert alone.clusters == joint.clusters
    assert len(seen) == 4 * 120
    torch.testing.assert_close(alone.losses[0], joint.losses[0])
    assert bool((alone.losses[-1] < 0.92 * alone.losses[0]).all())
    # a network of its own has no other cluster to serve
    assert float((joint.losses[-1] - alone.losses[-1]).sum()) > 0
    again = convergence(one, grid, starts, 40, 40)
    torch.testing.assert_close(again["one network each"].losses[1], alone.losses[1], rtol=0, atol=0)


def test_a_cluster_trains_its_own_levels_only() -> None:
    """The network of a cluster sees all of its levels, and no others but in probes."""
    seen: list[Tensor] = []

    class Watched(Network):
        def forward(self, noisy: Tensor, at: Tensor, where: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(at)
            return super().forward(noisy, at, where)

    one = replace(trial(), build=Watched)
    grid = make_grid(one.objective.levels, 8)
    convergence(one, grid, [0, 300], 100, 100)
    noisy, clean, both = (torch.cat(seen[i : i + 100]) for i in (0, 100, 200))
    assert (int(noisy.min()), int(noisy.max())) == (300, 999)
    assert (int(clean.min()), int(clean.max())) == (0, 299)
    assert len(clean.unique()) == 300
    assert float((both < 300).float().mean()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({"learning_rate": 0.0}, 10, "learning_rate=0.0 must be"),
        ({"batch_size": 0}, 10, "batch_size=0 must be"),
        ({"held_out": 600}, 10, "held_out=600 must be"),
        ({}, 0, "steps=0 must be"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict, steps: int, message: str) -> None:
    one = trial(**changes)
    with pytest.raises(ValueError, match=message):
        convergence(one, make_grid(one.objective.levels, 4), [0, 500], steps, 5)


def test_a_cluster_without_a_probe_is_refused() -> None:
    one = trial()
    with pytest.raises(ValueError, match="has no level of the grid"):
        convergence(one, make_grid(one.objective.levels, 4), [0, 1, 500], 5, 5)
