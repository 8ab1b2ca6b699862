"""One prompt for all images, class images beside them, and masks: for every text-to-image task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.bad_samples import usable_images
from diffusers_curriculum.training.data.masks import Masks
from diffusers_curriculum.training.loop.task import JobParts
from diffusers_curriculum.training.parts.families.base import ModelFamily
from diffusers_curriculum.training.publish.class_images import draw_class_images
from diffusers_curriculum.training.storage.fingerprints import dataset_digest
from diffusers_curriculum.training.tasks.image_levels import ImageLevelTask

if TYPE_CHECKING:  # it takes a second to import, which --help should not have to wait for
    from datasets import Dataset

    from diffusers_curriculum.training.data.rows import Rows


class SubjectTask(ImageLevelTask):
    """A task on images with captions, of their own or one for all."""

    family: ModelFamily  # of the models
    tokenizers: dict[str, Any]  # of the pipeline, by name
    seed: int

    def choose(self, args: Arguments, seed: int) -> None:
        super().choose(args, seed)
        self.seed = seed

    def read_rows(self, args: Arguments, seed: int) -> Rows:
        from diffusers_curriculum.training.data.rows import read_rows

        name, prompt = args.caption_column, args.instance_prompt
        if prompt is None:
            return read_rows(args, seed, mask_column=args.mask_column, **self.text_columns)

        def prompted(rows: Dataset) -> Dataset:
            told = name in rows.column_names  # of several sources
            return rows if told else rows.add_column(name, [prompt] * len(rows))

        return read_rows(args, seed, mask_column=args.mask_column).each(prompted)

    def usable_rows(self, args: Arguments, accelerator: Any, rows: Any) -> Any:
        rows = super().usable_rows(args, accelerator, rows)
        if args.sources:
            from diffusers_curriculum.training.data.joined import apart

            rows, self.sources = apart(rows, args.sources)
        if not args.with_prior_preservation:
            return rows
        from diffusers_curriculum.training.data import class_images

        with accelerator.main_process_first():
            self._draw_missing(args, accelerator.device)
            images = class_images.class_rows(args, rows, args.caption_column)
        named = {"source": args.class_data_dir, "skipped_file": class_images.SKIPPED_FILE}
        text: dict[str, Any] = {**named, **self.text_columns}
        images = usable_images(args, accelerator, images, **text)
        self.num_class_images = len(images)
        return class_images.beside(rows, images)

    def _draw_missing(self, args: Arguments, device: torch.device) -> None:
        from diffusers_curriculum.training.data.class_images import missing_files

        files = missing_files(args.class_data_dir, args.num_class_images)
        if files:
            draw_class_images(
                args,
                self.family,
                files,
                tokenizers=self.tokenizers,
                scheduler=self.levels.inference,
                seed=self.seed,
                device=device,
            )

    def masks(self, args: Arguments) -> Masks | None:
        if args.mask_column is None and not args.mask_from_alpha:
            return None
        return Masks(
            args.image_column, args.mask_column, self.transform(args), args.unmasked_weight
        )

    def data_facts(self, job: JobParts) -> dict[str, Any]:
        args, facts = job.args, super().data_facts(job)
        if args.sources:
            each = enumerate((source.facts for source in args.sources), 1)
            facts["sources"] = {str(number): told for number, told in each}
        if args.mask_column is None:
            return facts
        folder = args.train_data_dir if args.dataset_name is None else args.dataset_name
        return facts | {"masks": dataset_digest(job.rows, args.mask_column, None, folder)}

    def described(self, job: JobParts) -> dict[str, Any]:
        told, count = super().described(job), self.num_class_images
        for source, share in zip(job.args.sources, self.sources, strict=True):
            told[f"of {source.place}"] = f"{share.rows}, {share.draws} in an epoch"
        return told | ({"class images": count} if count else {})

    def shares(self, job: JobParts) -> Tensor | None:
        """(B,) what the loss of each sample of a micro-batch is multiplied by, so that the mean is
        that of the samples plus --prior_loss_weight times that of the class images beside them;
        None without those."""
        if not self.num_class_images:
            return None
        pair = torch.tensor([2.0, 2.0 * job.args.prior_loss_weight])
        return pair.repeat(job.args.train_batch_size).to(job.accelerator.device)
