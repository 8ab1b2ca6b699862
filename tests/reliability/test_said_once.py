"""What is left out, cut or without effect is counted, and said once before step 0: by every script,
and by two processes together."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.reliability.two_processes import launch
from tests.scripts.small_runs import Bench

pytestmark = pytest.mark.reliability

IMAGES = 6
LONG = "a word " * 200
STARTED = "***** Running training *****"


@pytest.fixture
def odd(bench: Bench, tmp_path: Path) -> Bench:
    """The bench with a data set that has one fault of each kind."""
    images = Path(shutil.copytree(bench.images, tmp_path / "images"))
    rows = [json.loads(row) for row in (images / "metadata.jsonl").read_text("utf-8").splitlines()]
    rows[0]["text"] = LONG
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    for name in (".hidden.png", "unlisted.png", "photo.cr2", "drawing.svg"):
        Image.new("RGB", (12, 12)).save(images / name, "PNG")
    (images / "gone.png").symlink_to(images / "nowhere.png")
    return replace(bench, images=images)


def expected(bench: Bench) -> list[str]:
    """A pattern for each thing that is told."""
    left_out = [
        r"1 of the \d+ image files in .* are left out, as they are hidden",
        r"1 of the \d+ image files in .* are left out, as they have no entry",
        r"1 of the \d+ image files in .* are left out, as Pillow cannot read \.cr2",
        r"1 of the \d+ image files in .* are left out, as Pillow cannot read \.svg",
        r"1 of the \d+ image files in .* are left out, as they are links to nothing",
        r"--lr_warmup_steps 500 is not shorter than the run of 1 steps",
    ]
    cut = r"1 of \d+ samples have a caption of more than the \d+ tokens"
    return [*left_out, *([cut] if bench.script == Bench.script else [])]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("processes", [1, 2])
def test_each_is_counted_and_said_once_before_step_0(
    odd: Bench, tmp_path: Path, processes: int
) -> None:
    more = ("--max_train_steps", 1, "--lr_scheduler", "cosine", "--lr_warmup_steps", 500)
    argv = odd.argv(tmp_path / "output", *more, batch=1)
    outcome = launch(tmp_path / "ranks", argv, processes, script=odd.script)
    assert outcome.statuses == [0] * processes, outcome.said()
    texts = [path.read_text("utf-8", errors="replace") for path in outcome.outputs]
    said = [len(re.findall(pattern, "".join(texts))) for pattern in expected(odd)]
    assert dict(zip(expected(odd), said, strict=True)) == dict.fromkeys(expected(odd), 1)
    before = texts[0].split(STARTED)[0]
    assert all(re.search(pattern, before) for pattern in expected(odd))
