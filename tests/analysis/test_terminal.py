"""The preview as text: bars and shades stand for the numbers."""

from __future__ import annotations

import re

import diffusers
import numpy as np
import pytest

from diffusers_curriculum import DensityTimestepSampler, MovingTimestepSampler
from diffusers_curriculum.analysis.preview import make_preview, quantiles
from diffusers_curriculum.analysis.terminal import (
    ASCII,
    BLOCKS,
    COLUMNS,
    WIDTH,
    Characters,
    characters_for,
    chart,
    render,
    shade,
)
from diffusers_curriculum.weighting import loss_weights
from tests.analysis.samplers import curriculum, laplace

TENTHS = Characters("0123456789", "0123456789")


def test_a_chart_by_hand() -> None:
    # 2 rows of 9 steps each: 18 steps to the peak
    top, bottom = chart(np.array([0.0, 9.0, 18.0, 27.0, 4.0]), 18.0, 2, TENTHS)
    assert bottom == "09994"
    assert top == "00990"


def test_a_shade_by_hand() -> None:
    assert shade(np.array([0.0, 1e-9, 0.25, 1.0]), 1.0, TENTHS) == "0159"


@pytest.mark.parametrize("scheduler", ["sd", "sd_zero_terminal", "flow", "flow_shift_3", "edm"])
@pytest.mark.parametrize("characters", [BLOCKS, ASCII])
def test_every_schedule_fits_the_terminal(scheduler: str, characters: Characters) -> None:
    sampler = laplace(scheduler, density_args={"mu": 0.0, "b": 0.5}, floor=0.1)
    weights = loss_weights("min_snr", sampler.levels, "v_prediction")
    text = render(make_preview(sampler, weights, 1000), characters)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "nan" not in text
    if characters is ASCII:
        assert text.isascii()


def test_the_chart_peaks_where_the_law_does() -> None:
    lines = render(make_preview(laplace(floor=0.1))).splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("drawn"))
    top = lines[row][18:]
    axis = lines[row + 3].split()
    low, high = float(axis[0]), float(axis[-1])
    peak = low + (high - low) * (top.index("\u2588") + 0.5) / COLUMNS
    assert peak == pytest.approx(1.0, abs=0.3)  # mu


def test_the_peaks_are_told() -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=800)  # type: ignore[call-arg]
    sampler = DensityTimestepSampler.from_scheduler(scheduler, density="normal", floor=0.1)
    preview = make_preview(sampler)
    told = re.findall(r"^  peak (\S+)", render(preview), re.MULTILINE)
    _, of_density, of_timesteps = map(float, told)
    in_columns = preview.mass.reshape(COLUMNS, 10).sum(1) * COLUMNS
    assert of_timesteps == pytest.approx(in_columns.max(), rel=0.005)
    density = preview.mass / -np.diff(preview.levels.edges.numpy())
    assert of_density == pytest.approx(density.max(), rel=0.02)


def test_the_table_holds_the_shares() -> None:
    preview = make_preview(curriculum(stage_steps=60), None, 100)
    rows = re.findall(r"^ +\d+ +(\d+)\.\.(\d+) .*$", render(preview), re.MULTILINE)
    assert [(int(a), int(b)) for a, b in rows] == [(s.first, s.last) for s in preview.shares]
    text = render(preview)
    for share in preview.shares:
        assert f"{share.drawn:.2%}" in text
    assert text.count("never") == 2


def test_stages_open_line_by_line() -> None:
    lines = render(make_preview(curriculum(stage_steps=10), None, 100)).splitlines()
    shown = [line for line in lines if line.startswith("step ")]
    assert [int(line.split()[1]) for line in shown] == [0, 10, 20, 30]
    reach = [len(line[18:].rstrip()) for line in shown]
    assert reach == sorted(reach)
    assert reach[0] < COLUMNS / 2
    assert reach[-1] == COLUMNS


def test_warnings_are_told_in_full() -> None:
    sampler = laplace(density_args={"mu": 0.0, "b": 0.5}, floor=0.1)
    preview = make_preview(sampler, loss_weights("p2", sampler.levels, "v_prediction"))
    assert len(preview.warnings) == 1
    assert preview.warnings[0] in " ".join(render(preview).split())


def test_blocks_only_where_they_can_be_written() -> None:
    assert characters_for("utf-8") is BLOCKS
    assert characters_for("ascii") is ASCII
    assert characters_for("latin-1") is ASCII
    assert characters_for("nonsense") is ASCII
    assert characters_for(None) is ASCII


def test_the_quantiles_of_a_law_that_moves_are_told_for_each_quarter() -> None:
    scheduler = diffusers.DDPMScheduler()  # type: ignore[call-arg]
    sampler = MovingTimestepSampler(scheduler, move_steps=60, widen_steps=40)
    preview = make_preview(sampler, None, 101)
    told = dict(re.findall(r"^drawn, step (\d+) (.*)  log-SNR$", render(preview), re.M))
    assert [*told] == ["0", "25", "50", "76", "100"]
    for step, row in told.items():
        mass = sampler.probabilities(int(step)).numpy()
        wanted = quantiles(sampler.levels, mass).log_snr
        assert [float(x) for x in row.split()] == pytest.approx(list(wanted), abs=0.005)
    assert "drawn, step" not in render(make_preview(laplace()))
