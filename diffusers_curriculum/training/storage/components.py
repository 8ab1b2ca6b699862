"""Parts of saved pipelines: which of their files are known, and copies of those."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

# The variant stands before the number of a part, or after it in older files.
_PART = r"(?:-\d{5}-of-\d{5})?"
_NAME = r"(?:diffusion_pytorch_)?model"
_WEIGHTS = re.compile(
    rf"{_NAME}{_PART}(?:\.([\w-]+?))?{_PART}\.safetensors"
    rf"|{_NAME}\.safetensors\.index(?:\.([\w-]+))?\.json"
)
_TEXTS = re.compile(
    r"(\w+_)?config\.json|tokenizer\.json|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|"
    r"added_tokens\.json|(spiece|tokenizer|sentencepiece\.bpe)\.model"
)


def is_known_file(name: str) -> bool:
    """Whether a file belongs to a saved part: weights in safetensors, configs, vocabularies."""
    return bool(_TEXTS.fullmatch(name) or _WEIGHTS.fullmatch(name))


def variant_of(name: str) -> str | None:
    """The variant in the name of a file of weights: "fp16" of model.fp16.safetensors."""
    match = _WEIGHTS.fullmatch(name)
    return (match[1] or match[2]) if match else None


def copy_component(source: Path, folder: Path, variant: str | None = None) -> None:
    """Copy the known files of a saved part, byte for byte. Where it has weights of ``variant``,
    those are taken, under the names of plain ones."""
    if folder.exists():
        if folder.samefile(source):
            return
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    files = [file for file in source.iterdir() if file.is_file() and is_known_file(file.name)]
    taken = variant if any(variant_of(file.name) == variant for file in files) else None
    for file in files:
        if not _WEIGHTS.fullmatch(file.name):
            shutil.copyfile(file, folder / file.name)
        elif variant_of(file.name) == taken:
            _copy_weights(file, folder, "" if taken is None else f".{taken}")


def _copy_weights(file: Path, folder: Path, mark: str) -> None:
    """Copy without ``mark`` in the name, nor in the names that an index of weights holds."""
    copy = folder / file.name.replace(mark, "", 1)
    if mark and copy.suffix == ".json":
        copy.write_text(file.read_text("utf-8").replace(mark, ""), "utf-8")
    else:
        shutil.copyfile(file, copy)
