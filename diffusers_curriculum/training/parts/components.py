"""Loading the parts of a saved pipeline, all with the same revision and variant, and saving it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusers_curriculum.models.loading import DTYPE, load_pipeline, load_whole
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import OF_CONFIGS, UsageError
from diffusers_curriculum.training.levels.formulations import own_scheduler
from diffusers_curriculum.training.process.pipeline_files import variants
from diffusers_curriculum.training.storage.components import SavedPart
from diffusers_curriculum.training.storage.files import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where the files of a part are: a folder or Hub id, and a folder in it."""

    path: str
    revision: str | None
    variant: str | None
    subfolder: str | None
    flag: str = "pretrained_model_name_or_path"
    kind: str | None = None  # what the flag asks for, where that is no pipeline of the family

    @contextmanager
    def loading(self, part: str, kind: str) -> Iterator[None]:
        """Turn what loaders raise into a UsageError that names the flag and the part."""
        try:
            yield
        except (OSError, RuntimeError, ImportError, *OF_CONFIGS) as error:
            raise UsageError(
                f"--{self.flag} {self.path!r}: its {part} cannot be loaded ({error}). "
                f"Give {self.kind or kind}'s folder or Hub id, and check --revision, --variant."
            ) from error

    def load(self, kind: Any, dtype: torch.dtype, **more: Any) -> Any:
        """The model of class ``kind``; the dtype is always said, as diffusers and transformers have
        different defaults. ``more`` is for its ``from_pretrained``."""
        where = {"revision": self.revision, "variant": self.variant, "subfolder": self.subfolder}
        settings: dict[str, Any] = where | {DTYPE: dtype} | more
        return load_whole(kind, self.path, **settings)[0]


@dataclass
class Base:
    """What a run keeps of the pipeline that it begins with.

    Attributes:
        kind: class of the pipeline.
        index: its model_index.json.
        frozen: its parts that are not trained, by name.
        absent: names of such parts that it could have and has not.
    """

    kind: Any
    index: dict[str, Any]
    frozen: dict[str, SavedPart]
    absent: tuple[str, ...] = ()

    def settings(self, names: Collection[str]) -> dict[str, Any]:
        """Those of the named settings that its index has."""
        return {name: self.index[name] for name in names if name in self.index}

    def save(
        self, trained: Mapping[str, Any], output: Path, settings: Collection[str] = ()
    ) -> Callable[[], Any]:
        """Write the pipeline to keep: what was trained, a scheduler that knows what it predicts,
        and the frozen parts as they are in the base, file by file.

        Args:
            trained: network and scheduler, by name.
            settings: of the index, to be kept.

        Returns:
            What loads it, in float32 around the network in memory.
        """
        for name, part in trained.items():
            part.save_pretrained(output / name)
        for name, part in self.frozen.items():
            part.copy(output / name)
        kept = self.settings([*self.frozen, *settings])
        kept |= {name: [None, None] for name in self.absent}
        kept |= {name: ["diffusers", type(part).__name__] for name, part in trained.items()}
        kept |= {"_class_name": self.kind.__name__, "_diffusers_version": diffusers.__version__}
        text = json.dumps(kept, indent=2, sort_keys=True) + "\n"
        write_atomically(output / self.kind.config_name, text)
        models = {name: part for name, part in trained.items() if name != "scheduler"}
        return partial(load_pipeline, self.kind, output, **models)


@dataclass
class Components:
    """The models of a text-to-image run; what is frozen is in the dtype of mixed precision.

    Attributes:
        network: what is trained, float32.
        vae: the autoencoder; hollow where nothing is left to encode, see :attr:`has_vae`.
        encoders: of text, by their names in the pipeline; so are the ``tokenizers``.
        base: what is kept of the pipeline that all come from, if they come from one.
        vae_waits: whether the autoencoder is on the host until it is used.
    """

    network: Any
    vae: Any
    encoders: dict[str, Any] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)
    base: Base | None = None
    vae_waits: bool = False

    @property
    def has_vae(self) -> bool:
        """Whether the autoencoder has weights, and not its config alone."""
        return self.vae.device.type != "meta"


def load_schedulers(args: Arguments) -> tuple[Any, Any]:
    """The scheduler that adds noise in training, and the pipeline's own for sampling.

    The first is DDPM for variance preserving pipelines, as in diffusers' script, and the
    pipeline's own class for flow matching and EDM.
    """
    path, own = args.pretrained_model_name_or_path, own_scheduler(args)
    if NoiseLevels.from_scheduler(own).family != "vp":
        return own, own
    where = {"subfolder": "scheduler", "revision": args.revision}
    return diffusers.DDPMScheduler.from_pretrained(path, **where), own


def check_variant(args: Arguments, revisions: Collection[str | None], parts: Sequence[str]) -> None:
    """Refuse a --variant that no part has files of, and tell which parts are loaded without it."""
    path = args.pretrained_model_name_or_path
    for revision in revisions:
        kinds = variants(path, revision, args.variant, parts)
        plain = [part for part, variant in kinds.items() if variant != args.variant]
        if plain:
            logger.info("--variant %s: %s come without it.", args.variant, " and ".join(plain))
