"""What a family of text-to-image models says of itself: one file for each, found by its being here.

Everything in which the training of one family differs from that of another is a method or an
attribute of :class:`ModelFamily`; tasks, publishers and scripts ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.transforms import Crop
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.sampling import sampling_fault
from diffusers_curriculum.training.parts.components import (
    Components,
    check_variant,
    load_schedulers,
)
from diffusers_curriculum.training.parts.pipeline_parts import PipelineParts

Config = Mapping[str, Any]
Conditioning = dict[str, Any]  # what a network is told besides: tensors or lists of B


class ModelFamily(PipelineParts):
    """One family of text-to-image models. It has no state; names are those of diffusers.

    Attributes:
        lora_targets: modules of the network that get adapters unless a flag names others.
        tags: of model cards, besides those that all have.
        captions_at_once: how many are encoded together for a cache; python -m benchmarks.captions
            measures what that gives.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, ...]] = ()
    captions_at_once: ClassVar[int] = 16

    # -- before anything is loaded ---------------------------------------------------------------

    def misfits(self, configs: Mapping[str, Config]) -> Iterator[str]:
        """What of the parts does not fit the others, by their config.json; settings that a config
        leaves out have the defaults of diffusers and transformers."""
        raise NotImplementedError

    def check_resolution(self, args: Arguments, configs: Mapping[str, Config]) -> None:
        """Refuse images that the parts cannot take; here those with less than 2 x 2 latents.

        Raises:
            UsageError: the side, and the smallest one.
        """
        smallest = 2 ** len(configs["vae"].get("block_out_channels", (64,)))
        if args.resolution < smallest:
            raise UsageError(
                f"--resolution is {args.resolution}: the pipeline's autoencoder takes {smallest} "
                "or more."
            )
        self.check_buckets(args, configs)

    def step(self, vae: Config) -> int:
        """What sides of images are multiples of, in buckets; here the pixels of a latent."""
        return 2 ** (len(vae.get("block_out_channels", (64,))) - 1)

    def check_buckets(self, args: Arguments, configs: Mapping[str, Config]) -> None:
        """Refuse sizes of --aspect_ratio_buckets that the parts cannot take."""
        step = self.step(configs["vae"])
        for size in args.aspect_ratio_buckets or ():
            if any(side % step for side in size) or min(size) < 2 * step:
                raise UsageError(
                    f"--aspect_ratio_buckets has {size[0]},{size[1]}: the pipeline takes sides of "
                    f"{2 * step} pixels or more, in multiples of {step}."
                )

    def check_variant(self, args: Arguments) -> None:
        """Refuse a --variant that no part has files of, and tell which come without it."""
        check_variant(args, {args.revision}, self.weighted)

    def load_schedulers(self, args: Arguments) -> tuple[Any, Any]:
        """The scheduler that adds noise in training, and the one of pictures and pipeline."""
        return load_schedulers(args)

    def sampling_fault(self, scheduler: Any) -> str | None:
        """Why the pipeline cannot draw pictures with a scheduler; None if it can."""
        return sampling_fault(scheduler)

    def adapter_targets(self, network: Config) -> tuple[str, ...]:
        """Modules that get adapters unless a flag names others, of a network with this config."""
        return self.lora_targets

    def kohya_name(self, module: str, network: Config) -> str | None:
        """What kohya's trainer calls a module, such as ``unet.mid_block....to_q``, of a pipeline
        whose network has this config; None where that is not known."""
        return None

    # -- captions --------------------------------------------------------------------------------

    def load_tokenizers(self, args: Arguments) -> dict[str, Any]:
        """The tokenizers of the pipeline, by name.

        Raises:
            UsageError: one cannot be loaded, or has no words.
        """
        return {name: self._tokenizer(args, name) for name in self.tokenizers}

    def _tokenizer(self, args: Arguments, name: str) -> Any:
        source = self.source(args, name)
        with source.loading(name, self.title):
            tokenizer: Any = self.part_class(name).from_pretrained(
                source.path, subfolder=name, revision=source.revision
            )
            # Where files are missing, transformers makes an empty one: all captions look alike.
            words = len(tokenizer) - len(tokenizer.all_special_ids)
            if words <= 0 or tokenizer.model_max_length >= 10**6:
                raise OSError("its vocabulary or tokenizer_config.json is missing")
            return tokenizer

    def caption_limit(self, args: Arguments, tokenizers: Mapping[str, Any]) -> tuple[Any, int]:
        """The tokenizer that takes most of a caption, and how many tokens of it."""
        longest = max(tokenizers.values(), key=lambda each: each.model_max_length)
        return longest, longest.model_max_length

    def tokenize(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> dict[str, Any]:
        """By name, what is told of each of B captions, on the CPU, in the loader's workers. Here
        input_ids (B, L) of the first tokenizer, input_ids_2 of the second, ..."""
        return {
            name.replace("tokenizer", "input_ids"): tokenizer(
                [*captions],
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for name, tokenizer in tokenizers.items()
        }

    def encode_text(self, models: Components, tokens: Mapping[str, Tensor]) -> Conditioning:
        """What the network is told of captions, by a batch of what :meth:`tokenize` made of them,
        on the device."""
        raise NotImplementedError

    def joined(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """One batch of several."""
        return {name: _joined([c[name] for c in conditionings]) for name in conditionings[0]}

    def apart(self, conditioning: Conditioning, count: int) -> list[Conditioning]:
        """What is told of each of ``count`` captions, of what is told of them together."""
        if count == 1:
            return [conditioning]
        return [
            {name: told[n : n + 1] for name, told in conditioning.items()} for n in range(count)
        ]

    # -- images ----------------------------------------------------------------------------------

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (B, C, h, w) of the latents of images (B, 3, H, W) in [-1, 1], in
        float32, as the autoencoder gives them; 0 is the deviation where the mean is trained on."""
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def latents(self, vae: Any, encoded: Tensor) -> Tensor:
        """What noise is added to, of the autoencoder's latents: an affine function of each number.
        Here ``encoded * scaling_factor``."""
        return encoded * vae.config.scaling_factor

    def size_conditioning(self) -> Callable[[Crop], dict[str, Tensor]] | None:
        """What gives, for where a sample was cut out, what the network is told of it, without an
        axis of the batch; on the CPU, in the loader's workers. Here None: it is told nothing."""
        return None

    def picture_settings(self, args: Arguments) -> dict[str, Any]:
        """What the pipeline is called with besides prompt, noise and steps. Here nothing: its
        pictures have the side that it is made for."""
        return {}

    # -- the network -----------------------------------------------------------------------------

    def predict(
        self, network: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The network's prediction for noisy latents at timesteps (B,), in the terms of the run's
        :class:`~diffusers_curriculum.Objective`: shape and sign are those of its target."""
        raise NotImplementedError


FAMILIES: Catalogue[type[ModelFamily]] = Catalogue("family of models")


@cache
def families() -> Mapping[str, ModelFamily]:
    """Every family by its name: those of all files beside this one."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")
    return {name: kind() for name, kind in FAMILIES.items()}


def family_named(name: str) -> ModelFamily:
    """A family by its name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    families()
    FAMILIES.entry(name)
    return families()[name]


def text_config(encoder: Config) -> Config:
    """The settings of the text half of a model of text and images; of a text encoder its own."""
    inner = encoder.get("text_config")
    return inner if isinstance(inner, Mapping) else encoder


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):
        return [each for value in values for each in value]
    return torch.cat([*values])
