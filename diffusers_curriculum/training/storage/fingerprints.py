"""Short digests that tell whether data, model and noise schedule are still those of the first run.

They are cheap, because they are taken at every start: names, sizes and captions, never pixels or
weights. An image that was replaced by another of the same name and size is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from importlib import import_module
from json.encoder import encode_basestring_ascii
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.training.storage.manifest import file_sha256

if TYPE_CHECKING:
    from datasets import Dataset

# What a checkpoint does not hold, and a step depends on; the scheduler has a digest of its own.
_TEXT = ("text_encoder", "tokenizer")
FROZEN_PARTS = (*_TEXT, "vae", *(f"{name}_{number}" for number in (2, 3) for name in _TEXT))


def dataset_digest(
    rows: Dataset, image_column: str, text_column: str | None, folder: str | None
) -> str:
    """SHA-256 over caption or class, file name and size in bytes of every row, in their order, the
    names of the classes, and which of the rows are selected.

    The digest is the same in another cache or after the folder was moved.

    Args:
        rows: as ``load_images`` returns them, images undecoded.
        text_column: of captions or classes; None where there is none.
        folder: the image folder, to which file names are taken relative; None for other sources,
            where only the last part of a name counts.
    """
    root = None if folder is None else os.path.abspath(folder)
    table: Any = rows.data
    compute: Any = import_module("pyarrow.compute")  # most of its names are made at import
    digest = hashlib.sha256()
    columns = [image_column] if text_column is None else [image_column, text_column]
    kind = None if text_column is None else rows.features[text_column]
    names = getattr(kind, "names", None)  # of a ClassLabel
    if names is not None:
        digest.update(json.dumps(names).encode())
    selected = rows._indices  # which rows of the table, None for all: no public name tells it
    if selected is not None:
        digest.update(selected.column(0).to_numpy().tobytes())
    for batch in table.table.select(columns).to_batches(max_chunksize=1000):
        images = batch.column(0)
        captions = batch.column(1).to_pylist() if len(columns) > 1 else [None] * len(images)
        # the lengths stand in Arrow's offsets: the image bytes are not read
        sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
        paths = compute.struct_field(images, "path").to_pylist()
        cells = zip(paths, sizes, captions, strict=True)
        entries = (
            (_relative(path, root), _size(path) if size is None else size, caption)
            for path, size, caption in cells
        )
        digest.update("".join(f"[{', '.join(map(_as_json, each))}]\n" for each in entries).encode())
    return digest.hexdigest()


def model_identity(name: str, revision: str | None, variant: str | None) -> dict[str, Any]:
    """What tells the base model: name, revision and variant, or file names and sizes of a folder.

    The U-Net is left out, as its weights come from the checkpoint.
    """
    if not os.path.isdir(name):
        return {"name": name, "revision": revision, "variant": variant}
    folders = (Path(name, part) for part in FROZEN_PARTS)
    files = (f for folder in folders if folder.is_dir() for f in folder.iterdir() if f.is_file())
    listed = sorted((f.relative_to(name).as_posix(), f.stat().st_size) for f in files)
    return {"files": hash_lines(map(str, listed)), "variant": variant}


def weights_identity(name: str, part: str) -> dict[str, Any]:
    """What tells a network of the base model that stays frozen, too: sizes and samples of its
    weight files, as two of one architecture differ in nothing else, but there almost everywhere.
    Of a model on the Hub, :func:`model_identity` tells it."""
    if not os.path.isdir(name):
        return {}
    files = sorted(Path(name, part).glob("*.safetensors"))
    return {"weights": hash_lines(f"{file.name} {_sampled(file)}" for file in files)}


def part_identity(path: str, part: str, revision: str | None, variant: str | None) -> Any:
    """What tells a part of a pipeline: sizes and samples of its files, or its place on the Hub."""
    if not os.path.isdir(path):
        return {"name": path, "revision": revision, "variant": variant}
    files = sorted(file for file in Path(path, part).iterdir() if file.is_file())
    return {
        "files": hash_lines(f"{file.name} {_sampled(file)}" for file in files),
        "variant": variant,
    }


def _sampled(file: Path, pieces: int = 64, length: int = 2**16) -> str:
    """SHA-256 of pieces at equal distances, and of the end; of a short file, all of it."""
    size, digest = file.stat().st_size, hashlib.sha256()
    step = max(length, size // pieces)
    with file.open("rb") as content:
        for place in (*range(0, size, step), max(0, size - length)):
            content.seek(place)
            digest.update(content.read(length))
    return f"{size} {digest.hexdigest()}"


def schedule_identity(levels: NoiseLevels) -> dict[str, Any]:
    """Family, number, range and digest of the noise levels, and EDM's sigma_data.

    The log-SNR counts to six decimals: its last bits depend on the processor.
    """
    values = [f"{value:.6f}" for value in levels.log_snr.tolist()]
    return {
        "family": levels.family,
        "levels": len(levels),
        "log_snr": f"{values[-1]} to {values[0]}",
        "sha256": hash_lines(values),
    } | ({} if levels.sigma_data is None else {"sigma_data": levels.sigma_data})


def module_identity(module: ModuleType) -> str:
    """SHA-256 of the sources of a module, or of all that lie in a package."""
    file = Path(module.__file__ or "")
    root = file.parent if hasattr(module, "__path__") else file
    files = sorted(root.rglob("*.py")) if root.is_dir() else [file]
    return hash_lines(f"{path.name} {file_sha256(path)}" for path in files)


def hash_lines(lines: Iterable[str]) -> str:
    """SHA-256 of some lines of text, in hexadecimal."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_config(config: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hash_lines([json.dumps(config, sort_keys=True)])


def flattened(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all leaves of nested dicts; other values are leaves."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flattened(item, f"{name}.{key}")
    else:
        yield name, value


def _as_json(value: Any) -> str:
    """As json.dumps has it, which takes longer for each call."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    return "null" if value is None else json.dumps(value)


def _relative(path: str | None, root: str | None) -> str | None:
    if path is None:
        return None
    if root is not None:
        plain = path.startswith("/") and "/." not in path and "//" not in path
        whole = path if plain else os.path.abspath(path)  # which takes time with millions of files
        if whole.startswith(root + os.sep):
            return whole[len(root) + 1 :].replace(os.sep, "/")
    return path.rpartition("/")[2]


def _size(path: str | None) -> int | None:
    if path and "#" in path and path.partition("#")[0].endswith((".tar", ".parquet")):
        return None  # a place in a shard
    try:
        return os.path.getsize(path) if path else None
    except OSError:  # a remote address, or a dangling link: the scan of the samples tells
        return None
