"""Parts of saved pipelines: which of their files are known, and copies of those."""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO
from weakref import finalize

# The variant stands before the number of a part, or after it in older files.
_PART = r"(?:-\d{5}-of-\d{5})?"
_NAME = r"(?:diffusion_pytorch_)?model"
_WEIGHTS = re.compile(
    rf"{_NAME}{_PART}(?:\.([\w-]+?))?{_PART}\.safetensors"
    rf"|{_NAME}\.safetensors\.index(?:\.([\w-]+))?\.json"
)
_TEXTS = re.compile(
    r"(\w+_)?config\.json|tokenizer\.json|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|"
    r"added_tokens\.json|chat_template\.(jinja|json)|(spiece|tokenizer|sentencepiece\.bpe)\.model"
)


def is_known_file(name: str) -> bool:
    """Whether a file belongs to a saved part: weights in safetensors, configs, vocabularies."""
    return bool(_TEXTS.fullmatch(name) or _WEIGHTS.fullmatch(name))


def variant_of(name: str) -> str | None:
    """The variant in the name of a file of weights: "fp16" of model.fp16.safetensors."""
    match = _WEIGHTS.fullmatch(name)
    return (match[1] or match[2]) if match else None


class SavedPart:
    """The known files of a saved part, kept open: what a run leaves at its end holds them as they
    were, though their folder may have been moved or deleted meanwhile.

    Where the folder has weights of ``variant``, those are taken, under the names of plain ones.
    """

    def __init__(self, source: Path, variant: str | None = None) -> None:
        self.source, self._mark = source, ""
        files = [file for file in source.iterdir() if file.is_file() and is_known_file(file.name)]
        if variant is not None and any(variant_of(file.name) == variant for file in files):
            self._mark = f".{variant}"
        kept = self._mark[1:] or None
        with ExitStack() as opened:
            self._files = {
                file.name: opened.enter_context(file.open("rb"))
                for file in files
                if not _WEIGHTS.fullmatch(file.name) or variant_of(file.name) == kept
            }
            finalize(self, opened.pop_all().close)

    def copy(self, folder: Path) -> None:
        """Write the files into ``folder``, byte for byte, in the place of what is there."""
        if folder.exists():
            if self.source.exists() and folder.samefile(self.source):
                return
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for name, file in self._files.items():
            file.seek(0)
            self._copy_file(name, file, folder)

    def _copy_file(self, name: str, file: BinaryIO, folder: Path) -> None:
        """Copy without the variant in the name, nor in the names that an index of weights holds."""
        is_marked = bool(self._mark and _WEIGHTS.fullmatch(name))
        copy = folder / (name.replace(self._mark, "", 1) if is_marked else name)
        if is_marked and copy.suffix == ".json":
            copy.write_bytes(file.read().replace(self._mark.encode(), b""))
        else:
            with copy.open("wb") as written:
                shutil.copyfileobj(file, written, 2**20)
