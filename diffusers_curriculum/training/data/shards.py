"""Places in shards: where an image lies in a tar or Parquet file, and what lies there.

A place is written like a path, so that whatever names a sample names it: the image of
``1.tar#1536+20480/cat.jpg`` takes 20480 bytes from number 1536 on, and ``1.parquet#3/17.image`` is
column image of row 17 in row group 3. The file is a path, or an address that fsspec can read.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections import OrderedDict
from itertools import pairwise
from tarfile import TarInfo
from threading import Lock
from typing import TYPE_CHECKING, Any

from diffusers_curriculum.training.data.plan import Shards

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".tar", ".parquet")
_PLACE = re.compile(r"(.+?\.(?:tar|parquet))#(\d+)(?:\+(\d+))?/(.+)", re.DOTALL)
_KEPT = 2**29  # bytes of row groups that a process keeps


def in_tar(file: str, member: TarInfo) -> str:
    """The place of a member of a tar file."""
    return f"{file}#{member.offset_data}+{member.size}/{member.name.rpartition('/')[2]}"


def in_parquet(file: str, group: int, row: int, column: str) -> str:
    """The place of a cell of a Parquet file, of a row counted in its row group."""
    return f"{file}#{group}/{row}.{column}"


def file_of(path: str) -> str:
    """The shard of a place; any other path as it is."""
    place = _PLACE.fullmatch(path) if "#" in path else None
    return path if place is None else place[1]


def content_at(path: str) -> bytes | None:
    """What lies at a place; None for any other path.

    Raises:
        ValueError: the shard ends before, or the cell holds no bytes; fsspec's and Arrow's own
            errors for what they cannot read.
    """
    place = _PLACE.fullmatch(path) if "#" in path else None
    if place is None:
        return None
    file, first, size, name = place.groups()
    if size is None:
        row, _, column = name.partition(".")
        return _bytes_of(_GROUPS.column(file, int(first), column)[int(row)].as_py())
    from fsspec.core import url_to_fs

    filesystem, inside = url_to_fs(file)
    content = filesystem.cat_file(inside, int(first), int(first) + int(size))
    if len(content) < int(size):
        raise ValueError(f"the shard ends {int(size) - len(content)} bytes before the image does")
    return content


def shards_of(rows: Dataset, image_column: str, buffer: int) -> Shards:
    """The shards of samples that stand one after the other: tar files, or row groups of Parquet.

    Args:
        buffer: how many samples are shuffled among one another.
    """
    cells = rows.select_columns([image_column]).with_format("arrow")[:][image_column]

    def shard(row: int) -> str:
        """The tar file, or the row group."""
        path = cells[row].as_py()["path"]
        place = _PLACE.fullmatch(path)
        return place[1] if place is not None and place[3] else path.rpartition("/")[0]

    starts = [0]
    while starts[-1] < len(cells):
        places, own = range(starts[-1], len(cells)), shard(starts[-1])
        end = bisect(places, False, key=lambda row, own=own: shard(row) != own)
        starts.append(starts[-1] + end)
    return Shards(tuple(end - start for start, end in pairwise(starts)), buffer)


def _bytes_of(cell: Any) -> bytes:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise ValueError("there is no image")
    return content


class _Groups:
    """Columns of row groups, which are read whole: those asked for last, as many as fit."""

    def __init__(self) -> None:
        self._lock, self._kept = Lock(), OrderedDict[tuple[str, int, str], Any]()

    def column(self, *key: Any) -> Any:
        """By file, number of the row group, and name."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _read_group(*key)
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(c.nbytes for c in self._kept.values()) > _KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


def _read_group(file: str, group: int, column: str) -> Any:
    from fsspec.core import url_to_fs
    from pyarrow.parquet import ParquetFile

    filesystem, inside = url_to_fs(file)
    with filesystem.open(inside, "rb") as opened:
        return ParquetFile(opened).read_row_group(group, columns=[column]).column(0)


_GROUPS = _Groups()
