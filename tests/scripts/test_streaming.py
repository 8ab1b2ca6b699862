"""--streaming in a run: what is seen, recorded and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts.small_runs import BENCHES, finite, status
from tests.training.data.shard_files import write_tars


@pytest.mark.parametrize("name", ["text_to_image", "class_conditional", "unconditional"])
def test_a_streamed_run_goes_on_as_it_would_have(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = BENCHES[name](tmp_path / "bench")
    shards = write_tars(tmp_path / "shards", [3, 2, 4])
    more = ("--streaming", "--shuffle_buffer", 4, "--dataset_name", shards, "--random_flip")
    more = (*more, "--lr_warmup_steps", 0, "--checkpointing_steps", 3, "--report_to", "none")
    if name == "unconditional":
        more = (*more[:-2], "--logger", "tensorboard")

    def argv(output: str, steps: int, *words: object) -> list[str]:
        line = bench.argv(tmp_path / output, *more, "--max_train_steps", steps, *words)
        place = line.index("--train_data_dir")
        return line[:place] + line[place + 2 :]

    from tests.scripts.small_runs import train

    whole = train(argv("whole", 7), script=bench.script)
    assert finite(whole)
    train(argv("parts", 3), script=bench.script)
    resumed = ("--resume_from_checkpoint", "latest")
    assert train(argv("parts", 7, *resumed), script=bench.script).steps == whole.steps[3:]

    facts = json.loads((tmp_path / "whole" / "run.json").read_text())["facts"]
    assert facts["num_samples"] == 9
    assert facts["dataset"]["shuffle_buffer"] == 4
    if name == "text_to_image":
        capsys.readouterr()
        assert status(argv("parts", 8, *resumed, "--shuffle_buffer", 5)) == 2
        assert "dataset.shuffle_buffer is 5, was 4" in capsys.readouterr().err
