"""Any family of text-to-image models, trained in the latents of its autoencoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_curriculum.samplers import TimestepSample
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.cache.captions import CachedCaptions
from diffusers_curriculum.training.cache.filling import Processes
from diffusers_curriculum.training.data.buckets import even_sizes, filled_buckets
from diffusers_curriculum.training.data.columns import warn_of_long_captions
from diffusers_curriculum.training.data.dataset import ImageCaptionDataset, Latents
from diffusers_curriculum.training.data.image_sizes import image_sizes
from diffusers_curriculum.training.data.plan import BatchPlan, InOrder
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.run import LevelRun
from diffusers_curriculum.training.loop.task import JobParts, Trained
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.parts.captions import (
    CaptionEncoder,
    as_they_are,
    kept_captions,
    phrasings,
)
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import Conditioning, ModelFamily, families
from diffusers_curriculum.training.parts.fit import check_parts, check_tokenizers, part_config
from diffusers_curriculum.training.parts.images import autoencoder_identity
from diffusers_curriculum.training.process.memory import lent
from diffusers_curriculum.training.process.runtime import frozen_dtype
from diffusers_curriculum.training.publish.text_to_image import TextToImagePublisher
from diffusers_curriculum.training.storage.fingerprints import model_identity, part_identity
from diffusers_curriculum.training.tasks.levels import check_slowed
from diffusers_curriculum.training.tasks.subjects import SubjectTask

logger = logging.getLogger(__name__)

CAPTIONS_FOLDER = "captions"


@dataclass(kw_only=True)
class TextToImageRun(LevelRun):
    """What the step works with."""

    family: ModelFamily
    models: Components
    captions: CaptionEncoder
    shares: Tensor | None = None  # (B,) of samples and class images in the loss; None: equal

    def loss_weights(self, drawn: TimestepSample) -> Tensor | None:
        weights = super().loss_weights(drawn)
        if self.shares is None or weights is None:
            return self.shares if weights is None else weights
        return weights * self.shares

    def mask(self, batch: Mapping[str, Tensor], target: Tensor) -> Tensor | None:
        """(B, 1, h, w) what each place of a target (B, C, h, w) counts in its sample's loss, mean 1
        in each sample; None where all count alike."""
        if "mask" not in batch:
            return None
        pixels = batch["mask"].to(target.device, non_blocking=True)
        places = F.interpolate(pixels, target.shape[-2:], mode="area")
        return places / places.mean(dim=(1, 2, 3), keepdim=True)

    def encoded(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of a batch that is on the device, as the autoencoder
        gives them: encoded now, or taken from the cache."""
        if "pixel_values" not in batch:
            return batch["mean"], batch["std"]
        vae = self.models.vae
        with lent(self.accelerator.device, vae, only=self.models.vae_waits):
            return self.family.posterior(vae, batch["pixel_values"])


class FamilyTask(SubjectTask):
    """Any family of text-to-image models, in the latents of its autoencoder, with captions."""

    models: Components  # once they are loaded
    is_adapted: ClassVar[bool] = False  # whether an adapter is trained, and the network is frozen

    def family_of(self, args: Arguments) -> ModelFamily:
        """The family of the models that are trained."""
        return families()["sd"]

    def settle(self, args: Arguments) -> None:
        vars(args).setdefault("pretrained_vae_model_name_or_path", None)  # not all have the flag

    def choose(self, args: Arguments, seed: int) -> None:
        family = self.family = self.family_of(args)
        check_parts(family, args)
        super().choose(args, seed)
        family.check_variant(args)
        self.tokenizers = family.load_tokenizers(args)
        check_tokenizers(family, args, self.tokenizers)

    def choose_levels(self, args: Arguments, seed: int) -> Levels:
        levels = Levels.of(args, *self.family_of(args).load_schedulers(args), seed)
        check_slowed(args, levels)
        if args.timestep_sampler == "information_rate" and args.noise_offset:
            logger.warning(
                "--timestep_sampler information_rate beside --noise_offset %s: the offset adds an "
                "error that is no information, and the law follows it; leave one of the two out",
                args.noise_offset,
            )
        return levels

    def usable_rows(self, args: Arguments, accelerator: Any, rows: Any) -> Any:
        rows = super().usable_rows(args, accelerator, rows)
        if args.use_aspect_ratio_buckets:
            with accelerator.main_process_first():
                images = image_sizes(rows, args.image_column, args.cache_dir)
            step = self.family.step(part_config(self.family, args, "vae"))
            sizes = [size[::-1] for size in args.aspect_ratio_buckets or ()]
            batch = args.train_batch_size * accelerator.num_processes
            self.buckets = filled_buckets(images, sizes or even_sizes(args.resolution, step), batch)
        return rows

    @property
    def text_columns(self) -> Mapping[str, str]:
        return {"caption_column": self.args.caption_column}

    def model_facts(self, args: Arguments) -> dict[str, Any]:
        return model_identity(args.pretrained_model_name_or_path, args.revision, args.variant)

    def publisher(self, job: JobParts) -> TextToImagePublisher:
        self.published = TextToImagePublisher(
            job.args, job.accelerator, self.levels, job.plan, self.family
        )
        return self.published

    def load(self, job: JobParts) -> Trained:
        args, device, family = job.args, job.accelerator.device, self.family
        if job.accelerator.is_main_process:
            limit = family.caption_limit(args, self.tokenizers)
            warn_of_long_captions(job.rows, args.caption_column, *limit)
        dtype = frozen_dtype(job.accelerator)
        # What is encoded once is, before the network takes its place
        kept = self._kept_captions(job, dtype) if args.cache_text_embeddings else None
        self.latents = self._kept_latents(job, dtype) if args.cache_latents else None
        self.models = family.load_components(
            args,
            self.tokenizers,
            device,
            dtype,
            frozen=self.is_adapted,
            without=self._without(args),
            **self.network_settings(args, dtype),
        )
        if args.cache_latents and self.models.has_vae:
            self.models.vae.to("cpu")
            self.models.vae_waits = True
        folder, averages = self.averages(job)
        self.published.models, self.published.averages = self.models, averages
        self.captions = CaptionEncoder(
            family, self.models, device, self.encode_text, offload=args.offload, kept=kept
        )
        return Trained(self.models.network, folder, averages)

    def _without(self, args: Arguments) -> tuple[str, ...]:
        """Frozen parts that are not needed, as what they encode is kept."""
        encodes = self.held_out is not None or not self.family.vae_told_by_config
        parts = self.family.encoders if args.cache_text_embeddings else ()
        return (*parts, "vae") if args.cache_latents and not encodes else parts

    def _kept_captions(self, job: JobParts, dtype: torch.dtype) -> CachedCaptions:
        args, family, device = job.args, self.family, job.accelerator.device
        sources = {
            name: family.source(args, name) for name in (*family.encoders, *family.tokenizers)
        }
        parts = {n: part_identity(s.path, n, s.revision, s.variant) for n, s in sources.items()}

        def load() -> CaptionEncoder:
            encoders = {
                name: family.load_frozen(args, name, device, dtype) for name in family.encoders
            }
            models = Components(None, None, encoders, self.tokenizers, family.open_base(args))
            return CaptionEncoder(family, models, device, self.encode_text)

        return kept_captions(
            phrasings(args, job.rows, self.held_out),
            load,
            folder=args.text_cache_dir or Path(args.output_dir, CAPTIONS_FOLDER),
            fingerprint={"parts": parts, "dtype": str(dtype), **self.caption_facts(args)},
            processes=Processes.of(job.accelerator),
        )

    def _kept_latents(self, job: JobParts, dtype: torch.dtype) -> Latents:
        args, family = job.args, self.family
        vae = cache(partial(family.load_frozen, args, "vae", job.accelerator.device, dtype))
        space = SimpleNamespace(encode=lambda pixels: family.posterior(vae(), pixels))
        sizes = family.size_conditioning() is not None
        return self.cached_latents(job, space, autoencoder_identity(args), sizes=sizes)

    def caption_facts(self, args: Arguments) -> dict[str, Any]:
        """What else changes what the network is told of a caption, as plain data."""
        return {}

    def network_settings(self, args: Arguments, dtype: torch.dtype) -> dict[str, Any]:
        """What else the network is loaded with; ``dtype`` is that of frozen models."""
        return {}

    def encode_text(self, models: Components, tokens: Mapping[str, Any]) -> Conditioning:
        """What the network is told of the tokens of a batch."""
        return self.family.encode_text(models, tokens)

    def averages(self, job: JobParts) -> tuple[str, Averages]:
        """The name of what is trained in checkpoints, and its averages, once models are loaded."""
        args, family = job.args, self.family
        source = family.load_averaged(args) if args.use_ema else None
        averages = Averages(self.models.network)
        return family.network, averages.with_ema(args, job.accelerator.device, source)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        vae, family = self.models.vae, self.family
        with torch.no_grad(), lent(pixels.device, vae, only=self.models.vae_waits):
            return family.posterior(vae, pixels)

    def scaled(self, mean: Tensor, std: Tensor | None) -> tuple[Tensor, Tensor | None]:
        vae, family = self.models.vae, self.family
        if std is None:
            return family.latents(vae, mean), None
        zero = family.latents(vae, torch.zeros_like(std))
        return family.latents(vae, mean), family.latents(vae, std) - zero

    def make_run(self, job: JobParts, **common: Any) -> TextToImageRun:
        return TextToImageRun(**common, **self.run_parts(job))

    def run_parts(self, job: JobParts) -> dict[str, Any]:
        """What a run of any family is made of."""
        return {
            "levels": self.levels,
            "family": self.family,
            "models": self.models,
            "captions": self.captions,
            "shares": self.shares(job),
        }

    def samples(
        self, args: Arguments, rows: Any, plan: BatchPlan | InOrder, latents: Any = None
    ) -> ImageCaptionDataset:
        tokenize = partial(self.family.tokenize, self.tokenizers)
        return ImageCaptionDataset(
            rows,
            plan,
            as_they_are if args.cache_text_embeddings else tokenize,
            self.transform(args),
            image_column=args.image_column,
            **self.text_columns,
            caption_dropout=args.caption_dropout,
            latents=latents,
            masks=self.masks(args),
            tell_crop=self.family.size_conditioning(),
        )
