"""Several samplers in one picture: each curve is its sampler's."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.analysis.plots import plot_comparison
from diffusers_curriculum.analysis.preview import MOST, Preview, make_preview
from diffusers_curriculum.analysis.terminal import comparison_table
from diffusers_curriculum.samplers import AutoTimestepSampler
from diffusers_curriculum.weighting import loss_weights
from tests.floors_fixtures import SCHEDULERS


def preview(density: str, weighting: str = "none", scheduler: str = "sd") -> Preview:
    sampler = DensityTimestepSampler.from_scheduler(SCHEDULERS[scheduler](), density=density)
    return make_preview(sampler, loss_weights(weighting, sampler.levels))


def curves(figure: Figure, place: int) -> dict[str, np.ndarray]:
    return {str(x.get_label()): np.asarray(x.get_ydata()) for x in figure.axes[place].get_lines()}


def test_every_sampler_has_its_curves() -> None:
    several = {name: preview(name, "min_snr") for name in ("laplace", "normal", "uniform")}
    figure = plot_comparison(several)
    assert len(figure.axes) == 4
    for name, one in several.items():
        np.testing.assert_allclose(curves(figure, 1)[name], one.mass * 1000)
        np.testing.assert_allclose(curves(figure, 3)[name], one.effective * 1000)
        widths = -np.diff(one.levels.edges.numpy())
        np.testing.assert_allclose(curves(figure, 0)[name], one.mass / widths)
    colours = [line.get_color() for line in figure.axes[1].get_lines()]
    assert len(set(colours)) == 4


def test_without_weights_there_is_one_row() -> None:
    assert len(plot_comparison({name: preview(name) for name in ("laplace", "cauchy")}).axes) == 2


def test_the_table_holds_the_quantiles() -> None:
    several = {name: preview(name, "p2") for name in ("laplace", "a rather long name")[:1]}
    several["a rather long name"] = preview("normal", "p2")
    text = comparison_table(several)
    for one in several.values():
        row = one.quantiles["drawn"]
        assert "".join(f"{x:>z9.2f}" for x in row.log_snr) in text
        assert "".join(f"{x:>9d}" for x in map(int, row.timestep)) in text
        assert "".join(f"{x:>z9.2f}" for x in one.quantiles["effective"].log_snr) in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_law_that_is_still_to_be_learned_is_told_to_be_so() -> None:
    several = {
        "auto": make_preview(AutoTimestepSampler(SCHEDULERS["sd"]())),
        "x": preview("normal"),
    }
    how = "of the warm-up: nothing is learned yet"
    assert f"auto: {how}" in comparison_table(several).splitlines()
    assert {f"auto ({how})", "x"} <= {*curves(plot_comparison(several), 1)}


def test_what_one_picture_cannot_hold() -> None:
    with pytest.raises(ValueError, match="1 different samplers"):
        plot_comparison({"a": preview("normal")})
    with pytest.raises(ValueError, match=f"from 2 to {MOST}"):
        comparison_table({str(i): preview("normal") for i in range(MOST + 1)})
    with pytest.raises(ValueError, match="different schedules"):
        plot_comparison({"a": preview("normal"), "b": preview("normal", scheduler="flow")})
