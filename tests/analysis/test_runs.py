"""Runs side by side: what is told is what they left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusers_curriculum.analysis.run_plots import plot_runs
from diffusers_curriculum.analysis.runs import differences, markdown, named_runs, sections
from diffusers_curriculum.cli import main

EDGES = [-10.0, 0.0, 10.0]


def write_run(folder: Path, law: str, steps: tuple[int, ...], loss: float, **more: Any) -> str:
    """The records of a run of which the validation loss falls from ``loss``."""
    folder.mkdir(parents=True)
    arguments = {"timestep_sampler": law, "learning_rate": 1e-4, "output_dir": str(folder)}
    session = {"started": "a", "ended": "b", "outcome": "done", "last_step": steps[-1]}
    session |= {"arguments": arguments | more, "in_effect": {"device": "cpu"}, "versions": {}}
    document = {"format": 1, "facts": {}, "sessions": [session]}
    (folder / "run.json").write_text(json.dumps(document))
    lines = [
        {"step": n, "raw": loss / (n + 1), "raw/log_snr_-3.2": loss, "raw/log_snr_4.0": 2 * loss}
        | {"samples": 4, "ema": None}
        for n in steps
    ]
    (folder / "validation_loss.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    losses = {"edges": EDGES, "first_half": [1.0, 2.0], "second_half": [loss, None]}
    (folder / "loss_per_noise_level.json").write_text(json.dumps(losses | {"counts": [3, 0]}))
    return str(folder)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    uniform = write_run(tmp_path / "uniform", "uniform", (0, 5, 10), 1.5)
    return [uniform, write_run(tmp_path / "laplace", "laplace", (0, 5), 0.5, use_ema=True)]


def test_tables_hold_what_the_runs_left(folders: list[str]) -> None:
    runs = named_runs(folders)
    assert differences(runs) == {
        "timestep_sampler": ["uniform", "laplace"],
        "use_ema": [None, True],
    }
    found = {s.title: s.table.rows for s in sections(runs) if s.table}
    tables = {title: {row[0]: list(row[1:]) for row in rows} for title, rows in found.items()}
    assert tables["Runs"]["steps"] == ["10", "5"]
    validation = tables["validation loss after 5 steps"]
    assert validation == {
        "raw": ["0.25", "0.08333"],
        "raw/log_snr_-3.2": ["1.5", "0.5"],
        "raw/log_snr_4.0": ["3", "1"],
    }
    losses = tables["training loss per noise level, second half"]
    assert losses["log-SNR -10.00 to 0.00"] == ["1.5", "0.5"]
    assert losses["log-SNR 0.00 to 10.00"] == ["-", "-"]


def test_curves_are_those_of_the_runs(folders: list[str]) -> None:
    figure = plot_runs(named_runs(folders))
    assert figure is not None
    raw, by_level, training = (axis for axis in figure.axes if axis.get_visible())
    curves = {line.get_label(): line for line in raw.get_lines()}
    seen = np.asarray(curves["uniform"].get_xydata())
    np.testing.assert_allclose(seen, [[0, 1.5], [5, 0.25], [10, 1.5 / 11]])
    curves = {line.get_label(): line for line in by_level.get_lines()}
    seen = np.asarray(curves["laplace"].get_xydata())
    np.testing.assert_allclose(seen, [[-3.2, 0.5], [4.0, 1.0]])
    assert [patch.get_label() for patch in training.patches] == ["uniform", "laplace"]


def test_every_form_is_written(folders: list[str], tmp_path: Path, capsys: Any) -> None:
    files = [str(tmp_path / f"runs{ending}") for ending in (".md", ".json", ".png", ".html")]
    assert main(["compare", *folders, "--output", *files]) == 0
    assert capsys.readouterr().out.split() == files
    text = Path(files[0]).read_text()
    assert text == markdown(sections(named_runs(folders))) + "\n"
    assert "| timestep_sampler | uniform | laplace |" in text
    told = json.loads(Path(files[1]).read_text())
    assert told["runs"]["laplace"]["metrics"]["validation_loss"]["5"]["raw"] == 0.5 / 6
    assert Path(files[2]).stat().st_size > 10_000
    assert "data:image/svg+xml" in Path(files[3]).read_text()
    assert main(["compare", *folders]) == 0
    assert capsys.readouterr().out == text


def test_what_cannot_be_compared_is_told(folders: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    again = write_run(tmp_path / "other" / "uniform", "uniform", (0,), 1.0)
    for words, told in (
        ([folders[0]], "1 different runs: give two or more"),
        ([folders[0], folders[0]], "1 different runs"),
        ([folders[0], str(tmp_path / "empty")], "empty holds no run.json"),
        ([*folders, "--output", "x.txt"], "must end in .md, .json"),
    ):
        assert main(["compare", *words]) == 2
        assert told in capsys.readouterr().err
    assert [*named_runs([folders[0], again])] == ["uniform", "other/uniform"]
    (tmp_path / "other" / "uniform" / "run.json").write_text("{")
    assert main(["compare", folders[0], again]) == 2
    assert "run.json cannot be read" in capsys.readouterr().err
