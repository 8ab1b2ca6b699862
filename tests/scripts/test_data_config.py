"""--data_config in a run: what is seen, recorded, resumed and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.scripts.small_runs import (
    Bench,
    finite,
    make_bench,
    status,
    train,
    write_images,
    write_json,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return make_bench(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def toys(bench: Bench) -> Path:
    return write_images(bench.images.parent / "toys", 3)


def argv(bench: Bench, config: Path, output: Path, *more: object) -> list[str]:
    """A command line with sources in the place of the folder."""
    words = bench.argv(output, *more, "--data_config", config, "--report_to", "none")
    place = words.index("--train_data_dir")
    return words[:place] + words[place + 2 :]


def written(folder: Path, bench: Bench, toys: Path, repeats: float = 2) -> Path:
    rows = [
        {"train_data_dir": str(bench.images), "max_train_samples": 4},
        {"train_data_dir": str(toys), "instance_prompt": "a sks toy", "repeats": repeats},
    ]
    return write_json(folder / f"data{repeats}.json", rows)


def test_a_run_on_two_sources_goes_on_as_it_would_have(
    bench: Bench, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, bench, toys)
    more = ("--lr_warmup_steps", 0, "--checkpointing_steps", 2, "--max_train_steps")
    whole = train(argv(bench, config, tmp_path / "whole", *more, 5))
    assert finite(whole)
    train(argv(bench, config, tmp_path / "parts", *more, 2))
    resumed = ("--resume_from_checkpoint", "latest")
    rest = train(argv(bench, config, tmp_path / "parts", *more, 5, *resumed))
    assert rest.steps == whole.steps[2:]

    facts = json.loads((tmp_path / "whole" / "run.json").read_text())["facts"]
    assert facts["num_samples"] == 7
    assert [told["repeats"] for told in facts["dataset"]["sources"].values()] == [1, 2]
    assert "on 2 data sets with" in (tmp_path / "whole" / "README.md").read_text()

    capsys.readouterr()
    other = written(tmp_path, bench, toys, repeats=3)
    assert status(argv(bench, other, tmp_path / "parts", *more, 6, *resumed)) == 2
    assert "dataset.sources.2.repeats is 3.0, was 2.0" in capsys.readouterr().err
