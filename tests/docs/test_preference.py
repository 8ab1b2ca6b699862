"""The code of docs/preference.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_curriculum import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    NoiseLevels,
    TimestepSampler,
)
from diffusers_curriculum.inference_spacing import visited_indices

TEXT = (Path(__file__).parents[2] / "docs/preference.md").read_text("utf-8")


def of_section(title: str) -> dict[str, Any]:
    """What the code of a section leaves behind."""
    (code,) = re.findall(rf"## {title}\n.*?```python\n(.*?)```", TEXT, re.DOTALL)[:1]
    names: dict[str, Any] = {}
    exec(compile(code, title, "exec"), names)
    return names


def test_both_images_of_a_pair_have_its_level_and_noise() -> None:
    found = of_section("One level for a pair")
    for values in (found["timesteps"], found["noise"]):
        first, second = values.chunk(2)
        assert torch.equal(first, second)
    assert len(found["timesteps"]) == 2 * found["pairs"]
    assert len(set(found["drawn"].timesteps.tolist())) > 1


def test_a_weight_is_one_of_the_margin_and_importance_one_of_the_pair() -> None:
    found = of_section("A weight for each level")
    sampler, weights = found["sampler"], found["weights"]
    assert float(weights.mean()) == pytest.approx(1)
    drawn = sampler.sample(u=torch.tensor([0.1, 0.9]))
    errors, known = torch.tensor([1.0, 2.0, 1.5, 2.0]), torch.tensor([1.0, 1.0, 1.0, 2.0])
    margins = torch.tensor([0.5, -1.0]) * weights[drawn.indices]  # in favour of the preferred one
    expected = (drawn.importance * torch.nn.functional.softplus(-0.1 * margins)).mean()
    torch.testing.assert_close(found["preference_loss"](errors, known, drawn, 0.2), expected)


def test_the_grid_is_the_steps_of_a_sampler() -> None:
    found = of_section("The steps of a sampler")
    sampler, visited, scheduler = (found[n] for n in ("sampler", "visited", "scheduler"))
    mass = sampler.probabilities()
    torch.testing.assert_close(
        mass[visited], torch.full((10,), 0.1, dtype=mass.dtype), atol=1e-15, rtol=0
    )
    assert int((mass > 0).sum()) == 10
    every = sampler.sample(u=(torch.arange(10) + 0.5) / 10)
    steps = 9 - torch.searchsorted(visited, every.indices)
    assert steps.tolist() == [*range(9, -1, -1)]  # u grows with noise
    told = scheduler.timesteps[steps] - every.timesteps
    assert float(told.abs().max()) < 1  # the nearest of a thousand
    assert torch.equal(found["timesteps"], scheduler.timesteps[found["steps"]])


def test_steps_of_ddim_are_met_exactly_and_kept(tmp_path: Path) -> None:
    way = DDIMScheduler()
    visited = visited_indices(way, NoiseLevels.from_scheduler(way), 7)
    part = {"timesteps": visited[-3:].tolist(), "weights": [1.0, 1.0, 2.0]}
    sampler = DensityTimestepSampler(way, "grid", part, floor=0.0)
    sampler.save_pretrained(str(tmp_path))
    again = TimestepSampler.from_pretrained(str(tmp_path))
    way.set_timesteps(7)
    drawn = again.sample(8, step=3)
    assert {*drawn.timesteps.tolist()} <= {*way.timesteps[:3].tolist()}
    assert torch.equal(drawn.timesteps, sampler.sample(8, step=3).timesteps)
    assert again.probabilities()[visited[-3:]].tolist() == pytest.approx([0.25, 0.25, 0.5])


def test_a_range_has_all_the_mass_and_a_curriculum_opens_it() -> None:
    found = of_section("A range of levels")
    mass, levels = found["noisy"].probabilities(), found["noisy"].levels
    inside = (levels.edges[:-1] > -6) & (levels.edges[1:] < 0)
    assert float(mass[inside].sum()) == pytest.approx(1)
    late = found["late"].probabilities()
    assert late.nonzero().flatten().tolist() == [*range(500, 900)]
    curriculum = CurriculumTimestepSampler(found["late"], clusters=4)
    opened = curriculum.probabilities().nonzero().flatten()
    assert 0 < len(opened) < 400
    assert float(late[opened].sum()) == pytest.approx(0.25, abs=0.01)
