"""Loading what an analysis looks at: a saved pipeline's network, and samples as it sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.models.loading import load_model, read_config
from diffusers_curriculum.models.networks import (
    empty_network,
    load_network,
    null_class,
    num_classes,
    takes_labels,
    without_label_dropout,
)
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.randomness import Slots, gaussian, key
from diffusers_curriculum.training.checkpoint.state import WEIGHTS_FILE
from diffusers_curriculum.training.data.checks import decoded
from diffusers_curriculum.training.data.decoding import MODES, Pixels
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError, usage_errors
from diffusers_curriculum.training.parts.images import NETWORK_FOLDERS
from diffusers_curriculum.training.storage.folders import checkpoints
from diffusers_curriculum.training.storage.tensors import check_tensors, load_tensors

_TEXT = "UNet2DConditionModel"
# None: a UNet2DModel, as where it stands alone
_CLASSES = (_TEXT, "UNet2DModel", "DiTTransformer2DModel", "Transformer2DModel", None)


class _Told(nn.Module):
    """A network that knows the conditions of the samples."""

    def __init__(self, network: nn.Module, denoiser: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.denoiser = network, denoiser

    def forward(self, noisy: Tensor, at: Tensor, where: Tensor) -> Tensor:
        return self.denoiser(noisy, at, where)


@dataclass(frozen=True, eq=False)
class Analysed:
    """Samples, and the pipeline whose network is looked at, if there is one.

    Attributes:
        scheduler: that adds noise in training.
        samples: (M, ...) pixels or latents, on the device.
        conditions: what the network is told of each sample besides, by keyword.
        folder: of the pipeline, None for a scheduler alone.
        part: folder of the network in it.
    """

    scheduler: Any
    samples: Tensor
    conditions: Mapping[str, Tensor]
    folder: Path | None = None
    part: str = ""

    @property
    def objective(self) -> Objective:
        return Objective(NoiseLevels.from_scheduler(self.scheduler))

    def network(self, folder: Path) -> Any:
        """The network in a folder, in float32 on the samples' device, not training. Of averaged
        weights in a checkpoint the folder beside them tells what kind it is."""
        plain = folder.with_name(self.part)
        with usage_errors("SOURCE"):
            if read_config(str(plain)).get("_class_name") == _TEXT:
                network = load_model(diffusers.UNet2DConditionModel, str(plain))
            else:
                network = load_network(str(plain))
        if folder != plain:
            weights = load_tensors(folder / WEIGHTS_FILE)
            check_tensors(weights, network.state_dict(), folder.name)
            network.load_state_dict(weights)
        return network.eval().to(self.samples.device)

    def untrained(self) -> nn.Module:
        """The denoiser of a network of the same kind with new weights, the same each time."""
        config: Any = self.network(Path(str(self.folder), self.part))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key(0, purpose="analysed network") >> 65)
            fresh = type(config).from_config(config.config)
        network = without_label_dropout(fresh).to(self.samples.device)
        return _Told(network, self.denoiser(network))

    def denoiser(self, network: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """What ``network`` says of samples, whose conditions are found by their positions; a
        variance that it tells besides is left out."""
        timesteps = self.objective.levels.timesteps.to(self.samples.device)
        channels = self.samples.shape[1]

        def denoise(noisy: Tensor, at: Tensor, where: Tensor) -> Tensor:
            told = {name: values[where] for name, values in self.conditions.items()}
            return network(noisy, timesteps[at], **told, return_dict=False)[0][:, :channels]

        return denoise

    def saved_networks(self, most: int, raw: bool = False) -> dict[str, Path]:
        """Folders of the network in the run's checkpoints, at most so many, evenly spread, and of
        the pipeline itself at the end; by name.

        Args:
            raw: take the weights that were trained and leave out the pipeline; otherwise averaged
                ones where checkpoints have them, as the pipeline has.

        Raises:
            UsageError: ``raw`` without averages to tell them from.
        """
        if self.folder is None:
            return {}
        saved = {folder.name: folder / self.part for folder in checkpoints(self.folder)}
        plain = {name: folder for name, folder in saved.items() if folder.is_dir()}
        averages = {name: folder.with_name(f"{self.part}_ema") for name, folder in plain.items()}
        averages = {name: folder for name, folder in averages.items() if folder.is_dir()}
        if raw and not averages:
            raise UsageError(
                f"--raw_weights has no effect on SOURCE {self.folder}: it has no checkpoints with "
                "averaged weights beside them; drop it."
            )
        found = plain if raw else plain | averages
        spread = torch.linspace(0, len(found) - 1, min(most, len(found))).round().int().tolist()
        kept = {name: found[name] for name in [[*found][i] for i in dict.fromkeys(spread)]}
        return kept if raw else kept | {"pipeline": self.folder / self.part}


def load_analysed(args: Any, folder: Path | None, scheduler: Any, device: torch.device) -> Analysed:
    """Read samples, and put them into the form that a pipeline's network takes them in.

    Args:
        args: flags of the data; ``resolution`` None for the side that the network has, or 32.
        folder: of the pipeline, None for pixels under ``scheduler``.

    Raises:
        UsageError: data or pipeline that cannot be read, or that do not fit each other.
    """
    if folder is None:
        rows = _rows(args, {})
        pixels = _decoded(args, rows, "RGB", args.resolution or 32)
        return Analysed(scheduler, pixels.to(device), {})
    part, config = _network_config(folder)
    columns = _columns(args, folder / part, config)
    rows = _rows(args, columns)
    space = _space(folder, config)
    mode = MODES.get(space.colours, "RGB") if space.model is None else "RGB"
    side = args.resolution or int(config.get("sample_size") or 64) * space.downsampling
    with usage_errors("--resolution"):
        shape = space.shape(side)
    if shape[0] != config["in_channels"]:
        raise UsageError(
            f"SOURCE {folder}: its network takes {config['in_channels']} channels and its "
            f"autoencoder makes {shape[0]}: they do not belong together."
        )
    samples = _encoded(space, _decoded(args, rows, mode, side), device)
    conditions = _conditions(rows, columns, folder, device)
    return Analysed(scheduler, samples, conditions, folder, part)


def _network_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Folder and config of the one network of a pipeline."""
    found = [name for name in NETWORK_FOLDERS if (folder / name).is_dir()]
    if len(found) != 1:
        raise UsageError(
            f"SOURCE {folder} holds {' and '.join(found) or 'neither transformer nor unet'}: give "
            "the folder of an image pipeline with one network."
        )
    with usage_errors("SOURCE"):
        config = read_config(str(folder / found[0]))
    more = config.get("addition_embed_type") or config.get("encoder_hid_dim_type")
    if more or config.get("_class_name") not in _CLASSES:
        raise UsageError(
            f"SOURCE {folder}: its {found[0]} is told more than an analysis can give (as that "
            "of Stable Diffusion XL is, or a transformer for flow matching, as that of Flux): give "
            "Stable Diffusion, a class-conditional or an unconditional pipeline, or its scheduler "
            "alone."
        )
    return found[0], config


def _space(folder: Path, config: Mapping[str, Any]) -> LatentSpace:
    with usage_errors("SOURCE"):
        if (folder / "vae").is_dir():
            return LatentSpace.load(str(folder / "vae"))
        colours = config.get("in_channels")
        if colours not in MODES:
            raise UsageError(
                f"SOURCE {folder}: its network takes {colours} channels and there is no "
                "autoencoder beside it: give a pipeline of images."
            )
        return LatentSpace.of(None, colours=colours)


def _columns(args: Any, network: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Which columns hold the conditions, as :func:`load_images` is told."""
    if config.get("_class_name") == _TEXT:
        return {"caption_column": args.caption_column}
    with usage_errors("SOURCE"):
        empty = empty_network(str(network))
    labelled = takes_labels(empty) and num_classes(empty) > 0
    return {"label_column": args.label_column} if labelled else {}


def _rows(args: Any, columns: Mapping[str, str]) -> Any:
    rows = load_images(
        args.dataset_name,
        args.dataset_config_name,
        args.train_data_dir,
        split=args.train_split,
        cache_dir=args.cache_dir,
        image_column=args.image_column,
        max_train_samples=args.max_train_samples,
        seed=args.seed,
        streaming=args.streaming,
        **columns,
    )
    if len(rows) < args.samples + 2:
        raise UsageError(
            f"--samples is {args.samples}, and there are {len(rows)} samples of data: give at most "
            f"{max(0, len(rows) - 2)}, or more data."
        )
    return rows


def _decoded(args: Any, rows: Any, mode: str, side: int) -> Tensor:
    """(M, C, side, side) the middles of all images, in [-1, 1]."""
    pixels, filter = Pixels(mode, args.background), args.image_interpolation_mode
    transform = ImageTransform(side, filter, center_crop=True, pixels=pixels)
    cells = rows.select_columns([args.image_column])
    images = (decoded(c[args.image_column], n, transform.decode) for n, c in enumerate(cells))
    return torch.stack([transform(image, 0.5, 0.5, 1.0) for image in images])


def _encoded(space: LatentSpace, pixels: Tensor, device: torch.device) -> Tensor:
    """Latents, one draw of each posterior."""
    if space.model is not None:
        space.model.to(device)
    mean, std = space.encode(pixels.to(device))
    if std is None:
        return mean
    slots = Slots(0, len(mean), len(mean))
    draw = gaussian(mean.shape[1:], seed=0, step=0, slots=slots, purpose="posterior", device=device)
    return mean + std * draw


def _conditions(
    rows: Any, columns: Mapping[str, str], folder: Path, device: torch.device
) -> dict[str, Tensor]:
    """What the network is told of each row, by keyword."""
    if "caption_column" in columns:
        return {"encoder_hidden_states": _embedded(rows[columns["caption_column"]], folder, device)}
    part, _ = _network_config(folder)
    network = empty_network(str(folder / part))
    if not takes_labels(network):
        return {}
    if "label_column" not in columns:
        labels = torch.full((len(rows),), null_class(network))
    else:
        labels = torch.tensor(rows[columns["label_column"]])
        if int(labels.max()) >= num_classes(network):
            raise UsageError(
                f"SOURCE {folder}: its network knows {num_classes(network)} classes, and the data "
                f"has {int(labels.max()) + 1}: give the data that it was trained on."
            )
    return {"class_labels": labels.to(device)}


@torch.no_grad()
def _embedded(captions: Any, folder: Path, device: torch.device) -> Tensor:
    """(M, L, W) of captions, the first of several."""
    import transformers  # here, as only text needs it

    with usage_errors("SOURCE"):
        tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
        encoder = load_model(transformers.CLIPTextModel, str(folder / "text_encoder"))
    texts = [text if isinstance(text, str) else text[0] for text in captions]
    tokens = tokenizer(
        texts,
        max_length=tokenizer.model_max_length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    ).input_ids
    encoder.eval().to(device)
    parts = tokens.to(device).split(64)
    return torch.cat([encoder(part, return_dict=False)[0] for part in parts]).float()
