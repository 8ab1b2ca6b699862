"""Loading image folders: what is kept, and what every usual mistake is answered with."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_curriculum.training.data import sources
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    """Two images without a metadata file; brackets mean a pattern to glob, not to people."""
    root = tmp_path / "images [2]"
    root.mkdir()
    for name in ("wide.png", "tall.png"):
        Image.new("RGB", (4, 4)).save(root / name)
    return root


def describe_images(root, entries, name="metadata.jsonl"):
    (root / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def load(tmp_path):
    def call(root=None, caption_column="text", **options):
        root = None if root is None else str(root)
        cache = str(tmp_path / "cache")
        options["caption_column"] = caption_column
        return load_images(train_data_dir=root, cache_dir=cache, **options)

    return call


def test_images_stay_undecoded_and_other_columns_are_left_out(folder, load):
    describe_images(folder, [{"file_name": "wide.png", "text": "a", "licence": "cc"}])
    loaded = load(folder)
    assert loaded.column_names == ["image", "text"]
    assert loaded[0] == {"image": {"bytes": None, "path": str(folder / "wide.png")}, "text": "a"}


def test_a_local_dataset_name_is_loaded_too(tmp_path, load):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    describe_images(tmp_path, [{"file_name": "a.png", "caption": "a"}])
    loaded = load(dataset_name=str(tmp_path), caption_column="caption")
    assert loaded["caption"][:] == ["a"]


def test_images_without_an_entry_are_counted_in_a_warning(folder, load, caplog):
    describe_images(folder, [{"file_name": "wide.png", "text": "a"}])
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "1 of the 2 image files" in caplog.text


def test_max_train_samples_is_a_seeded_choice(tmp_path, load):
    root = tmp_path / "many"
    root.mkdir()
    names = [f"{i:02}.png" for i in range(30)]
    for name in names:
        Image.new("RGB", (2, 2)).save(root / name)
    describe_images(root, [{"file_name": name, "text": name} for name in names])
    first, again, other = (load(root, max_train_samples=10, seed=s)["text"][:] for s in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == len(set(other)) == 10
    assert first != names[:10]
    assert sorted(load(root, max_train_samples=99)["text"]) == names


def test_loading_leaves_the_global_generators_alone(folder, load):
    describe_images(folder, [{"file_name": "wide.png", "text": "a"}])

    def draws():
        return torch.rand(4).tolist(), np.random.random_sample(4).tolist(), random.random()

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
    expected = draws()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
    load(folder, max_train_samples=1)
    assert draws() == expected


@pytest.mark.parametrize("name", ["metdata.jsonl", "captions.txt", None])
def test_a_missing_or_misspelt_metadata_file_is_explained(folder, load, name):
    if name is not None:
        describe_images(folder, [{"file_name": "wide.png", "text": "a"}], name)
    with pytest.raises(UsageError) as caught:
        load(folder)
    message = str(caught.value)
    for part in ("--caption_column 'text'", "Columns found: image.", "metadata.jsonl", "file_name"):
        assert part in message
    assert f"text files found: {repr(name) if name else 'none'}" in message
    assert '"text": "a red bird"' in message


def test_with_metadata_a_wrong_caption_column_names_the_columns_only(folder, load):
    describe_images(folder, [{"file_name": "wide.png", "caption": "a"}])
    with pytest.raises(UsageError) as caught:
        load(folder)
    assert "Columns found: image, caption." in str(caught.value)
    assert "misspelt" not in str(caught.value)


def test_unusable_sources_are_refused(tmp_path, folder, load):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    cases = [
        ({}, "pass --dataset_name or --train_data_dir"),
        ({"root": tmp_path / "nowhere"}, "nowhere' is not a folder"),
        ({"root": tmp_path / "texts"}, "texts' has no images"),
        ({"root": folder, "max_train_samples": 0}, "--max_train_samples is 0"),
        ({"dataset_name": "./no/such/set"}, "--dataset_name './no/such/set' cannot be loaded"),
    ]
    for options, shown in cases:
        with pytest.raises(UsageError, match=shown):
            load(**options)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ('{"file": "wide.png", "text": "a"}\n', "file_name"),
        ("{broken\n", "JSON parse error"),
        ('{"file_name": "wide.png", "text": 1}\n{"file_name": "tall.png", "text": "a"}\n', "text"),
        ("", "metadata.jsonl"),
    ],
)
def test_an_unreadable_metadata_file_is_refused(folder, load, content, shown):
    (folder / "metadata.jsonl").write_text(content)
    with pytest.raises(UsageError, match=f"(?s)--train_data_dir .* cannot be loaded: .*{shown}"):
        load(folder)


def test_a_missing_split_is_refused(tmp_path, load):
    (tmp_path / "test.csv").write_text("image,text\na,b\n")
    with pytest.raises(UsageError, match="has no split 'train'; it has: test"):
        load(dataset_name=str(tmp_path))


def test_an_empty_data_set_is_refused(tmp_path, load, monkeypatch):
    empty = Dataset.from_dict(
        {"image": [], "text": []},
        features=Features({"image": ImageFeature(), "text": Value("string")}),
    )
    empty.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no data"):  # said by today's datasets library
        load(dataset_name=str(tmp_path))
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: DatasetDict({"train": empty}))
    with pytest.raises(UsageError, match="has no samples"):
        load(dataset_name="empty")


FAILS_WITH_WORKERS = """
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.dataset import training_batches

batches = training_batches(range(100), BatchPlan(100, 2, 1, 1, 0, 0), 0, 50, num_workers=1)
next(batches)
1 / 0
"""


def test_a_failed_run_with_loader_processes_ends() -> None:
    # they drop stop signals of others, but must obey Python's own, or it waits for them for ever
    done = subprocess.run(
        [sys.executable, "-c", FAILS_WITH_WORKERS], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
