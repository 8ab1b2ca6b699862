"""What all kinds of training on images at noise levels have in common, with captions or classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor
from torch.utils.data import default_collate

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.validation import undisturbed
from diffusers_curriculum.training.cache.bucketed import cache_bucketed_latents
from diffusers_curriculum.training.cache.filling import Processes
from diffusers_curriculum.training.cache.latents import cache_latents
from diffusers_curriculum.training.checkpoint.same_run import dataset_facts
from diffusers_curriculum.training.data.bad_samples import usable_held_out, usable_images
from diffusers_curriculum.training.data.dataset import ImageDataset, Latents
from diffusers_curriculum.training.data.masks import Masks
from diffusers_curriculum.training.data.plan import BatchPlan, InOrder
from diffusers_curriculum.training.data.shards import shards_of
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.evaluation.validation_loss import ValidationLoss
from diffusers_curriculum.training.levels import data_scale
from diffusers_curriculum.training.loop.task import JobParts
from diffusers_curriculum.training.publish.metrics_record import MetricsRecord
from diffusers_curriculum.training.storage.fingerprints import dataset_digest
from diffusers_curriculum.training.tasks.levels import LevelTask

if TYPE_CHECKING:  # it takes a second to import, which --help should not have to wait for
    from diffusers_curriculum.training.data.rows import Rows

LATENTS_FOLDER = "latents"
CROP_SEED = 0  # of cached crops, so that runs of other seeds may share a cache


class Measure(Protocol):
    """What is measured now and then while a run trains."""

    record: MetricsRecord

    def is_due(self, step: int) -> bool: ...


class ImageLevelTask(LevelTask):
    """A task on images, with captions or classes if any.

    Attributes:
        held_out: samples that are kept apart, once they are loaded; None for none.
        latents: what is read instead of images, once models are loaded; None where images are
            encoded as they come.
        validation: the loss on them, once the run starts.
    """

    held_out: Any = None
    latents: Latents | None = None
    validation: ValidationLoss | None = None
    validation_kind: ClassVar[type[ValidationLoss]] = ValidationLoss

    @property
    def text_columns(self) -> Mapping[str, str]:
        """Columns beside the images, as ``caption_column`` or ``label_column``."""
        return {}

    def choose(self, args: Arguments, seed: int) -> None:
        super().choose(args, seed)
        wanted, known = args.validation_loss_quantiles, len(self.levels.sampler.levels)
        if wanted > known:
            raise UsageError(
                f"--validation_loss_quantiles is {wanted}, and the schedule has {known} noise "
                "levels: give no more than that."
            )

    # -- samples ---------------------------------------------------------------------------------

    def read_rows(self, args: Arguments, seed: int) -> Rows:
        """All samples, with the columns that are told."""
        from diffusers_curriculum.training.data.rows import read_rows

        return read_rows(args, seed, **self.text_columns)

    def load_rows(self, args: Arguments, seed: int) -> Any:
        training, self.held_out = self.read_rows(args, seed)
        return training

    def usable_rows(self, args: Arguments, accelerator: Any, rows: Any) -> Any:
        text: dict[str, Any] = {**self.text_columns}
        if self.held_out is not None:
            self.held_out = usable_held_out(args, accelerator, self.held_out, **text)
        rows = usable_images(args, accelerator, rows, masks=self.masks(args), **text)
        if args.streaming:
            self.shards = shards_of(rows, args.image_column, args.shuffle_buffer)
        return rows

    def masks(self, args: Arguments) -> Masks | None:
        """What of each image counts in the loss; None: all of it."""
        return None

    def data_facts(self, job: JobParts) -> dict[str, Any]:
        text = next(iter(self.text_columns.values()), None)
        columns = [job.args.image_column, *([] if text is None else [text])]
        facts = dataset_facts(job.args, job.rows, text) | {"columns": columns}
        if self.held_out is not None:
            folder = job.args.validation_data_dir or self._folder(job.args)
            facts["held_out"] = dataset_digest(self.held_out, job.args.image_column, text, folder)
        return facts

    def _folder(self, args: Arguments) -> str | None:
        """Where the images to train on are, if they are no data set."""
        return args.train_data_dir if args.dataset_name is None else None

    def samples(
        self, args: Arguments, rows: Any, plan: BatchPlan | InOrder, latents: Any = None
    ) -> ImageDataset:
        """Rows as a step takes them, by position in an order; ``latents`` are read instead of
        images where there are such."""
        raise NotImplementedError

    def dataset(self, job: JobParts) -> ImageDataset:
        return self.samples(job.args, job.rows, job.plan, self.latents)

    def clean(self, job: JobParts) -> Iterator[tuple[Tensor, Tensor | None]]:
        args, count = job.args, min(data_scale.SAMPLES, len(job.rows))
        geometry, column = self.transform(args), args.image_column
        samples = ImageDataset(
            job.rows, job.plan, geometry, image_column=column, latents=self.latents
        )
        for start in range(0, count, args.train_batch_size):
            places = range(start, min(count, start + args.train_batch_size))
            batch = default_collate([samples[place] for place in places])
            sent = {name: values.to(job.accelerator.device) for name, values in batch.items()}
            if self.latents is None:
                yield self.scaled(*self.encode(sent["pixel_values"]))
            else:
                yield self.scaled(sent["mean"], sent.get("std"))

    def cached_latents(
        self, job: JobParts, space: Any, autoencoder: Any, *, sizes: bool = False
    ) -> Latents:
        """The latents of all images, encoded now unless they are there; every process calls it.

        Args:
            space: ``encode(pixels) -> (mean, std or None)``.
            autoencoder: what tells it, as plain data.
            sizes: keep those of the images, too.
        """
        args, accelerator = job.args, job.accelerator
        label_column = self.text_columns.get("label_column")
        fingerprint = {
            "autoencoder": autoencoder,
            "data": dataset_digest(job.rows, args.image_column, label_column, self._folder(args)),
        }
        keep: Any = cache_latents
        if job.plan.buckets is not None:
            keep = partial(cache_bucketed_latents, buckets=job.plan.buckets)
        return keep(
            job.rows,
            space,
            self.transform(args),
            fingerprint=fingerprint,
            folder=args.latent_cache_dir or Path(args.output_dir, LATENTS_FOLDER),
            image_column=args.image_column,
            crops=args.latent_crops,
            flip=args.random_flip,
            seed=CROP_SEED,
            batch_size=args.train_batch_size,
            device=accelerator.device,
            dtype=args.latent_cache_dtype,
            sizes=sizes,
            processes=Processes.of(accelerator),
        )

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of latents, of images (B, 3, H, W) on the device."""
        raise NotImplementedError

    def scaled(self, mean: Tensor, std: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of what noise is added to, of those of latents; here the same."""
        return mean, std

    def transform(self, args: Arguments) -> ImageTransform:
        """The geometry of images."""
        return ImageTransform.of(args)

    # -- measures while it trains ----------------------------------------------------------------

    def measures(self, job: JobParts) -> Iterator[tuple[Measure, Callable[[int], object]]]:
        """What is measured now and then, and what does it after so many steps."""
        if self.validation is not None:
            yield self.validation, self.validation.evaluate

    def started(self, job: JobParts) -> None:
        super().started(job)
        if self.held_out is not None:
            self.validation = self._validation_loss(job)
        # make up those of the step that the run goes on from, where it was stopped before them
        last = job.args.max_train_steps
        for measure, evaluate in self.measures(job) if job.start < last else ():
            if measure.is_due(job.start) and measure.record.lacks(job.start):
                evaluate(job.start)

    def after_update(self, job: JobParts, done: int, outcome: Any, norm: Tensor | None) -> None:
        if done < job.args.max_train_steps:  # at the end, all is saved first
            self._measure_if_due(job, done)

    def finished(self, job: JobParts) -> None:
        self._measure_if_due(job, job.args.max_train_steps)

    def _measure_if_due(self, job: JobParts, done: int) -> None:
        for measure, evaluate in self.measures(job):
            if measure.is_due(done):
                evaluate(done)
                job.monitor.show_law(done)

    def undisturbed(self, job: JobParts) -> Any:
        """The run as a measure takes it: without what disturbs samples, and without wrappers."""
        return replace(job.run, args=undisturbed(job.args), network=job.network)

    def _validation_loss(self, job: JobParts) -> ValidationLoss:
        if job.forward is None:
            raise ValueError("there is no validation loss without train(..., encode, predict)")
        run = self.undisturbed(job)
        samples = self.samples(run.args, self.held_out, InOrder())
        return self.validation_kind(run, samples, len(self.held_out), *job.forward)
