"""Images of a subject's class, for prior preservation (arXiv 2208.12242): which there are, and how
they become rows beside those of the subject."""

from __future__ import annotations

import logging
import os
from itertools import count, islice
from pathlib import Path

from datasets import Dataset, Value, concatenate_datasets

from diffusers_curriculum.models.image_files import list_folder
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.sources import load_images

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped_class_images.jsonl"


def missing_files(folder: str, wanted: int) -> dict[int, Path]:
    """Where the images go, by their numbers, that a folder lacks of the ``wanted`` ones; whatever
    images are there are counted."""
    found = len(list_folder(folder).images) if os.path.isdir(folder) else 0
    paths = ((number, Path(folder, f"{number:05d}.png")) for number in count())
    free = ((number, path) for number, path in paths if not path.exists())
    return dict(islice(free, max(0, wanted - found)))


def class_rows(args: Arguments, like: Dataset, caption_column: str) -> Dataset:
    """The first --num_class_images images of --class_data_dir, all with --class_prompt for their
    caption, in the columns of the rows ``like`` them."""
    rows = load_images(
        train_data_dir=args.class_data_dir, cache_dir=args.cache_dir, folder_flag="--class_data_dir"
    )
    if len(rows) > args.num_class_images:
        told = "%d of the %d images in --class_data_dir %s are left out (--num_class_images)"
        logger.info(told, len(rows) - args.num_class_images, len(rows), args.class_data_dir)
        rows = rows.select(range(args.num_class_images))
    if args.image_column != "image":
        rows = rows.rename_column("image", args.image_column)
    for name, kind in like.features.items():
        if name not in rows.column_names:  # an image of a class has no mask
            cell = args.class_prompt if name == caption_column else None
            cell = cell if cell is None or isinstance(kind, Value) else [cell]
            rows = rows.add_column(name, [cell] * len(rows), feature=kind)
    return rows


def beside(rows: Dataset, images: Dataset) -> Dataset:
    """Rows with those of class images after them."""
    return concatenate_datasets([rows, images])
