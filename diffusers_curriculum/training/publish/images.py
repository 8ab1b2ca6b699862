"""Pictures, images for metrics, and the pipeline of class-conditional and unconditional runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from PIL.Image import fromarray as image_of
from torch import Tensor, nn

from diffusers_curriculum import pipelines
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.pipelines.self_contained import SelfContained
from diffusers_curriculum.randomness import key
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.levels.sampling import check_steps, most_steps
from diffusers_curriculum.training.parts.images import ImageModels, folder_name, load_space
from diffusers_curriculum.training.publish.card import CardFacts, shown_name
from diffusers_curriculum.training.publish.pictures import evaluation_mode
from diffusers_curriculum.training.publish.publisher import PipelinePublisher

logger = logging.getLogger(__name__)

CLASS_TAGS = ("class-conditional", "image-generation", "diffusers", "diffusers-training")
UNCONDITIONAL_TAGS = ("unconditional-image-generation", "diffusers", "diffusers-training")
_PICTURES_AT_ONCE = 64
_USAGE = """\
```python
from diffusers import {kind}

pipeline = {kind}.from_pretrained({{repo_id}}{trusted})
image = pipeline({given}).images[0]
image.save("image.png")
```"""
_OWN_CODE = """

The code of the pipeline is in pipeline.py, which trust_remote_code=True runs; it needs
diffusers, and this package not."""


class ImagePublisher(PipelinePublisher):
    """Publishes what a network trained on images draws; see :class:`PipelinePublisher`.

    Args:
        seed: of the pictures, which depend on nothing else.
        id2label: class to name; None for unconditional training.

    Attributes:
        models: put in once they are loaded.

    Raises:
        HubError: the name or licence is not acceptable, or the Hub refused.
        UsageError: --validation_classes names a class that there is not.
    """

    def __init__(
        self,
        args: Arguments,
        accelerator: Any,
        levels: Levels,
        plan: BatchPlan,
        *,
        seed: int,
        id2label: Mapping[int, str] | None,
    ) -> None:
        self.seed = seed
        self.id2label = None if id2label is None else dict(id2label)
        self.classes = [] if id2label is None else _chosen(args.validation_classes, id2label)
        self.models: ImageModels | None = None
        super().__init__(args, accelerator, levels, plan)

    # -- what is drawn ---------------------------------------------------------------------------

    def _check_sampling(self) -> None:
        args = self.args
        names = [] if args.no_pictures else ["validation_inference_steps"]
        names += [] if args.eval_steps is None else ["eval_num_inference_steps"]
        for name in names:
            check_steps(self.levels.inference, args[name], f"--{args.flag(name)}")

    @property
    def captions(self) -> Sequence[str]:
        if self.args.no_pictures:
            return []
        if self.id2label is not None:
            return [self.id2label[label] for label in self.classes]
        count = self.args.eval_batch_size  # rows of a grid that is about square
        rows = max(r for r in range(1, count + 1) if count % r == 0 and r * r <= count)
        return [f"row {number}" for number in range(1, rows + 1)]

    def images(self) -> Callable[[Sequence[int]], Tensor]:
        """Numbers of samples to images (B, C, H, W) in [0, 1], for metrics: each number has its own
        noise, and the classes in turn."""
        count, build = len(self.id2label or ()) or None, cache(self._validation_pipeline)

        def generate(numbers: Sequence[int]) -> Tensor:
            labels = None if count is None else [number % count for number in numbers]
            arrays = self._sampled(build(), numbers, labels, "metrics")
            return torch.from_numpy(arrays).permute(0, 3, 1, 2).float()

        return generate

    def _drawing(self, purpose: str) -> dict[str, Any]:
        """What a pipeline is told besides classes, to draw pictures or images for metrics."""
        if purpose == "metrics":
            return {"num_inference_steps": self.args.eval_num_inference_steps}
        most = most_steps(self.levels.inference)  # of what is never drawn, but told in the card
        return {"num_inference_steps": min(self.args.validation_inference_steps, most)}

    def _space(self) -> LatentSpace | None:
        """The space that is trained in; an autoencoder that was not kept in memory is read."""
        models = self.models
        if models and models.source and models.space is models.empty:
            return load_space(self.args)
        return models.space if models else None

    def _validation_pipeline(self) -> Any:
        """A pipeline around what is in memory, whatever its dtypes."""
        space = self._space()
        parts = {folder_name(self.network): self.network, "vae": space and space.model}
        scheduler, names = self.levels.inference, self.id2label
        if names is None:
            return pipelines.UnconditionalPipeline(scheduler, **parts)
        return pipelines.ClassConditionalPipeline(scheduler, id2label=names, **parts)

    def _final_pipeline(self, space: LatentSpace | None = None) -> Any:
        """The pipeline to save, in the autoencoder of ``space``; by default without its weights."""
        if space is None and self.models:
            space = self.models.empty
        return pipelines.fitting_pipeline(
            self.network, space and space.model, self.levels.inference, self.id2label
        )

    def _save(self, folder: Path) -> Callable[[], Any]:
        pipeline, source = self._final_pipeline(), self.models.source if self.models else None
        if source is None:
            pipeline.save_pretrained(folder)
            return lambda: pipeline
        copied = folder / "vae"
        source.copy(copied)
        pipeline.vae.save_pretrained = lambda *_, **__: None  # its files are there
        pipeline.save_pretrained(folder)
        return lambda: self._final_pipeline(LatentSpace.load(str(copied)))

    def _draw(self, build: Any) -> list[Image]:
        args = self.args
        labels = [c for c in self.classes for _ in range(args.validation_images_per_class)]
        count = args.eval_batch_size if self.id2label is None else len(labels)
        logger.info("Drawing %d pictures (--no_pictures: none).", count)
        pipeline, parts, at_once = build(), [], min(_PICTURES_AT_ONCE, args.train_batch_size)
        for first in range(0, count, at_once):
            numbers = range(first, min(first + at_once, count))
            own = labels[first : numbers.stop] or None
            parts.append(self._sampled(pipeline, numbers, own, "picture"))
        pictures = (np.concatenate(parts) * 255).round().astype(np.uint8)
        grey = pictures.shape[-1] == 1
        return [image_of(picture[..., 0] if grey else picture) for picture in pictures]

    def _sampled(
        self, pipeline: Any, numbers: Sequence[int], labels: Any, purpose: str
    ) -> np.ndarray:
        """(B, H, W, C) in [0, 1], one keyed generator on the CPU for each image."""
        pipeline.to(self.accelerator.device)
        shown = purpose == "picture" and self.accelerator.is_local_main_process
        pipeline.set_progress_bar_config(disable=not shown, leave=False, desc="Drawing")
        seeds = [key(self.seed, number, purpose=purpose) >> 65 for number in numbers]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = partial(pipeline, generator=generators, output_type="np", **self._drawing(purpose))
        modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        # some pipelines draw the noise of their steps from the global generator
        with (
            evaluation_mode(*modules),
            self.accelerator.autocast(),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(seeds[0])
            if labels is None:
                return call(batch_size=len(numbers)).images
            return call(class_labels=labels, guidance_scale=self.args.guidance_scale).images

    # -- what is told ----------------------------------------------------------------------------

    def _facts(self) -> CardFacts:
        facts, conditional = super()._facts(), self.id2label is not None
        vae, more = self.args.pretrained_vae_model_name_or_path, {}
        if self.models is not None:
            space, network = self.models.space.kind, type(self.models.network).__name__
            more = {"Network": network, "Trained on": "pixels" if space == "pixels" else "latents"}
        more |= {"Autoencoder": vae and shown_name(vae), **self._of_kind()}
        return replace(
            facts,
            prompts=facts.prompts if conditional else (),
            training={**facts.training, **more},
            tags=CLASS_TAGS if conditional else UNCONDITIONAL_TAGS,
            prompts_title="Classes, one row each",
            # before there are models, the card is only tried
            usage=facts.usage if self.models is None else self._usage(),
        )

    def _of_kind(self) -> dict[str, object]:
        """What the card tells of this kind of model."""
        return {"Formulation": self.args.formulation}

    def _usage(self) -> str:
        kind = type(self._final_pipeline())
        own = issubclass(kind, SelfContained)
        name, trusted = kind.__name__, ""
        if own:
            name, trusted = "DiffusionPipeline", ", trust_remote_code=True"
        given = self._drawing("picture")
        if self.id2label is not None:
            scale = self.args.guidance_scale
            given = {"class_labels": [min(self.id2label)], "guidance_scale": scale, **given}
        told = ", ".join(f"{key}={value!r}" for key, value in given.items())
        code = _USAGE.format(kind=name, trusted=trusted, given=told)
        return code + _OWN_CODE if own else code


def _chosen(given: Sequence[str] | None, id2label: Mapping[int, str]) -> list[int]:
    """The classes to draw: numbers or names, by default the first ten."""
    if given is None:
        return sorted(id2label)[:10]
    by_name = {name: number for number, name in id2label.items()}
    numbers = [by_name.get(word, int(word) if word.isdecimal() else -1) for word in given]
    unknown = [word for word, number in zip(given, numbers, strict=True) if number not in id2label]
    if unknown:
        some = ", ".join(f"{number} ({name})" for number, name in list(id2label.items())[:10])
        raise UsageError(
            f"--validation_classes {' '.join(unknown)}: there is no such class; the data has "
            f"{len(id2label)}, such as {some}."
        )
    return numbers
