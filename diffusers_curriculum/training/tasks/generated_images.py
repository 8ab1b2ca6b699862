"""Training on images, with classes or none, that is followed by pictures and by metrics of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.dataset import ImageDataset
from diffusers_curriculum.training.data.decoding import MODES
from diffusers_curriculum.training.data.plan import BatchPlan, InOrder
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.evaluation.evaluator import (
    Evaluator,
    make_evaluator,
    training_images,
)
from diffusers_curriculum.training.loop.task import JobParts
from diffusers_curriculum.training.parts import images as parts
from diffusers_curriculum.training.publish.images import ImagePublisher
from diffusers_curriculum.training.tasks.image_levels import ImageLevelTask, Measure


class GeneratedImageTask(ImageLevelTask):
    """A network that images are drawn with, of given classes or of any.

    Attributes:
        classes: number of them, once the data is known; None without.
        id2label: their names.
        mode: colours of the images, as Pillow names them.
        published: draws pictures and images for metrics, once it is made.
        evaluator: what compares those with the training images; None: nothing does.
    """

    classes: int | None = None
    id2label: dict[int, str] | None = None
    mode: Any = MODES[3]
    published: ImagePublisher
    evaluator: Evaluator | None = None

    @property
    def drawing_facts(self) -> dict[str, Any]:
        """How images for metrics are drawn, as plain data."""
        raise NotImplementedError

    def transform(self, args: Arguments) -> ImageTransform:
        return ImageTransform.of(args, self.mode)

    def spaces(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[LatentSpace, LatentSpace, Callable[[], LatentSpace]]:
        """The space to train in; the same without the autoencoder's weights, which is the first one
        too where nothing is left to encode; and what loads the weights, once, if they are asked
        for."""
        empty = parts.empty_space(self.args)
        load = cache(partial(parts.load_space, self.args, device, dtype))
        encodes = not self.args.cache_latents or self.held_out is not None
        return load() if encodes else empty, empty, load

    def dataset_options(self, args: Arguments) -> dict[str, Any]:
        """What else the data set is told."""
        return {}

    def samples(
        self, args: Arguments, rows: Any, plan: BatchPlan | InOrder, latents: Any = None
    ) -> ImageDataset:
        return ImageDataset(
            rows,
            plan,
            self.transform(args),
            image_column=args.image_column,
            latents=latents,
            **self.dataset_options(args),
        )

    def know_classes(self, job: JobParts) -> None:
        """Take the classes from the data."""
        self.id2label = dict(enumerate(job.rows.features[job.args.label_column].names))
        self.classes = len(self.id2label)

    def make_evaluator(self, job: JobParts) -> None:
        """Look at the training images, once the models are loaded."""
        args = job.args
        self.evaluator = make_evaluator(
            args,
            job.accelerator,
            training_images(job.rows, self.transform(args), args.image_column),
            len(job.rows),
            job.seed,
            args.max_train_steps,
            self.drawing_facts,
        )

    def measures(self, job: JobParts) -> Iterator[tuple[Measure, Callable[[int], object]]]:
        yield from super().measures(job)
        if self.evaluator is not None:
            yield self.evaluator, partial(self._evaluate, self.evaluator)

    def _evaluate(self, evaluator: Evaluator, done: int) -> None:
        with self.published.averages.shown():
            evaluator.evaluate(self.published.images(), done)
