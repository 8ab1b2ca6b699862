"""Several sources of images as one table of samples, in the order of the rows of --data_config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset, List, Value, concatenate_datasets

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.data_config import Source
from diffusers_curriculum.training.data.plan import SourceShare
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.errors import UsageError

_COLUMN = "_source"  # which row of --data_config a sample is of, counted from 0
_MOST = 2**30  # samples of an epoch, whose order is kept in memory


def joined_rows(args: Arguments, seed: int, mask_column: str | None = None) -> Dataset:
    """The samples of all sources, images and captions in the columns that the command line names;
    a caption is one text, or all are lists where one of them is.

    Raises:
        UsageError: what :func:`load_images` refuses, told with the row.
    """
    parts = [_rows_of(source, args, seed, mask_column) for source in args.sources]
    caption = args.caption_column
    if any(isinstance(part.features[caption], List) for part in parts):
        parts = [_with_lists(part, caption) for part in parts]
    numbered = (
        part.add_column(_COLUMN, [number] * len(part), feature=Value("int32"))  # type: ignore[call-arg]
        for number, part in enumerate(parts)
    )
    return concatenate_datasets(list(numbered))


def each_source(rows: Dataset) -> Iterator[Dataset]:
    """The samples of each source that has some, if there are several; else all."""
    if _COLUMN not in rows.column_names:
        yield rows
        return
    starts = np.flatnonzero(np.diff(rows[_COLUMN][:], prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield rows.select(range(start, end))


def apart(rows: Dataset, sources: Sequence[Source]) -> tuple[Dataset, tuple[SourceShare, ...]]:
    """Usable samples without their sources' numbers, and what an epoch has of each source.

    Raises:
        UsageError: nothing of a source is left, or its repeats make less than one sample, or all
            of them too many.
    """
    counts = np.bincount(rows[_COLUMN][:], minlength=len(sources)).tolist()
    shares = []
    for source, count in zip(sources, counts, strict=True):
        draws = round(source.repeats * count)
        if count == 0:
            raise UsageError(f"{source.where}: no sample of {source.place!r} is left to train on.")
        if draws == 0:
            raise UsageError(
                f"{source.where} has repeats={source.repeats:g}, which is less than one of its "
                f"{count} samples in an epoch: give {1 / count:.2g} or more."
            )
        shares.append(SourceShare(count, draws))
    epoch = sum(share.draws for share in shares)
    if epoch > _MOST:
        raise UsageError(
            f"--data_config makes an epoch of {epoch:,} samples, and at most {_MOST:,} can be: "
            "give smaller repeats, which count for their ratio."
        )
    return rows.remove_columns(_COLUMN), tuple(shares)


def _rows_of(source: Source, args: Arguments, seed: int, mask_column: str | None) -> Dataset:
    """The samples of one source, in the columns of all."""
    own = source.put(args)
    prompt = own.instance_prompt
    with source.named():
        rows = load_images(
            own.dataset_name,
            own.dataset_config_name,
            own.train_data_dir,
            split=own.train_split,
            cache_dir=args.cache_dir,
            image_column=own.image_column,
            caption_column=None if prompt is not None else own.caption_column,
            mask_column=mask_column,
            max_train_samples=own.max_train_samples,
            seed=seed,
        )
    names = {own.image_column: args.image_column}
    if prompt is None:
        names[own.caption_column] = args.caption_column
    rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
    if prompt is not None:
        return rows.add_column(args.caption_column, [prompt] * len(rows))
    if isinstance(kind := rows.features[args.caption_column], Value) and kind.dtype != "string":
        return rows.cast_column(args.caption_column, Value("string"))
    return rows


def _with_lists(rows: Dataset, column: str) -> Dataset:
    """With a list of captions in each cell; a missing one stays missing."""
    cells = rows[column][:]
    if isinstance(rows.features[column], Value):
        cells = [None if cell is None else [cell] for cell in cells]
    bare = rows.remove_columns(column)
    return bare.add_column(column, cells, feature=List(Value("string")))  # type: ignore[call-arg]
