"""Unusable samples are found before step 0, then refused or left out, by all processes alike."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, config
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_curriculum.training.data import bad_samples, finding
from diffusers_curriculum.training.data import checks as data_checks
from diffusers_curriculum.training.data.bad_samples import (
    CACHE_FILE,
    SKIPPED_FILE,
    refuse_bad_samples,
    usable_rows,
)
from diffusers_curriculum.training.data.checked_images import shared_file
from diffusers_curriculum.training.data.finding import BadSample, find_bad_samples
from diffusers_curriculum.training.errors import UsageError

find = partial(find_bad_samples, caption_column="text", progress=False)
usable = partial(usable_rows, caption_column="text", progress=False)


def png(value: int, size: int = 2) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), value).save(buffer, "PNG")
    return buffer.getvalue()


def table(cells, captions=None, text: Value | List | None = None) -> Dataset:
    columns = {
        "image": cells,
        "text": [f"caption {i}" for i in range(len(cells))] if captions is None else captions,
    }
    kinds = Features({"image": ImageFeature(decode=False), "text": text or Value("string")})
    return Dataset.from_dict(columns, features=kinds)


def file_cell(path):
    return {"path": str(path), "bytes": None}


def bytes_cell(content):
    return {"path": None, "bytes": content}


@pytest.fixture
def rows(tmp_path):
    """100 images; 7, 40 and 93 are broken, and 40 lacks its caption too."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:02}.png").write_bytes(b"broken" if i in (7, 40, 93) else png(i))
    captions = [None if i == 40 else f"caption {i}" for i in range(100)]
    return table([file_cell(folder / f"{i:02}.png") for i in range(100)], captions)


@pytest.fixture
def output(tmp_path):
    path = tmp_path / "output"
    path.mkdir()
    return path


@pytest.fixture
def decoded(monkeypatch):
    """How many images have been decoded."""
    count, decode, lock = [0], data_checks.decode_image, threading.Lock()

    def counting(cell, **options):
        with lock:
            count[0] += 1
        return decode(cell, **options)

    monkeypatch.setattr(data_checks, "decode_image", counting)
    return count


def skip(rows, output, limit=0.03, **options):
    return usable(rows, policy="skip", limit=limit, output_dir=output, **options)


# -- finding ---------------------------------------------------------------------------------------


def test_the_bad_ones_are_found_in_order_with_all_their_faults(rows):
    found = find(rows).bad
    assert [sample.row for sample in found] == [7, 40, 93]
    assert found[0].path == rows[7]["image"]["path"]
    assert "cannot identify" in found[0].reason
    assert found[1].reason.startswith("UnidentifiedImageError")
    assert found[1].reason.endswith("; the caption is missing")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("part", [range(0, 0), range(0, 7), range(7, 8), range(20, 94)])
def test_only_the_rows_asked_for_are_looked_at(rows, decoded, part, workers):
    findings = find(rows, rows=part, workers=workers)
    assert [sample.row for sample in findings.bad] == [r for r in (7, 40, 93) if r in part]
    assert decoded == [len(part)]
    assert len(set(findings.fresh)) == len(part) - len(findings.bad)


def test_images_held_in_the_table_are_called_by_row():
    cells = [bytes_cell(png(1)), bytes_cell(b"x"), None]
    found = find(table(cells)).bad
    assert [(bad.row, str(bad).partition(":")[0], bad.path) for bad in found] == [
        (1, "row 1", None),
        (2, "row 2", None),
    ]
    assert found[1].reason == "there is no image"


def test_bombs_and_images_too_long_for_the_resolution(tmp_path, monkeypatch):
    Image.new("RGB", (10, 10)).save(tmp_path / "bomb.png")
    Image.new("RGB", (60, 1)).save(tmp_path / "long.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    pair = table([file_cell(tmp_path / "bomb.png"), file_cell(tmp_path / "long.png")])
    with pytest.warns(Image.DecompressionBombWarning):
        found = find(pair, resolution=2, workers=1).bad
    assert [bad.row for bad in found] == [0, 1]
    assert "10 x 10 pixels are over the limit" in found[0].reason
    assert "120 x 2 pixels are over the limit" in found[1].reason


def test_bad_captions_are_found_beside_good_images():
    captions = [["one", "two"], [], None, ["one", None], [""]]
    rows = table([bytes_cell(png(1))] * 5, captions, List(Value("string")))
    found = find(rows).bad
    assert [sample.row for sample in found] == [1, 2, 3]
    assert found[0].reason == "the list of captions is empty"
    assert found[1].reason == "the caption is missing"
    assert "holds None" in found[2].reason


def test_an_interrupt_does_not_wait_for_the_rest(rows, decoded, monkeypatch):
    class Bar(finding.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    count = data_checks.decode_image

    def slow(cell, **options):
        time.sleep(0.01)
        return count(cell, **options)

    monkeypatch.setattr(finding, "tqdm", Bar)
    monkeypatch.setattr(data_checks, "decode_image", slow)
    with pytest.raises(KeyboardInterrupt):
        find(rows, workers=1)
    assert decoded[0] < 80  # the chunk that was begun, and no further ones


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_file_is_not_opened(tmp_path, decoded, make):
    make(tmp_path / "a.png")  # opening a pipe waits until somebody writes to it
    (found,) = find(table([file_cell(tmp_path / "a.png")])).bad
    assert found.reason == "it is not a file"
    assert decoded == [0]


# -- refusing --------------------------------------------------------------------------------------


def test_raise_lists_every_bad_sample_on_a_line_of_its_own(rows, output):
    with pytest.raises(UsageError) as caught:
        usable(rows, output_dir=output)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("3 of 100 samples cannot be used; ")
    assert "--bad_samples skip" in head
    assert [line.split(":")[0].strip() for line in lines] == [
        repr(rows[i]["image"]["path"]) for i in (7, 40, 93)
    ]
    assert not (output / SKIPPED_FILE).exists()


@pytest.mark.parametrize(
    ("count", "total", "limit", "stops"),
    [
        (0, 5, 0.0, False),
        (1, 100, 0.01, False),
        (2, 100, 0.01, True),
        (1, 99, 0.01, True),
        (29, 100, 0.29, False),
        (30, 100, 0.29, True),
        (1, 1000, 0.0, True),
        (9, 10, 1.0, False),
        (10, 10, 1.0, True),
    ],
)
def test_skip_stops_above_the_limit_and_where_nothing_is_left(count, total, limit, stops):
    bad = [BadSample(row, None, "broken") for row in range(count)]
    if not stops:
        refuse_bad_samples(bad, total, policy="skip", limit=limit)
        return
    with pytest.raises(UsageError) as caught:
        refuse_bad_samples(bad, total, policy="skip", limit=limit)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{count} of {total} samples cannot be used")
    assert (f"--bad_samples_limit {limit:g}" in head) == (count < total)
    assert lines == [f"  row {row}: broken" for row in range(count)]


def test_an_unknown_policy_is_refused_before_anything_is_read(rows, output, decoded):
    with pytest.raises(
        UsageError, match="--bad_samples is 'ignore': choose from raise, skip, sample, off"
    ):
        usable(rows, policy="ignore", output_dir=output)
    assert decoded == [0]


# -- skipping --------------------------------------------------------------------------------------


def test_skip_keeps_the_good_rows_in_order_and_tells_the_others(rows, output, caplog):
    with caplog.at_level(logging.WARNING):
        kept = skip(rows, output)
    assert kept["text"][:] == [f"caption {i}" for i in range(100) if i not in (7, 40, 93)]
    entries = [json.loads(line) for line in (output / SKIPPED_FILE).read_text().splitlines()]
    assert [(e["path"], e["row"]) for e in entries] == [
        (rows[i]["image"]["path"], i) for i in (7, 40, 93)
    ]
    found = find(rows).bad
    assert [e["reason"] for e in entries] == [sample.reason for sample in found]
    assert f"3 of 100 samples are left out; see {output / SKIPPED_FILE}" in caplog.text


def test_a_path_with_a_line_break_takes_one_line_of_the_list(tmp_path, output):
    path = tmp_path / "a\nb \u6587.png"
    path.write_bytes(b"")
    skip(table([bytes_cell(png(1)), file_cell(path)]), output, limit=0.5)
    (line,) = (output / SKIPPED_FILE).read_text().splitlines()
    assert json.loads(line)["path"] == str(path)


def test_skipping_twice_gives_the_same_rows_and_the_same_list(rows, output, tmp_path):
    first, listed = skip(rows, output)["text"][:], (output / SKIPPED_FILE).read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (output, elsewhere):  # with the cache and without
        assert skip(rows, folder)["text"][:] == first
        assert (folder / SKIPPED_FILE).read_bytes() == listed


def test_a_selection_is_counted_in_its_own_rows(rows, output):
    kept = skip(rows.select([93, 0, 7, 99]), output, limit=0.5)
    assert kept["text"][:] == ["caption 0", "caption 99"]
    entries = (output / SKIPPED_FILE).read_text().splitlines()
    assert [json.loads(line)["row"] for line in entries] == [0, 2]


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_without_bad_samples_the_data_set_is_untouched_and_an_old_list_goes(output, policy):
    (output / SKIPPED_FILE).write_text("{}\n")
    rows = table([bytes_cell(png(i)) for i in range(5)])
    assert usable(rows, policy=policy, output_dir=output) is rows
    assert [path.name for path in output.iterdir()] == [CACHE_FILE]


def test_a_list_that_cannot_be_written_stops_the_run(rows, output):
    (output / SKIPPED_FILE).mkdir()
    with pytest.raises(UsageError, match="list of skipped samples cannot be written"):
        skip(rows, output)


# -- remembering -----------------------------------------------------------------------------------


def test_a_second_start_decodes_only_the_bad_ones(rows, output, decoded):
    first = skip(rows, output)
    assert decoded == [100]
    assert skip(rows, output)["text"][:] == first["text"][:]
    assert decoded == [103]


def test_a_refused_start_is_remembered_too(rows, output, decoded):
    for expected in (100, 103):
        with pytest.raises(UsageError, match="3 of 100"):
            usable(rows, output_dir=output)
        assert decoded == [expected]


def test_a_changed_file_is_looked_at_again(rows, output, decoded, tmp_path):
    skip(rows, output)
    (tmp_path / "images" / "50.png").write_bytes(b"broken now")
    (tmp_path / "images" / "07.png").write_bytes(png(7))
    (tmp_path / "images" / "60.png").unlink()
    kept = skip(rows, output, limit=0.1)
    gone = (40, 50, 60, 93)
    assert kept["text"][:] == [f"caption {i}" for i in range(100) if i not in gone]
    assert decoded == [100 + 3 + 2]


def test_captions_are_looked_at_even_where_the_image_is_known(output):
    cells = [bytes_cell(png(i)) for i in range(3)]
    skip(table(cells), output)
    assert skip(table(cells, ["a", None, "c"]), output, limit=0.5)["text"][:] == ["a", "c"]


def test_embedded_images_are_remembered_by_content(output, decoded):
    skip(table([bytes_cell(png(i)) for i in range(9)]), output)
    skip(table([bytes_cell(png(i)) for i in range(8, -1, -1)]), output)
    assert decoded == [9]
    skip(table([bytes_cell(png(i)) for i in range(10)]), output)
    assert decoded == [10]


def test_another_resolution_is_another_check(rows, output, decoded):
    skip(rows, output)
    skip(rows, output, resolution=64)
    assert decoded == [200]


def test_the_cache_may_lie_elsewhere(rows, output, decoded, tmp_path):
    path = tmp_path / "shared.json"
    skip(rows, output, cache=path)
    assert not (output / CACHE_FILE).exists()
    skip(rows, output, cache=str(path))
    assert decoded == [103]


def test_a_damaged_cache_is_a_warning(rows, output, decoded, caplog):
    first = skip(rows, output)["text"][:]
    (output / CACHE_FILE).write_bytes(b"{")
    with caplog.at_level(logging.WARNING):
        assert skip(rows, output)["text"][:] == first
    assert f"Ignoring {output / CACHE_FILE}" in caplog.text
    assert decoded == [200]
    skip(rows, output)
    assert decoded == [203]


def test_a_shared_file_is_of_one_data_set_and_one_check(tmp_path, rows, decoded, monkeypatch):
    folder = tmp_path / "images"
    (tmp_path / "link").symlink_to(folder)
    names = [shared_file("cache", *asked) for asked in ((str(folder), 64), ("images", 64))]
    names += [shared_file("cache", str(folder), 32)]
    assert len({*names}) == 3
    assert shared_file("cache", str(tmp_path / "link"), 64) == names[0]
    assert shared_file(None, "images", 64).is_relative_to(config.HF_DATASETS_CACHE)
    for count in (100, 103):  # two runs, each with a folder of its own
        output = tmp_path / str(count)
        output.mkdir()
        skip(rows, output, cache=tmp_path / "not there yet" / "a.json")
        assert decoded == [count]
        assert [path.name for path in output.iterdir()] == [SKIPPED_FILE]


# -- looking at few, or none -----------------------------------------------------------------------


def test_off_reads_no_image_and_looks_at_all_captions(rows, output, decoded, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(UsageError, match="1 of 100 samples") as told:
        usable(rows, policy="off", output_dir=output)
    assert str(told.value).splitlines()[1:] == ["  row 40: the caption is missing"]
    good = rows.select([i for i in range(100) if i != 40])
    assert usable(good, policy="off", output_dir=output) is good
    assert decoded == [0]
    assert "0 of 99 images were looked at (--bad_samples off)" in caplog.text
    assert not (output / CACHE_FILE).exists()


def test_a_sample_is_the_same_in_every_run(rows, output, decoded, monkeypatch, caplog):
    monkeypatch.setattr(bad_samples, "SAMPLED", 30)
    looked_at = {*bad_samples._looked_at("sample", 100)}
    assert len(looked_at) == 30
    assert looked_at == bad_samples._looked_at("sample", 100) != set(range(30))
    for _ in range(2):
        with pytest.raises(UsageError) as told:
            usable(rows, policy="sample", output_dir=output)
    bad = {i for i in (7, 93) if i in looked_at} | {40}
    assert str(told.value).startswith(f"{len(bad)} of 100 samples cannot be used; repair")
    assert decoded == [30 + len(bad - {40} | ({40} & looked_at))]  # good ones are remembered
    good = rows.select([i for i in range(100) if i not in (7, 40, 93)])
    with caplog.at_level(logging.INFO):
        assert usable(good, policy="sample", output_dir=output) is good
    assert "30 of 97 images were looked at (--bad_samples sample)" in caplog.text


def test_few_images_are_all_looked_at(rows, output, decoded):
    with pytest.raises(UsageError, match="3 of 100 samples"):
        usable(rows, policy="sample", output_dir=output)
    assert decoded == [100]


# -- several processes -----------------------------------------------------------------------------


def together(world_size, rows, output, **options):
    """What each of several processes gets, a thread for each: the rows' captions, or the error."""
    barrier, shared = threading.Barrier(world_size), [None] * world_size

    def process(rank):
        def gather(part):
            shared[rank] = part
            barrier.wait(30)
            joined = [item for share in shared for item in share or ()]
            barrier.wait(30)
            return joined

        try:
            return skip(rows, output, rank=rank, world_size=world_size, gather=gather, **options)[
                "text"
            ][:]
        except UsageError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(process, range(world_size)))


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_all_processes_keep_the_same_rows(rows, output, decoded, world_size):
    alone = output / "alone"
    alone.mkdir()
    expected = skip(rows, alone)["text"][:]
    assert together(world_size, rows, output) == [expected] * world_size
    assert decoded == [200]  # each image once, whoever looks at it
    for name in (SKIPPED_FILE, CACHE_FILE):
        assert (output / name).read_bytes() == (alone / name).read_bytes()


def test_more_processes_than_samples(output):
    rows = table([bytes_cell(png(1)), bytes_cell(b"x")])
    assert together(5, rows, output, limit=0.5) == [["caption 0"]] * 5


def test_all_processes_stop_and_one_lists(rows, output):
    first, second = together(2, rows, output, limit=0.02)
    assert str(first).count("\n") == 3
    assert str(second).splitlines()[0] == str(first).splitlines()[0]
    assert str(second).splitlines()[1:] == ["  (listed by the first process)"]
    assert (output / CACHE_FILE).is_file()


def test_numpy_captions_do_not_confuse_the_check(output):
    rows = table([bytes_cell(png(1))] * 2, [["a"], ["b", "c"]], List(Value("string")))
    formatted = rows.with_format("numpy", columns=["text"], output_all_columns=True)
    assert isinstance(formatted[0]["text"], np.ndarray)
    assert find(formatted).bad == []
