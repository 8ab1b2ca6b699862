"""Data sets in shards that are read where they lie: tar files in WebDataset's form, and Parquet.

An index, made once and remembered, tells where each sample lies, with its texts. Images are read
when their turn comes. So the number of samples is known, and any of them can be the next.
"""

from __future__ import annotations

import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from datasets import config as config_of_datasets
from fsspec.core import url_to_fs
from pyarrow.parquet import ParquetFile

from diffusers_curriculum.models.image_files import is_image_suffix
from diffusers_curriculum.training.data.checks import describe
from diffusers_curriculum.training.data.columns import check_image_column, holds_paths
from diffusers_curriculum.training.data.folders import no_such_split
from diffusers_curriculum.training.data.shards import SUFFIXES, in_parquet, in_tar
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.storage.files import write_atomically
from diffusers_curriculum.training.storage.fingerprints import hash_config

_FORMAT = 1  # of an index
_READERS = 8  # shards that are looked at at once, where that waits for a disk or a network
_TEXTS = {"text": ("txt", "caption"), "label": ("cls",)}  # suffixes of members, by default columns


class Columns(NamedTuple):
    """The columns that are read.

    Attributes:
        images: with the flags that name them; every sample has one of the first.
        texts: of captions or classes.
    """

    images: Mapping[str, str]
    texts: Sequence[str]


def read_shards(
    name: str,
    config: str | None = None,
    folder: str | None = None,
    *,
    split: str | None,
    columns: Columns,
    cache_dir: str | None,
    split_flag: str = "--train_split",
) -> Dataset:
    """The samples of all shards of a split, in the order of their files' names; cells of images are
    places (see :mod:`shards`).

    Args:
        name: a data set on the Hub, a folder, or a pattern of files such as "shards/*.tar".
        folder: in that data set.
        split: None is "train".

    Raises:
        UsageError: no such split, files of other kinds, a sample without an image, no column of a
            name, texts that cannot be read.
    """
    files = _files(name, config, folder, split or "train", cache_dir, split_flag)
    store = Path(cache_dir or config_of_datasets.HF_DATASETS_CACHE, "shards")
    store.mkdir(parents=True, exist_ok=True)
    indexed = partial(_indexed, columns=columns, store=store)
    used, begun = time.thread_time(), time.perf_counter()
    first = indexed(files[0])
    waits = time.thread_time() - used < 0.5 * (time.perf_counter() - begun)
    # threads that do not wait for a disk or a network hinder one another in Python
    with ThreadPoolExecutor(_READERS if waits else 1) as pool:
        parts = [first, *pool.map(indexed, files[1:])]
    return concatenate_datasets([part for part in parts if len(part)] or parts[:1])


def _files(
    name: str,
    config: str | None,
    folder: str | None,
    split: str,
    cache_dir: str | None,
    split_flag: str,
) -> list[str]:
    options: dict[str, Any] = {"cache_dir": cache_dir}
    if name.endswith(SUFFIXES):
        kind = "webdataset" if name.endswith(".tar") else "parquet"
        options |= {"path": kind, "data_files": name}
    else:
        options |= {"path": name, "name": config, "data_dir": folder}
    splits: Any = datasets.load_dataset_builder(**options).config.data_files or {}
    if split not in splits:
        raise UsageError(no_such_split("--streaming", name, split, splits, split_flag))
    files = sorted(map(str, splits[split]))
    strange = [file for file in files if os.path.splitext(file)[1] != os.path.splitext(files[0])[1]]
    strange += [file for file in files[:1] if not file.endswith(SUFFIXES)]
    if strange:
        raise UsageError(
            f"--streaming reads shards of one kind, .tar (uncompressed) or .parquet, and {name!r} "
            f"has {os.path.basename(strange[0])}: drop --streaming, or name the shards by a "
            "pattern, such as --dataset_name 'folder/*.tar'."
        )
    return files


def _indexed(file: str, columns: Columns, store: Path) -> Dataset:
    """The samples of a shard, from its index, which is made where it is missing."""
    filesystem, inside = url_to_fs(file)
    told = [_FORMAT, file, filesystem.ukey(inside), list(columns.images), list(columns.texts)]
    stored = store / f"{hash_config(told)}.arrow"
    if not stored.exists():
        make = _tar_index if file.endswith(".tar") else _parquet_index
        try:
            with filesystem.open(inside, "rb") as opened:
                table = make(file, opened, columns)
        except UsageError:
            raise
        except Exception as error:  # a broken file makes its readers raise nearly any type
            raise ValueError(f"{file}: {describe(error)}") from error
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        write_atomically(stored, sink.getvalue().to_pybytes())
    return Dataset.from_file(str(stored))


def _table(
    places: Mapping[str, Sequence[str | None]], texts: Mapping[str, Any], kinds: Mapping[str, Any]
) -> pa.Table:
    features = Features({**{name: Image(decode=False) for name in places}, **kinds})
    schema = features.arrow_schema
    cells = {name: _cells(paths) for name, paths in places.items()}
    return pa.table({**cells, **texts}, schema=schema)


def _cells(places: Sequence[str | None]) -> pa.StructArray:
    """Images without bytes."""
    parts = [pa.nulls(len(places), pa.binary()), pa.array(places, pa.string())]
    empty = pa.array([place is None for place in places], pa.bool_())
    return pa.StructArray.from_arrays(parts, ["bytes", "path"], mask=empty)


# -- Parquet ---------------------------------------------------------------------------------------


def _parquet_index(file: str, opened: IO[bytes], columns: Columns) -> pa.Table:
    parquet = ParquetFile(opened)
    features, texts = Features.from_arrow_schema(parquet.schema_arrow), list(columns.texts)
    for column, flag in columns.images.items():
        check_image_column(features, column, flag)
        if holds_paths(features[column]):
            raise UsageError(
                f"{flag} {column!r} of {file} holds paths, and --streaming reads images that are "
                "in the file: drop --streaming."
            )
    missing = [column for column in texts if column not in features]
    if missing:
        raise UsageError(
            f"{missing[0]!r} is not a column of {file}. Columns found: {', '.join(features)}."
        )
    counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    places = {
        column: [
            in_parquet(file, group, row, column)
            for group, count in enumerate(counts)
            for row in range(count)
        ]
        for column in columns.images
    }
    kinds = {column: features[column] for column in texts}
    read = parquet.read(columns=texts).cast(Features(kinds).arrow_schema) if texts else None
    return _table(places, {} if read is None else {c: read[c] for c in texts}, kinds)


# -- tar -------------------------------------------------------------------------------------------


def _tar_index(file: str, opened: IO[bytes], columns: Columns) -> pa.Table:
    places: dict[str, list[str | None]] = {column: [] for column in columns.images}
    texts: dict[str, list[Any]] = {column: [] for column in columns.texts}
    suffixes: Sequence[str] = ()
    with tarfile.open(fileobj=opened, mode="r:") as tar:
        for key, members in _samples(tar, file):
            suffixes = suffixes or list(members)
            for column, found in places.items():
                member = _image(members, column, f"{file}/{key}")
                if member is None and column == next(iter(columns.images)):
                    raise UsageError(
                        f"{file}/{key} has no image: its files end in {', '.join(members)}. Name "
                        "one of these by --image_column."
                    )
                found.append(None if member is None else in_tar(file, member))
            for column, found in texts.items():
                found.append(_text(tar, members, column))
    for column, found in texts.items():
        if suffixes and all(text is None for text in found):
            raise UsageError(
                f"no sample of {file} has {column!r}: their files end in {', '.join(suffixes)}. "
                "Name one of these, or a key in their json, by --caption_column or --label_column."
            )
    return _table(places, texts, {column: _kind(found) for column, found in texts.items()})


def _samples(tar: tarfile.TarFile, file: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Each sample's name, and its members by what follows the first dot in theirs."""
    key, members = "", dict[str, tarfile.TarInfo]()
    next_member: Callable[[], tarfile.TarInfo | None] = tar.next
    for member in iter(next_member, None):
        tar.members.clear()  # type: ignore[attr-defined]  # which it would keep
        above, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not (member.isfile() and stem and suffix):  # a folder, or hidden
            continue
        own, suffix = f"{above}/{stem}".lstrip("./"), suffix.lower()
        if own != key and members:
            yield key, members
            members = {}
        if suffix in members:
            raise UsageError(f"{file} has {member.name} twice.")
        key, members[suffix] = own, member
    if members:
        yield key, members


def _image(members: Mapping[str, Any], column: str, sample: str) -> Any:
    if column in members or column != "image":
        return members.get(column)
    found = [suffix for suffix in members if is_image_suffix(f".{suffix}")]
    if len(found) > 1:
        raise UsageError(
            f"{sample} has several images ({', '.join(found)}): name one of these by "
            "--image_column."
        )
    return members[found[0]] if found else None


def _text(tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], column: str) -> Any:
    named = (suffix for suffix in (column, *_TEXTS.get(column, ())) if suffix in members)
    suffix = next(named, None)
    if suffix is not None:
        text = " ".join(_content(tar, members[suffix]).split())
        return int(text) if suffix == "cls" and text.isdecimal() else text
    return json.loads(_content(tar, members["json"])).get(column) if "json" in members else None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    opened = tar.extractfile(member)
    return "" if opened is None else opened.read().decode("utf-8")


def _kind(texts: Sequence[Any]) -> Any:
    """What a column holds, by its first text."""
    kinds = {list: List(Value("string")), int: Value("int64"), float: Value("float64")}
    first = next((text for text in texts if text is not None), "")
    return kinds.get(type(first), Value("string"))
