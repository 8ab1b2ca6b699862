"""Looking at samples: each image decoded, each caption and class looked at, in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from diffusers_curriculum.training.data.checked_images import CheckedImages, image_key
from diffusers_curriculum.training.data.checks import (
    caption_fault,
    image_fault,
    label_fault,
    sample_name,
)
from diffusers_curriculum.training.data.masks import Masks

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 16  # rows read at once: embedded images are held in memory, a call per row is slow
_TEXTS = 1000  # the same where no image is looked at


@dataclass(frozen=True)
class BadSample:
    """One sample that cannot be trained on."""

    row: int  # of the data set that was checked
    path: str | None  # of the image file, None where the image has none
    reason: str

    def __str__(self) -> str:
        return f"{sample_name({'path': self.path}, self.row)}: {self.reason}"


class Findings(NamedTuple):
    """What a look at some rows gave."""

    bad: list[BadSample]  # by rising row
    fresh: list[str]  # keys of the good images that were not known before
    odd: list[BadSample]  # good images, but for what no pixel depends on


def find_bad_samples(
    dataset: Dataset,
    image_column: str = "image",
    caption_column: str | None = None,
    *,
    label_column: str | None = None,
    masks: Masks | None = None,
    resolution: int = 512,
    rows: range | None = None,
    looked_at: Collection[int] | None = None,
    known: CheckedImages | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Findings:
    """Decode every image that is not known to be good, and look at every caption, class and mask.

    Args:
        rows: consecutive rows to look at; None is all.
        looked_at: rows whose images and masks are decoded; None is all.
        known: images that need not be decoded again.
        workers: threads; None is one per core, at most 8.
    """
    rows = range(len(dataset)) if rows is None else rows
    columns = ((caption_column, caption_fault), (label_column, label_fault))
    look = _Look(
        dataset,
        image_column,
        {column: fault for column, fault in columns if column is not None},
        masks,
        resolution,
        frozenset() if known is None else known.keys,
        rows if looked_at is None else looked_at,
    )
    findings = Findings([], [], [])
    size = _CHUNK if looked_at is None or looked_at else _TEXTS
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    with (
        ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(rows), desc="Checking samples", disable=not progress, leave=False) as bar,
    ):
        # Ctrl-C ends the loop, and with it the map, which drops the chunks that nobody has begun.
        for chunk, part in zip(chunks, pool.map(look, chunks), strict=True):
            findings.bad.extend(part.bad)
            findings.fresh.extend(part.fresh)
            findings.odd.extend(part.odd)
            bar.update(len(chunk))
    return findings


@dataclass(frozen=True)
class _Look:
    """A look at the samples of some rows."""

    rows: Dataset
    image_column: str
    text_faults: Mapping[str, Callable[[Any], str | None]]  # by the columns of texts
    masks: Masks | None
    resolution: int
    known: frozenset[str]
    looked_at: Container[int]

    @cached_property
    def texts(self) -> Dataset:
        return self.rows.select_columns([*self.text_faults])

    def __call__(self, chunk: range) -> Findings:
        findings = Findings([], [], [])
        shown = any(row in self.looked_at for row in chunk)  # else no image is even read
        if not (shown or self.text_faults):
            return findings
        cells = (self.rows if shown else self.texts)[chunk.start : chunk.stop]
        for place, row in enumerate(chunk):
            faults = [fault(cells[name][place]) for name, fault in self.text_faults.items()]
            cell = (cells[self.image_column][place] if shown else None) or {}
            if row in self.looked_at:
                faults.insert(0, self._image_fault(row, cell, findings))
                if self.masks is not None and faults[0] is None:
                    own = {name: cells[name][place] for name in self.masks.columns}
                    faults.append(self.masks.fault(own))
            reasons = "; ".join(filter(None, faults))
            if reasons:
                findings.bad.append(BadSample(row, cell.get("path"), reasons))
        return findings

    def _image_fault(self, row: int, cell: dict[str, Any], findings: Findings) -> str | None:
        key = image_key(cell)  # before decoding: a file that changes meanwhile gets another key
        if key in self.known:
            return None
        noted: list[str] = []
        fault = image_fault(cell, self.resolution, noted)
        if noted and fault is None:  # not remembered, so that the next run tells of it, too
            findings.odd.append(BadSample(row, cell.get("path"), "; ".join(noted)))
        elif fault is None and key is not None:
            findings.fresh.append(key)
        return fault
