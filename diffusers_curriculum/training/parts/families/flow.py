"""What families of flow-matching transformers have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor

from diffusers_curriculum.densities import SHIFT_PRESETS, shift_from_tokens
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.formulations import own_scheduler, pipeline_index
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import Conditioning, Config, ModelFamily
from diffusers_curriculum.training.process.pipeline_files import components, read_json_file

_PATCH = 2  # latents along one side that make one token


class Told(NamedTuple):
    """What of a command line changes what the network is told of a caption.

    Attributes:
        length: its tokens, None for the family's own number.
        layers: hidden states of the text encoder that are read, None for the pipeline's own.
    """

    length: int | None = None
    layers: Sequence[int] | None = None


PLAIN = Told()  # nothing is changed


class ShiftLine(NamedTuple):
    """A shift e^mu, with mu on a line in image tokens.

    Attributes:
        points: two of the line, (tokens, mu); None for that of diffusers' pipelines.
        side: latents along one side of a training image of --resolution.
    """

    points: Any
    side: int

    @property
    def shift(self) -> float:
        """That of --resolution."""
        return self._of(self.side**2)

    def relative(self, latents: Tensor) -> float:
        """The shift of latents (B, C, h, w) over that of --resolution."""
        height, width = latents.shape[-2:]
        return self._of(height * width) / self.shift

    def _of(self, latents: int) -> float:
        return shift_from_tokens(latents // _PATCH**2, *([self.points] if self.points else []))


class FlowFamily(ModelFamily):
    """A family whose network is a transformer, told of captions by the ``encode_prompt`` of its own
    pipeline, so that training sees what pictures will be drawn with.

    Attributes:
        length: tokens of a caption, unless a flag says otherwise.
        preset: of the shift that it is trained with; None: that of the pipeline's scheduler.
    """

    network = "transformer"
    length: ClassVar[int] = 512
    captions_at_once = 4  # 512 tokens each are work enough, and all layers of them are kept
    preset: ClassVar[str | None] = None

    # -- before anything is loaded ---------------------------------------------------------------

    def downsampling(self, vae: Config) -> int:
        """Pixels of a latent along one side."""
        return 2 ** (len(vae.get("block_out_channels", (64,))) - 1)

    def step(self, vae: Config) -> int:
        return _PATCH * self.downsampling(vae)

    def check_resolution(self, args: Arguments, configs: Mapping[str, Config]) -> None:
        step = self.step(configs["vae"])
        if args.resolution % step:
            raise UsageError(
                f"--resolution is {args.resolution}: the pipeline takes multiples of {step}."
            )
        self.check_buckets(args, configs)

    def load_schedulers(self, args: Arguments) -> tuple[Any, Any]:
        """The noise levels of training, with the shift of the family, and the pipeline's own
        scheduler."""
        own = own_scheduler(args)
        family = NoiseLevels.from_scheduler(own).family
        if family != "flow":
            raise UsageError(
                f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r}: its "
                f"{type(own).__name__} is one of family {family!r}, and {self.title} is trained by "
                "flow matching: save it with a FlowMatchEulerDiscreteScheduler."
            )
        levels = {"use_dynamic_shifting": False, "shift": self.shift_of(args, own)}
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(own.config, **levels), own

    def shift_of(self, args: Arguments, own: Any) -> float:
        """The shift of the noise levels of training: as given, else that of the preset for the
        image tokens of --resolution, else that of the scheduler."""
        if args.flow_shift is not None:
            return args.flow_shift
        line = self.shift_line(args)
        if line is None:
            return 1.0 if own.config.get("use_dynamic_shifting") else own.config["shift"]
        return line.shift

    def shift_line(self, args: Arguments) -> ShiftLine | None:
        """How the shift depends on the size of an image; None where it does not."""
        if self.preset is None or args.flow_shift is not None:
            return None
        path, revision = args.pretrained_model_name_or_path, args.revision
        side = args.resolution // self.downsampling(
            read_json_file(path, revision, "vae/config.json")
        )
        return ShiftLine(SHIFT_PRESETS[self.preset].line, side // _PATCH * _PATCH)

    def sampling_fault(self, scheduler: Any) -> str | None:
        family = NoiseLevels.from_scheduler(scheduler).family
        return None if family == "flow" else f"it is of family {family}"

    # -- captions --------------------------------------------------------------------------------

    def caption_limit(self, args: Arguments, tokenizers: Mapping[str, Any]) -> tuple[Any, int]:
        *_, last = tokenizers.values()  # of the language model
        return last, args.max_sequence_length or self.length

    def tokenize(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> dict[str, Any]:
        """The captions themselves: the pipeline splits them."""
        return {"caption": [*captions]}

    def text_pipeline(self, models: Components) -> Any:
        """The pipeline with nothing but its tokenizers and text encoders."""
        parts = dict.fromkeys((*self.parts, "scheduler")) | models.encoders | models.tokenizers
        told = {} if models.base is None else models.base.settings(self.settings)
        return self.pipeline_class(**parts, **told)

    def encode_text(
        self, models: Components, tokens: Mapping[str, Any], told: Told = PLAIN
    ) -> Conditioning:
        """What the network is told of a batch of captions, as the pipeline makes it."""
        raise NotImplementedError

    # -- latents ---------------------------------------------------------------------------------

    def latents(self, vae: Any, encoded: Tensor) -> Tensor:
        """(z - shift_factor) scaling_factor."""
        return (encoded - vae.config.shift_factor) * vae.config.scaling_factor

    def picture_settings(self, args: Arguments) -> dict[str, Any]:
        """Pictures have the side of the training images."""
        return {"height": args.resolution, "width": args.resolution}

    # -- network ---------------------------------------------------------------------------------

    def predict(
        self,
        network: Any,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """noise - x0 in the shape of ``noisy``, at timesteps (B,) of 0 to 1000.

        Args:
            guidance: scale that a network is told which was distilled to be; None for others.
        """
        raise NotImplementedError

    # -- models ----------------------------------------------------------------------------------

    def class_of(self, args: Arguments, part: str) -> Any:
        library, name = components(pipeline_index(args))[part]
        return getattr({"diffusers": diffusers}.get(library, transformers), name)


def packed(latents: Tensor) -> Tensor:
    """(B, C, H, W) as patches of 2 x 2: (B, H W / 4, 4 C)."""
    b, c, h, w = latents.shape
    return diffusers.FluxPipeline._pack_latents(latents, b, c, h, w)


def unpacked(patches: Tensor, like: Tensor) -> Tensor:
    """Patches of 2 x 2 as latents of the height and width of ``like``."""
    height, width = like.shape[-2:]
    return diffusers.FluxPipeline._unpack_latents(patches, height, width, 1)


def for_each(scale: float | None, of: Tensor) -> Tensor | None:
    """A guidance scale for each sample of a batch (B, ...)."""
    return None if scale is None else torch.full((len(of),), scale, device=of.device)


def unlike(config: Config, name: str, wanted: int, giving: str) -> Iterator[str]:
    """Whether a setting of the transformer is another number than it should be."""
    if config.get(name) != wanted:
        yield f"its transformer's {name} is {config.get(name)}, and {giving} {wanted}"
