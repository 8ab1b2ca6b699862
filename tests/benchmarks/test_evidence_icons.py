"""benchmarks/evidence: pictures with captions, from the names of icons to what judges them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import data
from benchmarks.evidence.cells import SETTINGS, Cell, ConfigError, config
from benchmarks.evidence.images import asked
from benchmarks.evidence.judge import Judge, distances
from benchmarks.evidence.measuring import measure
from benchmarks.evidence.network import StackedMlp

PLACES = {"cat": (0, 0), "dog": (0, 2), "off": (2, 0), "red": (2, 2)}
NAMES = ["cat", "dog", "cat-off", "dog-off", "red-cat", "red-dog", "red-cat-off", "red-dog-off"]


def drawn(name: str) -> np.ndarray:
    """(4, 4) a corner for each word."""
    picture = np.zeros((4, 4), dtype=np.uint8)
    for y, x in (PLACES[word] for word in name.split("-") if word in PLACES):
        picture[y : y + 2, x : x + 2] = 255
    return picture


@pytest.fixture
def pictures() -> data.Pictures:
    names = [*NAMES * 20, *["cat-off"] * 40]
    return data.captioned([drawn(name) for name in names], names)


@pytest.mark.parametrize(
    ("read", "command", "name", "version"),
    [
        (data.silhouettes, data.ANIMALS, "animal-mnist", "0.4"),
        (data.DATA["icons"], data.ICONS, "mkdocs-material", "9.8.2"),
        (data.DATA["icons"], data.ICONS, "resvg-py", "0.5.0"),
    ],
)
def test_a_package_that_is_missing_or_of_another_version_is_told_with_its_command(
    read: Callable[[], object],
    command: str,
    name: str,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = dict(each.split("==") for each in command.split() if "==" in each)

    def distribution(wanted: str) -> SimpleNamespace:
        if wanted not in there:
            raise metadata.PackageNotFoundError(wanted)
        return SimpleNamespace(version=there[wanted], locate_file=Path)

    monkeypatch.setattr(data.metadata, "distribution", distribution)
    assert there.pop(name) == version
    with pytest.raises(ConfigError, match=f"{name} {version} is missing: {command}"):
        read()
    there[name] = "0.0.1"
    with pytest.raises(ConfigError, match=f"need {name} {version}, not 0.0.1: {command}"):
        read()


def test_the_command_refuses_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    data.pictures.cache_clear()
    monkeypatch.setattr(data.metadata, "distribution", missing)
    told = ["nightly", "--held_out", "--only", "icons/*", "--output_dir", str(tmp_path)]
    assert command.main(told) == 2
    assert "mkdocs-material 9.8.2 is missing: pip install" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    assert config("tasks", "icons")["held_out"]


def test_captions_are_the_commonest_words_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "WORDS", 2)
    names = ["off-dog", "dog", "bird", "off-cat", "off-off"]
    found = data.captioned([np.full((2, 2), at) for at in range(5)], names)
    assert found.words is not None
    assert found.words.tolist() == [[0, 1], [1, 0], [1, 1]]  # off, dog
    assert found.labels.tolist() == [2, 0, 1, 1]  # bird has none of them
    assert found.classes == 3
    assert found.rows[:, 0].argsort().tolist() == [0, 1, 2, 3]


def test_a_caption_is_told_as_the_sum_of_its_words(pictures: data.Pictures) -> None:
    words = pictures.words
    assert words is not None
    make = partial(StackedMlp, range(2), size=4, width=8, blocks=1)
    network = make(classes=len(words), words=words)
    assert network.labels is not None
    assert network.labels.shape == (2, 5, 8)
    labels = torch.tensor([[*range(len(words)), network.nothing]] * 2)
    told = network._told(network.labels, labels)
    for at, row in enumerate(words):
        torch.testing.assert_close(told[:, at], network.labels[:, :4][:, row > 0].sum(1))
    torch.testing.assert_close(told[:, -1], network.labels[:, 4])
    # with a word for each class it is a network of classes
    plain, named = make(classes=4), make(classes=4, words=torch.eye(4))
    x, level, labels = torch.ones(2, 5, 4), torch.zeros(2, 5), torch.arange(5).expand(2, 5)
    torch.testing.assert_close(plain(x, level, labels), named(x, level, labels))


def test_samples_are_asked_for_as_captions_are_found(pictures: data.Pictures) -> None:
    assert torch.equal(asked(pictures, len(pictures.rows)).sort().values, pictures.labels.sort()[0])
    digits = data.digits()
    assert asked(digits, 25).tolist() == [*range(10), *range(10), *range(5)]


def test_the_judge_finds_the_caption_of_a_picture(pictures: data.Pictures) -> None:
    judge = Judge(pictures)
    found = distances(judge, pictures, pictures.rows, pictures.labels)
    assert found["agreement"] > 0.99
    assert found["frechet"] < 1e-3
    others = (pictures.labels + 1) % pictures.classes
    assert distances(judge, pictures, pictures.rows, others)["agreement"] < 0.01


def test_a_cell_of_captions_is_measured(
    pictures: data.Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.DATA, "icons", lambda: pictures)
    data.pictures.cache_clear()
    tiny = {"width": 16, "blocks": 1, "batch": 16, "steps": 2, "first_checkpoint": 2, "seeds": 2}
    tiny |= {"samples": 30, "sampling_steps": [2], "guidance": [1.0, 2.0]}
    found = measure(Cell("icons", "flow", "uniform", SETTINGS | tiny), tmp_path)
    data.pictures.cache_clear()
    metrics = found["checkpoints"][-1]["metrics"]
    assert all(0 <= share <= 1 for share in metrics["agreement"])
    assert metrics["frechet"] != metrics["frechet, guidance 2"]
    assert len(metrics["frechet"]) == 2


def test_the_icons_are_as_they_are_drawn() -> None:
    """Only where the packages are installed."""
    try:
        icons = data.icons(16)
    except ConfigError as error:
        pytest.skip(str(error))
    assert icons.words is not None
    assert (icons.rows.shape, icons.words.shape) == ((5006, 256), (1459, 64))
    assert float(icons.rows.std()) == pytest.approx(1, abs=1e-4)
    minus = data._package_of(data.ICONS) / "material" / "templates/.icons/material/minus.svg"
    covered = data._rendered(minus, 24)
    assert covered[11:13, 6:18].min() == 255
    assert covered[:10].max() == covered[14:].max() == 0
