"""Training samples: reading any position of the endless training sequence.

A sample's crop, mirroring, phrasing and dropout of captions and classes are functions of (seed,
position), so the number of loader workers, of ranks and of interruptions changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.training.data.checks import decoded
from diffusers_curriculum.training.data.masks import Masks
from diffusers_curriculum.training.data.plan import BatchPlan, InOrder
from diffusers_curriculum.training.data.transforms import Crop, ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process.stopping import ignore_stop_signals

if TYPE_CHECKING:
    from datasets import Dataset


class Latents(Protocol):
    """Images that were encoded before, by row; a variant is selected by two uniforms in [0, 1)."""

    def read(self, row: int, u_crop: float, u_flip: float) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation (C, h, w) of a variant."""
        ...

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of an image; asked for where the crop is told."""
        ...

    def draws(self, row: int, u_crop: float, u_flip: float) -> tuple[float, float, float]:
        """The uniforms by which an :class:`ImageTransform` made a variant."""
        ...


class ImageDataset(TorchDataset):
    """The training sequence of images, with classes if there are any: position p gives row
    `plan.index(p)`, augmented by (plan.seed, p).

    Args:
        rows: what `sources.load_images` returned.
        plan: the order of the samples.
        transform: geometry of the images.
        label_column: column of classes; None for images alone.
        label_dropout: probability that a class is replaced by `null_label`, once per sample.
        null_label: the class that stands for none.
        latents: what to read instead of the images, which were encoded before.
        precise: keep the precision of 16-bit images.
        tell_crop: what it makes of where a sample was cut out stands in the sample.
        masks: what of each image counts in the loss; None: all.

    Raises:
        UsageError: at construction for a dropout outside [0, 1]; on reading for an image that does
            not decode, with its path.
    """

    def __init__(
        self,
        rows: Dataset,
        plan: BatchPlan | InOrder,
        transform: ImageTransform,
        *,
        image_column: str = "image",
        label_column: str | None = None,
        label_dropout: float = 0.0,
        null_label: int = 0,
        latents: Latents | None = None,
        precise: bool = False,
        tell_crop: Callable[[Crop], dict[str, Tensor]] | None = None,
        masks: Masks | None = None,
    ) -> None:
        _check_dropout("label", label_dropout)
        self.rows, self.plan, self.transform = rows, plan, transform
        self.image_column, self.label_column = image_column, label_column
        self.label_dropout, self.null_label, self.latents = label_dropout, null_label, latents
        self.precise, self.tell_crop, self.masks = precise, tell_crop, masks

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Return pixel_values (C, R, R) float32 in [-1, 1], or (C, H, W) of its bucket, or mean and
        std (C, h, w) of cached latents, and label () int64 if there are classes, and mask (1, R, R)
        if there are masks."""
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the samples of a batch, whose rows are read at once; torch's loader asks for it.

        All five numbers are drawn whatever the options: switching one does not change the others.
        """
        rows = [self.plan.index(position) for position in positions]
        draws = [
            host_generator(self.plan.seed, position, purpose="augment").random(5).tolist()
            for position in positions
        ]
        read = self._read[rows] if self.columns else {}
        cells = [{name: read[name][number] for name in read} for number in range(len(rows))]
        texts = self._texts(cells, [drawn[3:] for drawn in draws])
        return [
            self._image(cell, row, *drawn[:3]) | text
            for cell, row, drawn, text in zip(cells, rows, draws, texts, strict=True)
        ]

    @property
    def columns(self) -> list[str]:
        """The columns that are read of each row."""
        found = [self.image_column] if self.latents is None else []
        found += [] if self.label_column is None else [self.label_column]
        return list(dict.fromkeys(found + ([] if self.masks is None else self.masks.columns)))

    @cached_property
    def _read(self) -> Dataset:
        return self.rows.select_columns(self.columns)

    def _image(self, cells: dict[str, Any], row: int, *draws: float) -> dict[str, Tensor]:
        """The image of a row, or its latents, by three uniforms in [0, 1)."""
        cell, latents = cells.get(self.image_column, {}), self.latents
        if latents is None:
            item = self._pixels(cell, row, *draws)
        else:
            item = self._latents(latents, row, *draws[1:])
        if self.masks is None:
            return item
        own = draws if latents is None else latents.draws(row, *draws[1:])
        return item | {"mask": self.masks.read(cells, row, *own)}

    def _pixels(self, cell: dict[str, Any], row: int, *draws: float) -> dict[str, Tensor]:
        transform = self._transform(row)
        if self.precise:
            pixels = decoded(cell, row, transform.decode_precisely)
            size = pixels.shape[1], pixels.shape[0]
            values = transform.precise(pixels, *draws)
        else:
            image = decoded(cell, row, transform.decode)
            values, size = transform(image, *draws), image.size
        return {"pixel_values": values} | self._crop(transform, size, *draws)

    def _latents(
        self, latents: Latents, row: int, u_crop: float, u_flip: float
    ) -> dict[str, Tensor]:
        mean, std = latents.read(row, u_crop, u_flip)
        item = {"mean": mean} if std is None else {"mean": mean, "std": std}
        if self.tell_crop is not None:
            draws = latents.draws(row, u_crop, u_flip)
            item |= self._crop(self._transform(row), latents.size(row), *draws)
        return item

    def _transform(self, row: int) -> ImageTransform:
        buckets = self.plan.buckets
        return self.transform if buckets is None else self.transform.of_size(buckets.size_of(row))

    def _crop(
        self, transform: ImageTransform, size: tuple[int, int], *draws: float
    ) -> dict[str, Tensor]:
        if self.tell_crop is None:
            return {}
        return self.tell_crop(transform.crop_of(size, *draws))

    def _texts(
        self, cells: Sequence[dict[str, Any]], draws: Sequence[Sequence[float]]
    ) -> list[dict[str, Tensor]]:
        """What stands beside the images of rows, by two uniforms in [0, 1) for each."""
        if self.label_column is None:
            return [{}] * len(cells)
        dropped = [u_first < self.label_dropout for u_first, _ in draws]
        labels = (
            self.null_label if without else cell[self.label_column]
            for cell, without in zip(cells, dropped, strict=True)
        )
        return [{"label": torch.tensor(label)} for label in labels]


class ImageCaptionDataset(ImageDataset):
    """As :class:`ImageDataset`, with tokens of captions in place of classes.

    Args:
        tokenize: what it makes of B captions stands in their samples: by name, B values, such as
            input_ids (B, L) int64.
        caption_dropout: probability that a caption is replaced by the empty one.
        options: further ones of :class:`ImageDataset`.
    """

    def __init__(
        self,
        rows: Dataset,
        plan: BatchPlan | InOrder,
        tokenize: Callable[[Sequence[str]], Mapping[str, Any]],
        transform: ImageTransform,
        *,
        image_column: str = "image",
        caption_column: str = "text",
        caption_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(rows, plan, transform, image_column=image_column, **options)
        _check_dropout("caption", caption_dropout)
        self.tokenize, self.caption_dropout = tokenize, caption_dropout
        self.caption_column = caption_column

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys([*super().columns, self.caption_column]))

    def _texts(
        self, cells: Sequence[dict[str, Any]], draws: Sequence[Sequence[float]]
    ) -> list[dict[str, Any]]:
        captions = []
        for cell, (u_first, u_second) in zip(cells, draws, strict=True):
            caption = "" if u_second < self.caption_dropout else cell[self.caption_column]
            several = not isinstance(caption, str)
            captions.append(caption[int(u_first * len(caption))] if several else caption)
        tokens = self.tokenize(captions)
        return [{name: tokens[name][number] for name in tokens} for number in range(len(captions))]


def _check_dropout(of: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"The {of} dropout is {share}; it must lie in [0, 1].")


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
) -> Iterator[dict[str, Tensor]]:
    """Iterate over this rank's micro-batches of the steps start_step ... max_train_steps - 1.

    One iterator serves the whole run, so that workers start once. The global generators are
    neither read nor changed.

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
