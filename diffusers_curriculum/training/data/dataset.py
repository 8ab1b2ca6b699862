"""Training samples: reading any position of the endless training sequence.

A sample's crop, mirroring, phrasing and dropout of captions and classes are functions of (seed,
position), so the number of loader workers, of ranks and of interruptions changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.training.data.checks import decoded
from diffusers_curriculum.training.data.decoding import upright_size
from diffusers_curriculum.training.data.masks import Masks
from diffusers_curriculum.training.data.plan import BatchPlan
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
        plan: BatchPlan,
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
        # apart, as reading a whole row reads its image, too
        self._labels = None if label_column is None else rows.select_columns([label_column])
        self._masked = None if masks is None else rows.select_columns(masks.columns)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Return pixel_values (C, R, R) float32 in [-1, 1], or mean and std (C, h, w) of cached
        latents, and label () int64 if there are classes, and mask (1, R, R) if there are masks."""
        row = self.plan.index(position)
        # All five are drawn whatever the options: switching one does not change the others.
        draws = host_generator(self.plan.seed, position, purpose="augment").random(5).tolist()
        item = self._latents(row, *draws[1:3]) if self.latents else self._pixels(row, *draws[:3])
        return item | self._mask(row, *draws[:3]) | self._text(row, *draws[3:])

    def _pixels(self, row: int, *draws: float) -> dict[str, Tensor]:
        cell = self.rows[row][self.image_column]
        if self.precise:
            pixels = decoded(cell, row, self.transform.decode_precisely)
            size = pixels.shape[1], pixels.shape[0]
            return {
                "pixel_values": self.transform.precise(pixels, *draws),
                **self._crop(size, *draws),
            }
        image = decoded(cell, row, self.transform.decode)
        return {"pixel_values": self.transform(image, *draws), **self._crop(image.size, *draws)}

    def _latents(self, row: int, u_crop: float, u_flip: float) -> dict[str, Tensor]:
        latents: Any = self.latents
        mean, std = latents.read(row, u_crop, u_flip)
        item = {"mean": mean} if std is None else {"mean": mean, "std": std}
        if self.tell_crop is not None:
            size = decoded(self.rows[row][self.image_column], row, upright_size)
            item |= self._crop(size, *latents.draws(row, u_crop, u_flip))
        return item

    def _crop(self, size: tuple[int, int], *draws: float) -> dict[str, Tensor]:
        if self.tell_crop is None:
            return {}
        return self.tell_crop(self.transform.crop_of(size, *draws))

    def _mask(self, row: int, *draws: float) -> dict[str, Tensor]:
        if self.masks is None or self._masked is None:
            return {}
        own = self.latents.draws(row, *draws[1:]) if self.latents else draws
        return {"mask": self.masks.read(self._masked[row], row, *own)}

    def _text(self, row: int, u_first: float, u_second: float) -> dict[str, Tensor]:
        """What stands beside the image of a row, by two uniforms in [0, 1)."""
        if self._labels is None:
            return {}
        dropped = u_first < self.label_dropout
        label = self.null_label if dropped else self._labels[row][self.label_column]
        return {"label": torch.tensor(label)}


class ImageCaptionDataset(ImageDataset):
    """As :class:`ImageDataset`, with tokens of captions in place of classes.

    Args:
        tokenize: what it makes of a caption stands in the sample, such as input_ids (L,) int64.
        caption_dropout: probability that a caption is replaced by the empty one.
        options: further ones of :class:`ImageDataset`.
    """

    def __init__(
        self,
        rows: Dataset,
        plan: BatchPlan,
        tokenize: Callable[[str], dict[str, Tensor]],
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
        self._captions = rows.select_columns([caption_column])
        self.caption_column = caption_column

    def _text(self, row: int, u_first: float, u_second: float) -> dict[str, Tensor]:
        dropped = u_second < self.caption_dropout
        caption = "" if dropped else self._captions[row][self.caption_column]
        one = caption if isinstance(caption, str) else caption[int(u_first * len(caption))]
        return self.tokenize(one)


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
