"""Every caption encoded once, before training: what a network is told of it.

<cache>/00000.safetensors, ...    the captions in their order, some in each
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_curriculum.training.cache.files import CAPTIONS, is_there, sealed
from diffusers_curriculum.training.cache.filling import Processes, WorkFolder
from diffusers_curriculum.training.storage.files import disk_full_explained, write_atomically
from diffusers_curriculum.training.storage.fingerprints import hash_config
from diffusers_curriculum.training.storage.tensors import tensor_bytes

SHARD = 128  # captions of a file
_PARTS = "parts"  # in the header of a file: names of what is told, and whether it is a list of one
_FILES, _CAPTIONS = 1024, 4096  # that are kept open, which takes no memory but that of the mapping

Conditioning = Mapping[str, Any]


class CachedCaptions(Mapping[str, Conditioning]):
    """What a network is told of captions, by caption; tensors are windows into files on disk.

    Args:
        captions: in their order in the cache.
    """

    def __init__(self, folder: Path, captions: Sequence[str]) -> None:
        self.folder = folder
        self.numbers = {caption: number for number, caption in enumerate(captions)}
        self._shard = lru_cache(_FILES)(self._opened)
        self._read = lru_cache(_CAPTIONS)(self._told)

    def __getitem__(self, caption: str) -> Conditioning:
        return self._read(self.numbers[caption])

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def _told(self, number: int) -> Conditioning:
        file = self._shard(number // SHARD)
        told = {}
        for name, is_listed in json.loads(file.metadata()[_PARTS]).items():
            tensor = file.get_tensor(f"{number}.{name}")
            told[name] = [tensor] if is_listed else tensor
        return told

    def _opened(self, shard: int) -> Any:
        return safe_open(self.folder / _name(shard), "pt")


class _Shards(WorkFolder):
    """Where the files of a text cache are written, each at once."""

    def done(self) -> bytes:
        return bytes((self.files / _name(shard)).is_file() for shard in range(self.batches))

    def write(self, shard: int, conditionings: Sequence[Conditioning]) -> None:
        """Write a file, which is whole or not there.

        Raises:
            DiskFullError: no space; what is there stays for a later run.
        """
        tensors: dict[str, Tensor] = {}
        for number, told in enumerate(conditionings, shard * SHARD):
            for name, value in told.items():
                (tensors[f"{number}.{name}"],) = value if isinstance(value, list) else (value,)
        parts = {name: isinstance(value, list) for name, value in conditionings[0].items()}
        content = tensor_bytes(tensors, **{_PARTS: json.dumps(parts)})
        with disk_full_explained(self.final, len(content) * (self.batches - sum(self.done()))):
            write_atomically(self.files / _name(shard), content)


def cache_captions(
    captions: Iterable[str],
    encode: Callable[[Sequence[str]], Sequence[Conditioning]],
    *,
    folder: str | Path,
    fingerprint: Mapping[str, Any],
    processes: Processes | None = None,
) -> CachedCaptions:
    """Encode every caption, unless the cache is there, and open it.

    A run that was killed left nothing that is taken for a cache, and the next one goes on from
    there.

    Args:
        captions: in any order, some of them more than once.
        encode: what the network is told of each of some, on the CPU: by name, tensors or lists of
            one. They are the same ones whatever processes and interruptions there are.
        fingerprint: which encoders, in which dtype, as plain JSON data.
        processes: those that encode together; None for one alone.

    Raises:
        UsageError: the folder holds something else, a cache of something else or a damaged one.
        DiskFullError: the disk filled up meanwhile.
    """
    processes, final, names = processes or Processes(), Path(folder).resolve(), sorted({*captions})
    own = {"count": len(names), "captions": hash_config(names)}
    asked = sealed(fingerprint, own, CAPTIONS)
    if not is_there(final, CAPTIONS, asked, hashes=processes.rank == 0):
        work = _Shards(final, CAPTIONS, asked, -(-len(names) // SHARD), SHARD)

        def write(todo: Sequence[int]) -> None:
            for shard in tqdm(todo, "Encoding captions", disable=not processes.progress):
                work.write(shard, encode(names[shard * SHARD : (shard + 1) * SHARD]))

        work.fill(write, processes)
    return CachedCaptions(final, names)


def _name(shard: int) -> str:
    return f"{shard:05}.safetensors"
