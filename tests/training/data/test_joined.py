"""Several sources are one table of samples, of which each is seen as often as its source says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_curriculum.training.arguments.data_config import Source
from diffusers_curriculum.training.data.joined import apart
from diffusers_curriculum.training.data.plan import BatchPlan, SourceShare
from diffusers_curriculum.training.data.rows import Rows, read_rows
from diffusers_curriculum.training.errors import UsageError
from tests.training.command_lines import parse_args

MODEL = ("--pretrained_model_name_or_path", "some/model")


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    entries = [{"file_name": f"{i}.png", "text": f"{folder.name} {i}"} for i in range(count)]
    for number, entry in enumerate(entries):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / entry["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def saved(folder: Path, count: int) -> Path:
    """A data set with embedded images, whose captions are lists and whose columns are its own."""
    kinds = Features({"picture": ImageFeature(), "words": List(Value("string"))})
    cells = [
        {"picture": Image.new("RGB", (4, 4)), "words": [f"a{i}", f"b{i}"]} for i in range(count)
    ]
    Dataset.from_list(cells, features=kinds).save_to_disk(str(folder))
    return folder


def parsed(tmp_path: Path, rows: Any, *more: object, name: str = "data.json") -> Any:
    file = tmp_path / name
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    words = (*MODEL, "--data_config", file, "--cache_dir", tmp_path / "cache", *more)
    return parse_args([*map(str, words)])


def read(args: Any) -> Rows:
    return read_rows(args, 0, caption_column=args.caption_column)


def test_sources_of_all_kinds_become_one_table(tmp_path: Path) -> None:
    cats, dogs = pictures(tmp_path / "cats", 3), pictures(tmp_path / "dogs", 4)
    own = {"image_column": "picture", "caption_column": "words"}
    rows = [
        {"train_data_dir": str(cats), "repeats": 2},
        {"dataset_name": str(saved(tmp_path / "saved", 2)), **own},
        {"train_data_dir": str(dogs), "instance_prompt": "a dog", "max_train_samples": 3},
    ]
    args = parsed(tmp_path, rows)
    table, shares = apart(read(args).training, args.sources)
    assert table.column_names == ["image", "text"]
    assert shares == (SourceShare(3, 6), SourceShare(2, 2), SourceShare(3, 3))
    lists = [*([f"cats {i}"] for i in range(3)), *([f"a{i}", f"b{i}"] for i in range(2))]
    assert list(table["text"]) == [*lists, *[["a dog"]] * 3]
    assert [cell["bytes"] is None for cell in table["image"]] == [True] * 3 + [False] * 2 + [
        True
    ] * 3

    # texts stay texts where none is a list; the command line says what a row leaves out
    args = parsed(tmp_path, json.dumps([rows[0], {"train_data_dir": str(dogs)}]), name="d.yaml")
    assert read(args).training["text"][3] == "dogs 0"
    args = parsed(
        tmp_path,
        [rows[0] | {"caption_column": "text"}, {"train_data_dir": str(dogs)}],
        "--instance_prompt",
        "a pet",
    )
    assert set(read(args).training["text"][3:]) == {"a pet"}


def test_a_share_is_kept_apart_of_all_and_no_file_of_it_is_trained_on(tmp_path: Path) -> None:
    cats = pictures(tmp_path / "cats", 6)
    embedded = {"image_column": "picture", "caption_column": "words"}
    first = {"dataset_name": str(saved(tmp_path / "saved", 2)), **embedded}
    args = parsed(
        tmp_path,
        [first, {"train_data_dir": str(cats)}, {"train_data_dir": str(cats)}],
        "--validation_split",
        "0.25",
    )
    training, held_out = read(args)
    assert held_out is not None
    assert len(held_out) == 4
    kept, files = ({cell["path"] for cell in rows["image"]} for rows in (held_out, training))
    assert not (kept & files) - {None}


@pytest.mark.parametrize("batch", [1, 5])
def test_each_image_is_seen_as_often_as_its_source_says(batch: int) -> None:
    sources = SourceShare(3, 6), SourceShare(4, 2), SourceShare(5, 7)
    plan = BatchPlan(12, batch, 2, 1, 0, seed=3, sources=sources)
    assert plan.epoch == 15
    epochs = [[plan.index(p) for p in range(e * 15, (e + 1) * 15)] for e in range(20)]
    assert len(set(map(tuple, epochs))) == 20
    seen: Counter[int] = Counter()
    for number, epoch in enumerate(epochs, 1):
        seen.update(epoch)
        assert [seen[row] for row in range(3)] == [2 * number] * 3
        for rows, draws in ((range(3, 7), 2), (range(7, 12), 7)):
            counts = [seen[row] for row in rows]
            assert sum(counts) == draws * number
            assert max(counts) - min(counts) <= 1
    assert len({frozenset({*epoch} & {3, 4, 5, 6}) for epoch in epochs[::2]}) > 1
    assert plan.steps_for_epochs(2) == -(-30 // (2 * batch))
    # resume, ranks and class images: positions say all
    ranks = [BatchPlan(12, batch, 2, 2, rank, 3, 4, sources) for rank in range(2)]
    one = BatchPlan(12, 2 * batch, 2, 1, 0, 3, 4, sources)
    for step in (0, 7):
        for micro in range(2):
            both = [each.index(p) for each in ranks for p in each.positions(step, micro)]
            assert both == [one.index(p) for p in one.positions(step, micro)]
            assert all(12 <= row < 16 for row in both[1::2])
            assert both[::2] == [plan.index(p // 2) for p in one.positions(step, micro)][::2]


def test_sources_of_slots_and_of_gathered_losses_are_those_of_their_rows() -> None:
    sources = SourceShare(3, 6), SourceShare(4, 2)
    for class_images in (0, 4):
        ranks = [BatchPlan(7, 2, 3, 2, rank, 3, class_images, sources) for rank in range(2)]
        shares = {0: 0.75, 1: 0.25} if not class_images else {0: 0.375, 1: 0.125}
        assert ranks[0].shares_of_sources == [*shares.values()]
        for step in range(4):  # over edges of epochs
            gathered = []
            for plan in ranks:
                for micro in range(3):
                    rows = [plan.index(position) for position in plan.positions(step, micro)]
                    own = [-1 if row >= 7 else int(row >= 3) for row in rows]
                    assert plan.sources_at(step, plan.slots(micro)).tolist() == own
                    gathered += own
            assert ranks[0].sources_observed(step).tolist() == gathered
            assert ranks[1].sources_observed(step).tolist() == gathered


GOOD = {"train_data_dir": "cats"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "holds no rows: give a list with one row for each source"),
        (GOOD, "holds one dict: give a list"),
        ("[{", "which is not JSON: "),
        ('[{"repeats": NaN}]', "row 1: repeats is nan: it must be above 0"),
        ([GOOD, 3], "row 2 is 3: give names and values, of dataset_name"),
        (
            [GOOD | {"weight": 2}],
            "row 1 has 'weight', which no row can have: choose from .*repeats",
        ),
        ([GOOD, {"repeats": 2}], "row 2 does not say where its images are: give dataset_name or"),
        ([GOOD | {"repeats": 0}], "row 1: repeats is 0: it must be above 0"),
        ([GOOD | {"repeats": "2"}], "row 1 has repeats='2': give a number"),
        ([GOOD | {"repeats": True}], "row 1 has repeats=True: give a number"),
        ([GOOD | {"max_train_samples": 0}], "row 1: max_train_samples is 0: it must be at least 1"),
        ([GOOD | {"train_split": None}], "row 1 has train_split=None: give a text"),
        ([GOOD | {"dataset_config_name": "a"}], "no effect without dataset_name"),
        (
            [GOOD | {"instance_prompt": "a", "caption_column": "b"}],
            "has instance_prompt and caption_column: drop one",
        ),
    ],
)
def test_what_cannot_be_is_refused(rows: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        parsed(tmp_path, rows)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--train_data_dir", "."), "both name the images: drop one of the two"),
        (("--dataset_name", "a/b"), "both name the images"),
        (("--max_train_samples", 3), "put max_train_samples into its rows"),
        (("--validation_split", "test"), "names a split, and --data_config several"),
        (
            ("--with_prior_preservation", "--class_prompt", "a", "--class_data_dir", "cats/in"),
            "cats/in and cats, .* lie in each other",
        ),
    ],
)
def test_flags_that_contradict_the_file_are_refused(
    flags: tuple[object, ...], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told):
        parsed(tmp_path, [GOOD], *flags)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data.txt: give a file that ends in .json or .yaml"):
        parsed(tmp_path, [GOOD], name="data.txt")
    with pytest.raises(UsageError, match=r"which cannot be read: .*No such file"):
        parse_args([*MODEL, "--data_config", str(tmp_path / "none.json")])
    with pytest.raises(UsageError, match="not YAML: "):
        parsed(tmp_path, "- a: [", name="data.yaml")


def test_what_a_source_lacks_is_told_with_its_row(tmp_path: Path) -> None:
    cats = {"train_data_dir": str(pictures(tmp_path / "cats", 3))}
    for row, told in (
        ({"train_data_dir": "none"}, "row 2: --train_data_dir 'none' is not a folder"),
        (cats | {"caption_column": "words"}, "row 2: --caption_column 'words' is not a column"),
        (
            cats | {"repeats": 0.1},
            "row 2 has repeats=0.1, .* of its 3 samples .*: give 0.33 or more",
        ),
    ):
        args = parsed(tmp_path, [cats, row])
        with pytest.raises(UsageError, match=told):
            apart(read(args).training, args.sources)
    args = parsed(tmp_path, [cats, cats])
    rows = read(args).training
    with pytest.raises(UsageError, match=r"row 2: no sample of .*cats' is left to train on"):
        apart(rows.select(range(3)), args.sources)
    many = tuple(Source(source.where, source.flags, 1e9) for source in args.sources)
    with pytest.raises(UsageError, match="an epoch of 6,000,000,000 samples"):
        apart(rows, many)
