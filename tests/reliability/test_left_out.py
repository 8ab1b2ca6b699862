"""R33: images trained on = images offered minus those that the log counts, in every script."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from PIL import Image

from diffusers_curriculum.training.loop import job
from tests.scripts.small_runs import BENCHES, Bench, reset_accelerate, write_images
from tests.scripts.test_train_vit_vqgan import EXAMPLES, argv

pytestmark = pytest.mark.reliability

READ = ("cat/crash-test.png", "cat/train-station.JPG", "cat/val.png", "dog/a.png", "dog/b.avif")
LINKED = ("one.png", "eval 2.png")
LEFT_OUT = {
    "dog/.hidden.png": "hidden",
    "__old/c.png": "hidden",
    "cat/phone.cr2": "save them as PNG",
    "cat/gone.png": "links to nothing",
}
Read = Callable[..., tuple[int, list[str]]]


class _Told(Exception):
    """The facts are known: the run need not go on."""


@pytest.fixture(scope="module", params=[*BENCHES, "vit_vqgan"])
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in BENCHES:
        return BENCHES[request.param](folder)
    write_images(folder / "images", 2)
    return folder


@pytest.fixture
def read(
    script: Bench | Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Read]:
    """How many samples a script would train on, and what it warned of until then."""
    told: list[int] = []

    def check_same_run(facts: dict[str, Any], *unused: Any) -> None:
        told.append(facts["num_samples"])
        raise _Told

    def run(*more: object) -> tuple[int, list[str]]:
        reset_accelerate()
        caplog.clear()
        if isinstance(script, Bench):
            module, line = script.module, script.argv(tmp_path / "out")
        else:
            monkeypatch.syspath_prepend(str(EXAMPLES))
            module = importlib.import_module("train_vit_vqgan")
            line = argv(script, tmp_path / "out", "--max_train_steps", 1)
        place = line.index("--train_data_dir")
        line[place : place + 2] = map(str, more)
        with caplog.at_level(logging.WARNING), pytest.raises(_Told):
            module.main(line)
        return told[-1], [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    with mock.patch.object(job, "check_same_run", check_same_run):
        yield run
    reset_accelerate()


def offered(folder: Path) -> Path:
    """Classes with captions in text files, of every kind of file that people have."""
    places = [folder / name for name in (*READ, *LEFT_OUT)]
    places += [folder.with_name("far") / name for name in LINKED]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        kind = "AVIF" if place.suffix == ".avif" else "PNG"
        Image.new("RGB", (12, 12), (9, 99, 199)).save(place, kind)
        place.with_suffix(".txt").write_text("a caption")
    (folder / "bird").symlink_to(folder.with_name("far"))
    (folder / "cat" / "again").symlink_to(folder / "dog")
    (folder / "cat" / "gone.png").unlink()
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere.png")
    return folder


def described(folder: Path, names: tuple[str, ...]) -> None:
    rows = [{"file_name": n, "text": "a caption", "label": len(n) % 2} for n in names]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def counted(warnings: list[str]) -> int:
    """Images that warnings say are left out of all that were offered."""
    total = len(READ) + len(LINKED) + len(LEFT_OUT)
    found = [
        re.search(r"(\d+) of the (\d+) image files .* are left out", line) for line in warnings
    ]
    assert {int(match[2]) for match in found if match} == {total}
    return sum(int(match[1]) for match in found if match)


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
def test_no_sample_left_out(read: Read, tmp_path: Path, flag: str) -> None:
    folder = offered(tmp_path / "images")
    trained, warnings = read(flag, folder)
    assert trained == len(READ) + len(LINKED)
    assert counted(warnings) == len(LEFT_OUT)
    for name, reason in LEFT_OUT.items():
        (line,) = (line for line in warnings if repr(name) in line)
        assert reason in line
    assert any("read already" in line and "'cat/again'" in line for line in warnings)
    described(folder, (READ[0], READ[3], f"bird/{LINKED[0]}"))
    trained, warnings = read(flag, folder)
    assert trained == 3
    assert counted(warnings) == len(READ) + len(LINKED) - 3 + len(LEFT_OUT)


def test_what_is_read_is_what_was_offered(read: Read, tmp_path: Path) -> None:
    folder = offered(tmp_path / "images")
    names = [*READ, *(f"bird/{name}" for name in LINKED)]
    labels = [i % 2 for i in range(len(names))]
    columns = {"image": names, "text": ["a caption"] * len(names), "label": labels}
    Dataset.from_dict(columns).to_csv(folder / "crash-test.csv")
    (folder / "table").mkdir()
    (folder / "crash-test.csv").rename(folder / "table" / "rows.csv")
    for name in ("bird", "cat", "dog"):
        (folder / "table" / name).symlink_to(folder / name)
    (folder / "table" / "train").mkdir()
    Dataset.from_dict(columns).to_csv(folder / "table" / "train" / "more.csv")
    trained, warnings = read("--dataset_name", folder / "table", "--dataset_config_name", "default")
    assert trained == len(names)
    assert any("'rows.csv'" in line and "1 of the 2 data files" in line for line in warnings)
