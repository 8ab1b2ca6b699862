"""R18: all that is wrong in an image folder is told before step 0; odd images are read right."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import train_text_to_image_curriculum as script
from diffusers_curriculum.training.data import checks as data_checks
from diffusers_curriculum.training.data.bad_samples import SKIPPED_FILE, usable_rows
from diffusers_curriculum.training.data.decoding import decode_image
from diffusers_curriculum.training.data.finding import find_bad_samples
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop import job
from diffusers_curriculum.training.parts.families.base import ModelFamily
from tests.reliability.bad_corpus import (
    BLOCKS,
    COLOURS,
    UPRIGHT,
    Corpus,
    describe_images,
    encoded,
    make_corpus,
    with_orientation,
)
from tests.scripts.small_runs import Bench, make_bench, status, train

pytestmark = pytest.mark.reliability

STEPS = ("--max_train_steps", 2, "--checkpointing_steps", 2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "images")


@pytest.fixture
def rows(corpus: Corpus, tmp_path: Path) -> Any:
    return load_images(
        caption_column="text", train_data_dir=str(corpus.folder), cache_dir=str(tmp_path / "cache")
    )


@contextmanager
def watched() -> Iterator[list[str]]:
    """Which of these the script does: load models, train."""
    seen: list[str] = []

    def noted(name: str, act: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return act(*args, **kwargs)

        return call

    with (
        mock.patch.object(
            ModelFamily, "load_components", noted("load", ModelFamily.load_components)
        ),
        mock.patch.object(script, "training_step", noted("train", script.training_step)),
    ):
        yield seen


# -- the corpus ------------------------------------------------------------------------------------


def test_the_corpus_is_worth_its_name(corpus: Corpus) -> None:
    assert len(corpus.bad) >= 20
    assert len(corpus.good) >= 15


def test_strict_lists_every_bad_path_before_any_model_is_loaded(
    bench: Bench, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with watched() as seen:
        code = status(bench.argv(tmp_path / "out", "--train_data_dir", corpus.folder, *STEPS))
    assert code == 2
    assert seen == []
    lines = capsys.readouterr().err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    total = len(corpus.bad) + len(corpus.good)
    assert f"{len(corpus.bad)} of {total} samples cannot be used" in lines[first]
    listed = lines[first + 1 :]
    assert len(listed) == len(corpus.bad)
    for name, reason in corpus.bad.items():
        (line,) = (line for line in listed if line.startswith(f"  {str(corpus.folder / name)!r}: "))
        assert reason in line


def test_nothing_good_is_called_bad_and_the_reverse(corpus: Corpus, rows: Any) -> None:
    found = find_bad_samples(rows, caption_column="text", progress=False).bad
    assert {Path(str(sample.path)).name for sample in found} == set(corpus.bad)


def test_skip_keeps_exactly_the_good_ones_and_logs_the_others(
    corpus: Corpus, rows: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"policy": "skip", "output_dir": tmp_path, "progress": False}
    options["caption_column"] = "text"
    with pytest.raises(UsageError, match=r"more than --bad_samples_limit 0\.5 allows"):
        usable_rows(rows, limit=0.5, **options)
    assert not (tmp_path / SKIPPED_FILE).exists()
    kept = usable_rows(rows, limit=0.9, **options)
    assert [Path(cell["path"]).name for cell in kept["image"]] == sorted(corpus.good)
    entries = [json.loads(line) for line in (tmp_path / SKIPPED_FILE).read_text().splitlines()]
    assert [Path(entry["path"]).name for entry in entries] == sorted(corpus.bad)
    for entry in entries:
        assert corpus.bad[Path(entry["path"]).name] in entry["reason"]
        assert rows[entry["row"]]["image"]["path"] == entry["path"]


# -- odd, but good ---------------------------------------------------------------------------------


def test_odd_images_have_the_right_pixels(corpus: Corpus, rows: Any) -> None:
    cells = {Path(cell["path"]).name: cell for cell in rows["image"]}
    for name, expected in corpus.good.items():
        image = decode_image(cells[name])
        assert image.mode == "RGB"
        pixels = np.asarray(image).astype(int)
        assert pixels.shape == expected.shape, name
        step = 16 if name in corpus.tolerance else 1  # middles of the blocks of a lossy format
        error = np.abs(pixels - expected)[step // 2 :: step, step // 2 :: step]
        assert error.max() <= corpus.tolerance.get(name, 0), name


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    cell = {"path": None, "bytes": with_orientation(orientation, kind)}
    pixels = np.asarray(decode_image(cell)).astype(int)
    expected = UPRIGHT[orientation](BLOCKS)
    assert pixels.shape == expected.shape
    error = np.abs(pixels - expected)[8::16, 8::16]
    assert error.max() <= (8 if kind == "JPEG" else 0)


def test_one_pixel_fills_the_square() -> None:
    cell = {"path": None, "bytes": encoded(Image.fromarray(COLOURS[:1, :1]), "PNG")}
    pixels = ImageTransform(16)(decode_image(cell), 0.3, 0.7, 0.0)
    colour = torch.from_numpy(COLOURS[0, 0]) / 127.5 - 1
    torch.testing.assert_close(pixels, colour.float()[:, None, None].expand(3, 16, 16))


# -- training without them -------------------------------------------------------------------------


def write_folder(folder: Path, bench: Bench, entries: int, bad: dict[int, str]) -> Path:
    """Many entries for a few pictures; those at the places in ``bad`` name a broken file."""
    shutil.copytree(bench.images, folder)
    pictures = sorted(path.name for path in folder.glob("*.png"))
    for name in bad.values():
        (folder / name).write_bytes(b"broken")
    names = [bad.get(i, pictures[i % len(pictures)]) for i in range(entries)]
    return describe_images(folder, [(name, f"picture {i}") for i, name in enumerate(names)])


def without(folder: Path, target: Path, names: set[str]) -> Path:
    """A copy of an image folder that never had these entries."""
    shutil.copytree(folder, target)
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    kept = [(e["file_name"], e["text"]) for e in entries if e["file_name"] not in names]
    for name in names:
        (target / name).unlink()
    return describe_images(target, kept)


def test_skipping_trains_as_if_the_bad_ones_had_never_been_there(
    bench: Bench, tmp_path: Path
) -> None:
    dirty = write_folder(tmp_path / "dirty", bench, 200, {3: "bad a.png", 120: "bad\nb.png"})
    clean = without(dirty, tmp_path / "clean", {"bad a.png", "bad\nb.png"})
    expected = train(bench.argv(tmp_path / "expected", "--train_data_dir", clean, *STEPS))
    argv = bench.argv(tmp_path / "out", "--train_data_dir", dirty, "--bad_samples", "skip", *STEPS)
    assert train(argv).steps == expected.steps
    lines = (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [3, 120]

    # A second start of the same run decodes the two bad ones only, and goes on
    with mock.patch.object(data_checks, "decode_image", wraps=decode_image) as decode:
        more = ("--max_train_steps", 3, "--resume_from_checkpoint", "latest")
        assert train([*argv, *map(str, more)]).numbers == [2]
    assert decode.call_count == 2

    # One more is too many: 3 of 200 are over 1 %
    (dirty / "00.png").unlink()
    assert status(argv) == 2


def test_above_the_limit_all_are_listed(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {i: f"bad {i}.png" for i in (1, 2, 150)}
    folder = write_folder(tmp_path / "dirty", bench, 200, bad)
    argv = bench.argv(tmp_path / "out", "--train_data_dir", folder, "--bad_samples", "skip", *STEPS)
    with watched() as seen:
        assert status(argv) == 2
    assert seen == []
    told = capsys.readouterr().err
    assert "3 of 200 samples cannot be used, more than --bad_samples_limit 0.01 allows" in told
    assert re.findall(r"bad \d+\.png(?=': )", told) == list(bad.values())
    assert status([*argv, "--bad_samples_limit", "0.015"]) == 0


def test_a_data_set_that_shrank_or_grew_since_the_checkpoint_is_noticed(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "dirty", bench, 200, {3: "bad a.png", 120: "bad b.png"})
    argv = bench.argv(tmp_path / "out", "--train_data_dir", folder, "--bad_samples", "skip", *STEPS)
    assert status(argv) == 0
    argv += ["--max_train_steps", "4", "--resume_from_checkpoint", "latest"]
    shutil.copy(folder / "01.png", folder / "bad a.png")
    with watched() as seen:
        assert status(argv) == 2
    assert seen == []
    assert re.search(r"number of training samples.* 199, was 198", capsys.readouterr().err)


# -- after the scan --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_during_training_is_named(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    folder = write_folder(tmp_path / "images", bench, 1, {})
    make_batches = job.training_batches

    def vanish(*args: Any, **kwargs: Any) -> Any:
        (folder / "00.png").unlink()
        return make_batches(*args, **kwargs)

    more = ("--train_data_dir", folder, "--dataloader_num_workers", workers, *STEPS)
    with mock.patch.object(job, "training_batches", vanish):
        assert status(bench.argv(tmp_path / "out", *more)) == 2
    told = capsys.readouterr().err
    assert f"{str(folder / '00.png')!r}: FileNotFoundError" in told
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--bad_samples", "ignore"), "--bad_samples: invalid choice: 'ignore'"),
        (("--bad_samples_limit", "0.1"), "without --bad_samples skip"),
        (("--bad_samples", "skip", "--bad_samples_limit", "1.5"), "it must be in [0, 1]"),
        (("--bad_samples", "skip", "--bad_samples_limit", "nan"), "it must be in [0, 1]"),
    ],
)
def test_wrong_options_are_told(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Any, told: str
) -> None:
    assert status(bench.argv(tmp_path / "out", *more)) == 2
    assert told in capsys.readouterr().err
