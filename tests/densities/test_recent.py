"""Laws of fine-tuning, and laws that are moved as a family's schedule is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.densities import (
    SHIFT_PRESETS,
    Density,
    make_density,
    shift_from_dimensions,
    shift_from_tokens,
)
from tests.floors_fixtures import SCHEDULERS

EDGES = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
P = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)


def _t(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _law(name: str, **args: Any) -> Density:
    return make_density(name, EDGES, **args)


def _noise(law: Density, p: Tensor = P) -> Tensor:
    """Noise fractions, noisy last, below which 1 - p of the mass lie."""
    return torch.sigmoid(-law.icdf(p) / 2)


def _follows(log_snr: np.ndarray, law: Density) -> bool:
    return bool(stats.kstest(log_snr, lambda x: law.cdf(_t(x)).numpy()).pvalue > 1e-4)


def test_mixflow_is_the_published_draw() -> None:
    """t = 1 - sqrt(U); drawn with the square, the control, it is another law."""
    u = np.random.default_rng(0).random(200_000)
    for noise, expected in ((1 - np.sqrt(u), True), (1 - u**2, False)):
        assert _follows(2 * np.log((1 - noise) / noise), _law("mixflow")) is expected
    torch.testing.assert_close(_noise(_law("mixflow")), 1 - P.sqrt(), atol=1e-14, rtol=0)


def test_mixflow_moves_with_the_shift_of_its_schedule() -> None:
    """As trainers draw it: t = 1 - sqrt(U), then the schedule's shift."""
    plain, shifted = (
        DensityTimestepSampler(SCHEDULERS[name](), "mixflow", floor=0.0)
        for name in ("flow", "flow_shift_3")
    )
    torch.testing.assert_close(shifted.probabilities(), plain.probabilities(), atol=1e-6, rtol=1e-3)
    told = DensityTimestepSampler(SCHEDULERS["flow_shift_3"](), "mixflow", {"shift": 1.0})
    assert told.density == _law("mixflow", shift=1.0)


def test_qinglong_is_the_draw_of_musubi() -> None:
    rng, count = np.random.default_rng(1), 200_000
    which, shift = rng.random(count), shift_from_tokens(1024)
    middle = 1 / (1 + np.exp(-rng.standard_normal(count)))
    noise = middle * shift / (1 + (shift - 1) * middle)
    log_snr = np.select(
        [which < 0.8, which < 0.875],
        [2 * np.log((1 - noise) / noise), rng.normal(-6, 2, count)],
        rng.normal(5.36, 1, count),
    )
    assert _follows(log_snr, _law("qinglong", tokens=1024))
    assert not _follows(log_snr, _law("qinglong", tokens=4096))
    assert not _follows(log_snr, _law("qinglong", tokens=1024, preset="qwen-image"))
    assert not _follows(log_snr, _law("qinglong", tokens=1024, middle=0.79, style=0.11, detail=0.1))


# -- shift -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, preset in SHIFT_PRESETS.items() if preset.line])
@pytest.mark.parametrize("tokens", [256, 1024, 9000])
def test_a_preset_moves_as_the_familys_schedule_does(name: str, tokens: int) -> None:
    """diffusers' own dynamic shift and stretch, on a schedule of many steps."""
    preset, steps = SHIFT_PRESETS[name], 200_000
    (first, low), (last, high) = preset.line or ((0, 0), (1, 1))
    stretch: dict[str, Any] = {"shift_terminal": preset.terminal} if preset.terminal else {}
    scheduler: Any = FlowMatchEulerDiscreteScheduler(steps, use_dynamic_shifting=True, **stretch)
    scheduler.set_timesteps(steps, mu=low + (high - low) * (tokens - first) / (last - first))
    law = _law("shifted", density="flow_uniform", preset=name, tokens=tokens)
    at = torch.tensor([1000, 50_000, 150_000, 195_000])
    p = 1 - (1 - at / (steps - 1) * (1 - 1 / steps)).double()  # sigmas from 1 to 1 / steps
    torch.testing.assert_close(_noise(law, p), scheduler.sigmas[at].double(), atol=2e-4, rtol=0)
    assert law.support[1] == (
        pytest.approx(2 * math.log(1 / preset.terminal - 1)) if preset.terminal else math.inf
    )


def test_each_way_to_say_a_shift() -> None:
    plain = _noise(_law("logit_normal"))
    for s, said in [
        (3.0, {"shift": 3.0}),
        (3.0, {"preset": "sd3"}),
        (math.exp(0.63), {"tokens": 1024}),
        (math.exp(1.0), {"tokens": 1024, "line": [[0, 0.0], [2048, 2.0]]}),
        (2.0, {"pixels": 1024**2, "base_pixels": 512**2}),
        (6.9282, {"dimensions": 16 * 16 * 768}),
        (13.8564, {"dimensions": 32 * 32 * 768}),
    ]:
        moved = _noise(_law("shifted", density="logit_normal", **said))
        torch.testing.assert_close(moved, s * plain / (1 + (s - 1) * plain), atol=2e-6, rtol=0)
    assert shift_from_dimensions(4 * 4096) == 2.0


def test_a_stretch_alone_ends_at_the_terminal() -> None:
    plain = _noise(_law("u_shaped"))
    law = _law("shifted", density="u_shaped", terminal=0.1)
    torch.testing.assert_close(_noise(law), 1 - 0.9 * (1 - plain), atol=1e-14, rtol=0)
    top = law.support[1]
    assert law.cdf(_t([top, top + 1])).tolist() == [1.0, 1.0]
    assert law.pdf(_t([top + 1e-6, top + 1, math.inf, -math.inf])).tolist() == [0.0] * 4
    x = torch.linspace(-9, top - 1e-3, 500, dtype=torch.float64)
    slope = (law.cdf(x + 1e-5) - law.cdf(x - 1e-5)) / 2e-5
    torch.testing.assert_close(law.pdf(x), slope, atol=1e-8, rtol=1e-6)


def test_a_shifted_schedule_does_not_shift_again() -> None:
    args = {"density": "logit_normal", "shift": 3.0}
    plain, shifted = (
        DensityTimestepSampler(SCHEDULERS[name](), "shifted", args, floor=0.0)
        for name in ("flow", "flow_shift_3")
    )
    for sampler in (plain, shifted):
        mass, log_snr = sampler.probabilities(), sampler.levels.log_snr
        median = float(log_snr[int((mass.cumsum(0) < 0.5).sum())])
        assert median == pytest.approx(-2 * math.log(3), abs=0.02)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "shifted",
            {"density": "laplace"},
            r"nothing says how far the law moves: give one of pres",
        ),
        ("shifted", {"density": "laplace", "shift": 2, "tokens": 9}, r"shift=2 and tokens=9 says"),
        ("shifted", {"density": "laplace", "preset": "flux"}, r"'flux' needs tokens"),
        ("shifted", {"density": "laplace", "preset": "sd3", "tokens": 9}, r"'sd3' and tokens=9"),
        ("shifted", {"density": "laplace", "preset": "flx"}, r"preset='flx' is unknown.*is 'flux'"),
        ("shifted", {"density": "laplace", "shift": 2, "line": [[0, 0], [1, 1]]}, r"no effect"),
        ("shifted", {"density": "laplace", "tokens": 2, "line": [[1, 0], [1, 1]]}, r"both points"),
        ("shifted", {"density": "laplace", "tokens": 2, "line": [1, 2]}, r"is not a line: write"),
        (
            "shifted",
            {"density": "laplace", "tokens": 2, "line": [["a", 1], [2, 2]]},
            r"='a' is not",
        ),
        ("shifted", {"density": "laplace", "pixels": 4}, r"base_pixels=None go together"),
        ("shifted", {"density": "laplace", "terminal": 1.0, "shift": 2}, r"must lie in \[0, 1\)"),
        (
            "shifted",
            {"density": "mode", "density_args": {"shift": 2}, "preset": "sd3"},
            r"has shift=2, a shift of its own",
        ),
        ("shifted", {"shift": 2}, r"needs 'density'"),
        ("shifted", {"density": "laplace", "shift": 2, "c": 1}, r"'laplace' has no parameter 'c'"),
        ("qinglong", {}, r"'qinglong' needs 'tokens'"),
        ("qinglong", {"tokens": 0}, r"tokens=0 must be greater"),
        ("qinglong", {"tokens": 9, "preset": "sd3"}, r"preset='sd3' is unknown: choose from flux"),
        ("qinglong", {"tokens": 9, "detail": -1}, r"detail=-1 must be 0 or more"),
    ],
)
def test_what_is_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _law(name, **parameters)


def test_every_preset_tells_its_source_and_says_one_thing() -> None:
    for preset in SHIFT_PRESETS.values():
        assert preset.source.isascii()
        assert len(preset.source) > 10
        assert (preset.shift is None) is (preset.line is not None)
