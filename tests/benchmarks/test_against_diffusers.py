"""benchmarks/against_diffusers: runs end with their steps, and ratios have the right side up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.against_diffusers import __main__ as command
from benchmarks.against_diffusers.bed import PAIRS, ROOT
from diffusers_curriculum.training.loop.task import Task
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.unconditional import Unconditional

SCRIPT = """
import sys, torch
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.AdamW([weight])
while True:
    optimizer.step()
"""


def test_a_run_ends_with_its_last_step(tmp_path: Path) -> None:
    script, notes = tmp_path / "endless.py", tmp_path / "notes.json"
    script.write_text(SCRIPT)
    words = ["benchmarks.against_diffusers.timed", str(notes), "0.0", "3", str(script)]
    held = np.ones(2**27)  # bytes of the one that starts it are not its own
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, timeout=100)
    found = json.loads(notes.read_text("utf-8"))
    assert len(found["ends"]) == 3
    assert found["ends"] == sorted(found["ends"])
    assert 50e6 < found["peak_bytes"] < held.nbytes


def test_a_script_that_is_quicker_here_has_a_ratio_above_one() -> None:
    slow = command.figures({"ends": [2.0, 4.0, 6.0, 8.0, 10.0], "peak_bytes": 300})
    quick = command.figures({"ends": [1.0, 3.0, 5.0, 6.0, 7.0], "peak_bytes": 100})
    assert quick == {"step": 1.0, "first_step": 1.0, "peak_bytes": 100}
    found = command.ratios({"here": [quick], "official": [slow]})
    assert found == {"steps per second": 2.0, "peak memory": 3.0, "time to first step": 2.0}


def test_check_fails_where_a_bar_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = {"steps per second": 1.04, "peak memory": 1.0, "time to first step": 1.0}
    row = {"script": "text_to_image", "batch": 1, "phases": {}, "ratios": told}
    monkeypatch.setattr(command.Bed, "make", lambda self: None)
    monkeypatch.setattr(command, "measured", lambda *_: iter([row]))
    argv = ["--official", str(tmp_path), "--check"]
    assert command.main(argv) == 1
    told["steps per second"] = 1.06
    assert command.main(argv) == 0


TASKS: dict[str, type[Task]] = {
    "text_to_image": TextToImage,
    "unconditional": Unconditional,
    "class_conditional": ClassConditional,
}


@pytest.mark.parametrize("name", PAIRS)
def test_both_scripts_of_a_pair_know_their_flags(name: str) -> None:
    pair = PAIRS[name]
    facts = json.loads((ROOT / "tests/fixtures/official_flags.json").read_text("utf-8"))
    official = {fact["flag"] for fact in facts[Path(pair.official).name]}
    given = {word for word in (*pair.flags, *pair.only_official) if word.startswith("--")}
    assert given <= official
    assert (ROOT / pair.here).is_file()
    TASKS[name]().parse([*pair.flags, *pair.only_here], machine=False)
