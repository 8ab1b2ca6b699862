"""The parts of a text-to-image pipeline: which there are, how they are loaded, and saved again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from packaging.version import Version

from diffusers_curriculum.models.saving import share_weights
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.components import Base, Components, Source
from diffusers_curriculum.training.process.attention import choose_attention
from diffusers_curriculum.training.process.pipeline_files import components, variants
from diffusers_curriculum.training.storage.components import SavedPart


class PipelineParts:
    """The parts of one family of pipelines. It has no state; names are those of diffusers.

    Attributes:
        title: in messages, after "Give": "a Stable Diffusion pipeline".
        pipeline: class of diffusers, which is exported and draws pictures.
        since: version of diffusers that it can be trained with.
        network: folder of the network that is trained.
        parts: classes that are trained with, by the names of parts; the first one is loaded. Those
            of text begin with "text_encoder" and "tokenizer".
        optional: parts of the pipeline that play no part in training; copied where it has them.
        settings: of the pipeline's model_index.json, which an export keeps.
        absent: arguments of the pipeline class for parts that pictures do without.
        precise_vae: whether the autoencoder works in float32 under any precision.
        vae_told_by_config: whether its config says all that encoded latents are scaled by.
    """

    title: ClassVar[str]
    pipeline: ClassVar[str]
    since: ClassVar[str] = "0.37.0"
    network: ClassVar[str]
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    optional: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    absent: ClassVar[Mapping[str, Any]] = {}
    precise_vae: ClassVar[bool] = False
    vae_told_by_config: ClassVar[bool] = True

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

    @property
    def is_supported(self) -> bool:
        """Whether the installed diffusers is new enough."""
        return Version(diffusers.__version__) >= Version(self.since)

    def check_installed(self) -> None:
        """Refuse a family for which the installed diffusers is too old.

        Raises:
            UsageError: both versions.
        """
        if not self.is_supported:
            raise UsageError(
                f"{self.pipeline} needs diffusers {self.since} or newer, and "
                f"{diffusers.__version__} is installed: pip install --upgrade diffusers."
            )

    def part_class(self, part: str) -> Any:
        """The class of a part."""
        library: Any = diffusers if part in (self.network, "vae") else transformers
        return getattr(library, self.parts[part][0])

    def class_of(self, args: Arguments, part: str) -> Any:
        """The class of a part of the pipeline that is given; here that of all."""
        return self.part_class(part)

    def source(self, args: Arguments, part: str) -> Source:
        """Where a part's files are."""
        path, revision = args.pretrained_model_name_or_path, args.revision
        variant = None
        if part in self.weighted:
            variant = variants(path, revision, args.variant, self.weighted)[part]
        return Source(path, revision, variant, part)

    # -- models and pipelines --------------------------------------------------------------------

    def load_part(
        self, args: Arguments, part: str, dtype: torch.dtype = torch.float32, **more: Any
    ) -> Any:
        """The model of a part, on the CPU.

        Args:
            more: for its ``from_pretrained``.

        Raises:
            UsageError: it cannot be loaded, or lacks weights.
        """
        source = self.source(args, part)
        with source.loading(part, self.title):
            return source.load(self.class_of(args, part), dtype, **more)

    def load_frozen(
        self, args: Arguments, part: str, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """The model of a part that is not trained, on ``device``.

        Raises:
            UsageError: it cannot be loaded.
        """
        precise = part == "vae" and self.precise_vae
        model = self.load_part(args, part, torch.float32 if precise else dtype)
        return model.requires_grad_(False).eval().to(device)

    def hollow_vae(self, args: Arguments) -> Any:
        """The autoencoder without weights, on the device "meta": its config alone counts."""
        source = self.source(args, "vae")
        with source.loading("vae", self.title), torch.device("meta"):
            where = {"revision": source.revision, "subfolder": source.subfolder}
            kind = self.class_of(args, "vae")
            return kind.from_config(kind.load_config(source.path, **where))

    def load_components(
        self,
        args: Arguments,
        tokenizers: dict[str, Any],
        device: torch.device,
        frozen_dtype: torch.dtype,
        *,
        frozen: bool = False,
        without: Collection[str] = (),
        **settings: Any,
    ) -> Components:
        """Load the models onto ``device``, or the host for what waits there under --offload; the
        network trains in float32, the rest is frozen.

        Args:
            frozen: whether the network is, too, as where an adapter is trained in it.
            without: text encoders that are not loaded, and "vae" for one that is hollow.
            settings: for the network's ``from_pretrained``.

        Raises:
            UsageError: a part cannot be loaded.
        """
        place = torch.device("cpu") if args.offload else device
        load = partial(self.load_frozen, args, device=place, dtype=frozen_dtype)
        encoders = {name: load(name) for name in self.encoders if name not in without}
        vae = self.hollow_vae(args) if "vae" in without else load("vae")
        dtype = frozen_dtype if frozen else torch.float32
        network = self.load_part(args, self.network, dtype, **settings)
        network.requires_grad_(not frozen).train().to(device)
        choose_attention(args, network)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        base = self.open_base(args)
        return Components(network, vae, encoders, tokenizers, base, vae_waits=args.offload)

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
            frozen = {name: self.saved_part(args, folder, name) for name in names}
            return Base(kind, index, frozen, tuple(n for n in self.frozen if n not in names))

    def saved_part(self, args: Arguments, folder: Path, name: str) -> SavedPart:
        """The files of a part that an export takes over, opened now."""
        return SavedPart(folder / name, args.variant)

    def pipeline_of(self, models: Components, network: Any, scheduler: Any) -> Any:
        """A pipeline around models that are in memory already; nothing is loaded."""
        told = {} if models.base is None else models.base.settings(self.settings)
        parts = {**models.encoders, **models.tokenizers, "vae": models.vae, self.network: network}
        return self.pipeline_class(**parts, scheduler=scheduler, **(told | dict(self.absent)))

    def save_pipeline(self, base: Base, network: Any, scheduler: Any, output: Path) -> Any:
        """Write the pipeline to keep, see :meth:`Base.save`."""
        trained = {self.network: network, "scheduler": scheduler}
        return base.save(trained, output, self.settings)

    def tiny(self) -> dict[str, Any]:
        """Small parts of random weights, by their names in the pipeline."""
        raise NotImplementedError

    def save_tiny(self, folder: Path, seed: int = 0) -> None:
        """Save a small but real pipeline of random weights, for tests and first tries."""
        self.check_installed()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.pipeline_class(**self.tiny()).save_pretrained(folder)
        share_weights(folder, "*/*.safetensors")
