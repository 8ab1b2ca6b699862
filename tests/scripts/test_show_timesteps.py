"""--show_timesteps draws what would be trained on, from the scheduler alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusers_curriculum.training.data import sources
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.families.base import ModelFamily
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from tests.scripts.small_runs import Bench, status


@pytest.fixture(autouse=True)
def _nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, models and accelerator are out of bounds."""

    def forbidden(what: str) -> Callable[..., Any]:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"{what} was touched")

        return fail

    monkeypatch.setattr(sources, "load_images", forbidden("the data set"))
    monkeypatch.setattr(ModelFamily, "load_components", forbidden("a model"))
    monkeypatch.setattr(ModelFamily, "load_tokenizers", forbidden("the tokenizer"))
    monkeypatch.setattr(runtime, "make_accelerator", forbidden("the accelerator"))


def show(bench: Bench, file: Path, *more: object) -> int:
    argv = ["--pretrained_model_name_or_path", str(bench.pipeline), "--show_timesteps", str(file)]
    return status([*argv, *map(str, more)])


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--timestep_sampler", "laplace", "--snr_gamma", 5, "--importance_correction", "full"),
        ("--curriculum", "difficulty", "--max_train_steps", 100000),
        ("--curriculum", "difficulty"),  # of a run of unknown length
        (
            "--curriculum",
            "difficulty",
            "--curriculum_pacing",
            "root",
            "--curriculum_total_steps",
            50,
            "--max_train_steps",
            1000,
        ),
    ],
)
def test_a_picture_is_drawn(bench: Bench, tmp_path: Path, more: tuple[object, ...]) -> None:
    file = tmp_path / "shown.png"
    assert show(bench, file, *more) == 0
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1210, 825)
        assert len(np.unique(np.asarray(picture))) > 50
    assert list(tmp_path.iterdir()) == [file]


def test_other_forms(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.svg", "a.json"):
        assert show(bench, tmp_path / name, "--timestep_sampler", "laplace") == 0
        assert str(tmp_path / name) in capsys.readouterr().out
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert "quantiles" in json.loads((tmp_path / "a.json").read_text())
    assert show(bench, Path("terminal"), "--timestep_sampler", "laplace") == 0
    told = capsys.readouterr().out
    assert "density over log-SNR" in told
    assert max(map(len, told.splitlines())) <= 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.svg"]


def test_the_picture_shows_the_sampler(bench: Bench, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png")]
    show(bench, files[0])
    show(bench, files[1], "--timestep_sampler", "laplace")
    show(bench, files[2], "--timestep_sampler", "laplace", "--timestep_sampler_args", "mu=3")
    show(bench, files[3], "--loss_weighting", "min_snr")
    assert len({file.read_bytes() for file in files}) == 4


def test_too_long_a_curriculum_is_shown_with_a_warning(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--curriculum", "difficulty", "--max_train_steps", 100)
    assert show(bench, tmp_path / "shown.png", *more) == 0
    told = capsys.readouterr().out
    assert "warning: training would be refused: the curriculum of 20 clusters" in told
    assert "--curriculum_max_share 0.3" in told
    assert (tmp_path / "shown.png").exists()


def test_too_long_a_curriculum_is_not_trained(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told before data and models are touched."""
    task = TextToImage()
    argv = ["--pretrained_model_name_or_path", str(bench.pipeline), "--train_data_dir", "x"]
    argv += ["--curriculum", "difficulty", "--max_train_steps", "100"]
    with pytest.raises(UsageError, match=r"take 6768 of 100 .*--curriculum_max_share 0\.3"):
        task.choose(task.parse(argv, machine=False), seed=0)
