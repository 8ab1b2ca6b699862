"""What a family of text-to-image models says of itself: one file for each, found by its being here.

Everything in which the training of one family differs from that of another is a method or an
attribute of :class:`ModelFamily`; tasks, publishers and scripts ask it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor

from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.sampling import sampling_fault
from diffusers_curriculum.training.parts.components import (
    Base,
    Components,
    Source,
    check_variant,
    load_schedulers,
)
from diffusers_curriculum.training.process.pipeline_files import components, variants
from diffusers_curriculum.training.storage.components import SavedPart

Config = Mapping[str, Any]
Conditioning = dict[str, Tensor]  # what a network is told besides, each with a first axis of B


class ModelFamily:
    """One family of text-to-image models. It has no state; names are those of diffusers.

    Attributes:
        title: in messages, after "Give": "a Stable Diffusion pipeline".
        pipeline: class of diffusers, which is exported and draws pictures.
        network: folder of the network that is trained.
        parts: classes that are trained with, by the names of parts; the first one is loaded. Those
            of text begin with "text_encoder" and "tokenizer".
        optional: parts of the pipeline that play no part in training; copied where it has them.
        settings: of the pipeline's model_index.json, which an export keeps.
        absent: arguments of the pipeline class for parts that pictures do without.
        lora_targets: modules of the network that get adapters unless a flag names others.
        shift: of flow matching timesteps that the family is trained with; None: the scheduler's.
    """

    title: ClassVar[str]
    pipeline: ClassVar[str]
    network: ClassVar[str]
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    optional: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    absent: ClassVar[Mapping[str, Any]] = {}
    lora_targets: ClassVar[tuple[str, ...]] = ()
    shift: ClassVar[float | None] = None

    # -- what its parts are ----------------------------------------------------------------------

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of the tokenizers."""
        return tuple(name for name in self.parts if name.startswith("tokenizer"))

    @property
    def weighted(self) -> tuple[str, ...]:
        """Names of the parts with weights."""
        return (self.network, "vae", *self.encoders)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parts that an export takes over from the base."""
        trained = (self.network, "scheduler")
        return tuple(name for name in (*self.parts, *self.optional) if name not in trained)

    @property
    def pipeline_class(self) -> Any:
        """The pipeline's class; its import takes seconds."""
        return getattr(diffusers, self.pipeline)

    def part_class(self, part: str) -> Any:
        """The class of a part."""
        library: Any = diffusers if part in (self.network, "vae") else transformers
        return getattr(library, self.parts[part][0])

    def source(self, args: Arguments, part: str) -> Source:
        """Where a part's files are."""
        path, revision = args.pretrained_model_name_or_path, args.revision
        variant = None
        if part in self.weighted:
            variant = variants(path, revision, args.variant, self.weighted)[part]
        return Source(path, revision, variant, part)

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

    def check_variant(self, args: Arguments) -> None:
        """Refuse a --variant that no part has files of, and tell which come without it."""
        check_variant(args, {args.revision}, self.weighted)

    def load_schedulers(self, args: Arguments) -> tuple[Any, Any]:
        """The scheduler that adds noise in training, and the one of pictures and pipeline."""
        return load_schedulers(args)

    def sampling_fault(self, scheduler: Any) -> str | None:
        """Why the pipeline cannot draw pictures with a scheduler; None if it can."""
        return sampling_fault(scheduler)

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

    def tokenize(self, tokenizers: Mapping[str, Any], caption: str) -> dict[str, Tensor]:
        """Tokens of one caption, each without an axis of the batch; on the CPU, in the loader's
        workers. Here input_ids (L,) of the first tokenizer, input_ids_2 of the second, ..."""
        return {
            name.replace("tokenizer", "input_ids"): tokenizer(
                caption,
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids[0]
            for name, tokenizer in tokenizers.items()
        }

    def encode_text(self, models: Components, tokens: Mapping[str, Tensor]) -> Conditioning:
        """What the network is told of captions, by a batch of what :meth:`tokenize` made of them,
        on the device."""
        raise NotImplementedError

    # -- images ----------------------------------------------------------------------------------

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (B, C, h, w) of the latents of images (B, 3, H, W) in [-1, 1], in
        float32, as the autoencoder gives them."""
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def latents(self, vae: Any, encoded: Tensor) -> Tensor:
        """What noise is added to, of the autoencoder's latents: an affine function of each number.
        Here ``encoded * scaling_factor``."""
        return encoded * vae.config.scaling_factor

    # -- the network -----------------------------------------------------------------------------

    def predict(
        self, network: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The network's prediction for noisy latents at timesteps (B,), in the terms of the run's
        :class:`~diffusers_curriculum.Objective`: shape and sign are those of its target."""
        raise NotImplementedError

    # -- models and pipelines --------------------------------------------------------------------

    def load_part(self, args: Arguments, part: str, dtype: torch.dtype = torch.float32) -> Any:
        """The model of a part, on the CPU.

        Raises:
            UsageError: it cannot be loaded, or lacks weights.
        """
        source = self.source(args, part)
        with source.loading(part, self.title):
            return source.load(self.part_class(part), dtype)

    def load_components(
        self,
        args: Arguments,
        tokenizers: dict[str, Any],
        device: torch.device,
        frozen_dtype: torch.dtype,
    ) -> Components:
        """Load the models onto ``device``; the network trains in float32, the rest is frozen.

        Raises:
            UsageError: a part cannot be loaded.
        """
        encoders = {name: self.load_part(args, name, frozen_dtype) for name in self.encoders}
        vae = self.load_part(args, "vae", frozen_dtype)
        network = self.load_part(args, self.network)
        for frozen in (*encoders.values(), vae):
            frozen.requires_grad_(False).eval().to(device)
        network.requires_grad_(True).train().to(device)
        if args.enable_xformers_memory_efficient_attention:
            network.enable_xformers_memory_efficient_attention()
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return Components(network, vae, encoders, tokenizers, self.open_base(args))

    def load_averaged(self, args: Arguments) -> Any:
        """The network whose weights an average starts from; None: the one that is trained."""
        return None

    def base_folder(self, args: Arguments) -> Path:
        """The folder of the base pipeline; one of the Hub is fetched, but for its network."""
        path = args.pretrained_model_name_or_path
        if Path(path).is_dir():
            return Path(path)
        where = {"revision": args.revision, "variant": args.variant, "use_safetensors": True}
        return Path(self.pipeline_class.download(path, **{self.network: None}, **where))

    def open_base(self, args: Arguments) -> Base:
        """What the exported pipeline takes over from the base, read and opened now, as the folder
        may not be there at the end."""
        with self.source(args, self.network).loading("parts", self.title):
            kind, folder = self.pipeline_class, self.base_folder(args)
            index = dict(kind.load_config(folder))
            names = [name for name in components(index) if name in self.frozen]
            frozen = {name: SavedPart(folder / name, args.variant) for name in names}
            return Base(kind, index, frozen, tuple(n for n in self.frozen if n not in names))

    def pipeline_of(self, models: Components, network: Any, scheduler: Any) -> Any:
        """A pipeline around models that are in memory already; nothing is loaded."""
        told = {} if models.base is None else models.base.settings(self.settings)
        parts = {**models.encoders, **models.tokenizers, "vae": models.vae, self.network: network}
        return self.pipeline_class(**parts, scheduler=scheduler, **(told | dict(self.absent)))

    def save_pipeline(self, base: Base, network: Any, scheduler: Any, output: Path) -> Any:
        """Write the pipeline to keep, see :meth:`Base.save`."""
        trained = {self.network: network, "scheduler": scheduler}
        return base.save(trained, output, self.settings)


FAMILIES: Catalogue[type[ModelFamily]] = Catalogue("family of models")


@cache
def families() -> Mapping[str, ModelFamily]:
    """Every family by its name: those of all files beside this one."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")
    return {name: kind() for name, kind in FAMILIES.items()}


def text_config(encoder: Config) -> Config:
    """The settings of the text half of a CLIP; of any other text encoder its own."""
    inner = encoder.get("text_config")
    return inner if encoder.get("model_type") == "clip" and isinstance(inner, Mapping) else encoder
