"""Image and caption pairs: loading them, and reading any position of the endless training sequence.

A sample's crop, mirroring, phrasing and caption dropout are functions of (seed, position), so the
number of loader workers, of ranks and of interruptions changes nothing.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Image, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.training.batch_plan import BatchPlan
from diffusers_curriculum.training.data_checks import (
    check_columns,
    describe,
    sample_name,
    warn_of_unlisted_images,
)
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.stopping import ignore_stop_signals
from diffusers_curriculum.training.transforms import ImageTransform, decode_image


def load_image_captions(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    *,
    cache_dir: str | None = None,
    image_column: str = "image",
    caption_column: str = "text",
    max_train_samples: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load the training split from the Hub, a local path or an image folder, images undecoded.

    Args:
        dataset_name: as `datasets.load_dataset` takes it; None reads `train_data_dir` as an image
            folder with a metadata.jsonl or metadata.csv.
        max_train_samples: keep this many samples, chosen by a shuffle with `seed`.

    Returns:
        The two columns; an image cell is {"path", "bytes"}.

    Raises:
        UsageError: nothing to load, not loadable, empty, or without the two columns.
    """
    if max_train_samples is not None and max_train_samples < 1:
        raise UsageError(f"--max_train_samples is {max_train_samples}; it must be at least 1.")
    splits = _load_splits(dataset_name, dataset_config_name, train_data_dir, cache_dir)
    if "train" not in splits:
        found = ", ".join(map(str, splits))
        raise UsageError(f"--dataset_name {dataset_name!r} has no split 'train'; it has: {found}.")
    dataset = splits["train"]
    folder = _local_folder(dataset_name, train_data_dir)
    check_columns(dataset.features, image_column, caption_column, folder)
    if len(dataset) == 0:
        raise UsageError(f"The data set {dataset_name or train_data_dir!r} has no samples.")
    if folder is not None and dataset_name is None:
        warn_of_unlisted_images(dataset, folder, ImageFolder.EXTENSIONS)
    dataset = dataset.select_columns([image_column, caption_column])
    if max_train_samples is not None:
        dataset = dataset.shuffle(seed=seed).select(range(min(max_train_samples, len(dataset))))
    return dataset.cast_column(image_column, Image(decode=False))


def _local_folder(dataset_name: str | None, train_data_dir: str | None) -> str | None:
    name = train_data_dir if dataset_name is None else dataset_name
    return name if name is not None and os.path.isdir(name) else None


def _load_splits(
    name: str | None, config: str | None, folder: str | None, cache_dir: str | None
) -> DatasetDict:
    files = None if name is not None else {"train": os.path.join(_checked_folder(folder), "**")}
    try:
        if name is not None:
            loaded = load_dataset(name, config, cache_dir=cache_dir, data_dir=folder)
        else:
            loaded = load_dataset("imagefolder", data_files=files, cache_dir=cache_dir)
    # A broken metadata file makes the readers raise nearly any type, IndexError included.
    except Exception as error:
        flag, value, remedy = "--dataset_name", name, "Check its name, content and the connection."
        if name is None:
            flag, value = "--train_data_dir", folder
            remedy = (
                "Check its metadata.jsonl or metadata.csv: one entry per image, all of one form."
            )
        reason = describe(error).rstrip(".!")
        raise UsageError(f"{flag} {value!r} cannot be loaded: {reason}. {remedy}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict()


def _checked_folder(folder: str | None) -> str:
    if folder is None:
        raise UsageError("There is no training data: pass --dataset_name or --train_data_dir.")
    if "://" in folder or (glob.has_magic(folder) and not os.path.exists(folder)):
        return folder  # a remote address or a pattern: for datasets to resolve
    if not os.path.isdir(folder):
        raise UsageError(f"--train_data_dir {folder!r} is not a folder; check the path.")
    if not any(_is_image(name) for _, _, names in os.walk(folder) for name in names):
        raise UsageError(f"--train_data_dir {folder!r} has no images in it or in its subfolders.")
    return glob.escape(folder)  # a folder may be called "cats [final]"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ImageFolder.EXTENSIONS


class ImageCaptionDataset(TorchDataset):
    """The training sequence: position p gives row `plan.index(p)`, augmented by (plan.seed, p).

    Args:
        rows: what `load_image_captions` returned.
        plan: the order of the samples.
        tokenizer: a transformers tokenizer.
        transform: geometry of the images.
        caption_dropout: probability that a caption is replaced by the empty one.

    Raises:
        UsageError: at construction for a dropout outside [0, 1]; on reading for an image that does
            not decode, with its path.
    """

    def __init__(
        self,
        rows: Dataset,
        plan: BatchPlan,
        tokenizer: Any,
        transform: ImageTransform,
        *,
        image_column: str = "image",
        caption_column: str = "text",
        caption_dropout: float = 0.0,
    ) -> None:
        if not 0.0 <= caption_dropout <= 1.0:
            raise UsageError(f"The caption dropout is {caption_dropout}; it must lie in [0, 1].")
        self.rows, self.plan, self.tokenizer, self.transform = rows, plan, tokenizer, transform
        self.image_column, self.caption_column = image_column, caption_column
        self.caption_dropout = caption_dropout

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """Return pixel_values (3, R, R) float32 in [-1, 1] and input_ids (L,) int64."""
        row = self.plan.index(position)
        cells = self.rows[row]
        # All five are drawn whatever the options: switching one does not change the others.
        draws = host_generator(self.plan.seed, position, purpose="augment").random(5).tolist()
        caption = self._caption(cells[self.caption_column], *draws[3:])
        return {
            "pixel_values": self.transform(self._image(cells[self.image_column], row), *draws[:3]),
            "input_ids": self._tokens(caption),
        }

    def _caption(self, caption: Any, u_choice: float, u_dropout: float) -> str:
        if u_dropout < self.caption_dropout:
            return ""
        return caption if isinstance(caption, str) else caption[int(u_choice * len(caption))]

    def _image(self, cell: dict[str, Any], row: int) -> Any:
        try:
            return decode_image(cell)
        # A file may have changed since the check; whatever the decoder raises, name the file.
        except Exception as error:
            raise UsageError(f"{sample_name(cell, row)}: {describe(error)}") from error

    def _tokens(self, caption: str) -> torch.Tensor:
        tokens = self.tokenizer(
            caption,
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids[0]


class PlannedBatches:
    """A batch sampler: the positions of every micro-batch of one rank, in order."""

    def __init__(self, plan: BatchPlan, start_step: int, max_train_steps: int) -> None:
        self.plan, self.steps = plan, range(start_step, max_train_steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for micro in range(self.plan.accumulation):
                yield list(self.plan.positions(step, micro))

    def __len__(self) -> int:
        return len(self.steps) * self.plan.accumulation


def training_batches(
    dataset: TorchDataset,
    plan: BatchPlan,
    start_step: int,
    max_train_steps: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Iterate over this rank's micro-batches of the steps start_step ... max_train_steps - 1.

    One iterator serves the whole run, so that workers start once. The global generators are
    neither read nor changed.

    Args:
        dataset: indexed by sample position.
        num_workers: loader processes; 0 loads in this one.

    Yields:
        The dataset's dict with a leading axis of plan.batch_size; accumulation of them per step.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=PlannedBatches(plan, start_step, max_train_steps),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if num_workers else None,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
    )
    return iter(loader)
