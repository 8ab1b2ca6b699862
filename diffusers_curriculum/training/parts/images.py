"""Networks and latent spaces of class-conditional and unconditional training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.models.loading import read_config
from diffusers_curriculum.models.network_config import Asked, complete_config
from diffusers_curriculum.models.networks import (
    build_network,
    empty_network,
    learns_variance,
    load_network,
    num_classes,
    takes_labels,
)
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.decoding import MODES
from diffusers_curriculum.training.errors import OF_CONFIGS, UsageError, usage_errors
from diffusers_curriculum.training.levels.formulations import pipeline_index
from diffusers_curriculum.training.process.attention import choose_attention
from diffusers_curriculum.training.process.pipeline_files import variants
from diffusers_curriculum.training.storage.components import SavedPart
from diffusers_curriculum.training.storage.fingerprints import hash_config, hash_lines
from diffusers_curriculum.training.storage.manifest import file_sha256

NETWORK_FOLDERS = ("transformer", "unet")
_SIZE_NAME = re.compile(r"DiT-\w+/\d+|UNet")
_DEFAULT = "UNet"  # as in diffusers' train_unconditional.py


@dataclass
class ImageModels:
    """The models of an image run.

    Attributes:
        network: what is trained, float32.
        space: what it is trained in; the autoencoder is frozen, in the dtype of mixed precision.
        empty: the same without the autoencoder's weights; ``space`` is this one where nothing is
            left to encode.
        source: the autoencoder's files; None in pixels.
    """

    network: Any
    space: LatentSpace
    empty: LatentSpace
    source: SavedPart | None = None


def autoencoder_source(args: Arguments) -> tuple[str, str | None] | None:
    """Path and subfolder of the autoencoder, None for pixels."""
    given = args.pretrained_vae_model_name_or_path
    if given is not None:
        inside = Path(given, "vae", "config.json").is_file()
        return given, "vae" if inside and not Path(given, "config.json").is_file() else None
    named = pipeline_index(args).get("vae")
    if not (isinstance(named, list | tuple) and any(named)):
        return None
    return args.pretrained_model_name_or_path, "vae"


def open_autoencoder(args: Arguments) -> SavedPart | None:
    """The files that the autoencoder was loaded from, of the Hub's those in the cache."""
    source = autoencoder_source(args)
    if source is None:
        return None
    path, subfolder = source
    if Path(path).is_dir():
        return SavedPart(Path(path, subfolder or ""))
    revision = _revision(args, path)
    config = hf_hub_download(path, "config.json", subfolder=subfolder, revision=revision)
    return SavedPart(Path(config).parent)


def colours(args: Arguments) -> int:
    """Channels of the images: those of the network's config in pixels, 3 for an autoencoder.

    Raises:
        UsageError: no images have so many, or --background is given for transparent ones.
    """
    if autoencoder_source(args) is not None:
        return 3
    path, name = args.pretrained_model_name_or_path, args.model_config
    flag = "pretrained_model_name_or_path" if path else args.flag("model_config")
    config: dict[str, Any] = {}
    if path is not None or not _SIZE_NAME.fullmatch(name or _DEFAULT):
        with usage_errors(f"--{flag}"):
            where = (path, args.revision, _network_folder(args)) if path else (name,)
            config = dict(read_config(*where))
    found = config.get("in_channels") or 3
    if found not in MODES:
        raise UsageError(
            f"--{flag}: {path or name!r} takes {found} channels, and images have 1 (grey), 3 or 4 "
            "(with alpha): change its in_channels, or give the autoencoder whose latents it takes "
            "by --pretrained_vae_model_name_or_path."
        )
    if MODES[found] == "RGBA" and args.background is not None:
        raise UsageError(
            f"--background is {args.background}, and the network takes transparency itself (4 "
            "channels): drop it."
        )
    return found


def empty_space(args: Arguments) -> LatentSpace:
    """The latent space to train in, for its shapes: without the autoencoder's weights."""
    source = autoencoder_source(args)
    with usage_errors("--pretrained_vae_model_name_or_path", OF_CONFIGS):
        if source is None:
            return LatentSpace.of(None, colours=colours(args))
        path, subfolder = source
        space = LatentSpace.empty(path, _revision(args, path), subfolder)
        space.shape(args.resolution)
    return space


def load_space(
    args: Arguments, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LatentSpace:
    """The latent space to train in, its autoencoder on ``device``."""
    space, source = empty_space(args), autoencoder_source(args)
    if source is None:
        return space
    path, subfolder = source
    with usage_errors("--pretrained_vae_model_name_or_path", OF_CONFIGS):
        space = LatentSpace.load(path, _revision(args, path), subfolder=subfolder, dtype=dtype)
    space.model.to(device)
    return space


def check_network(args: Arguments, labelled: bool) -> None:
    """Look at the network's name, and at what it would be given, before anything is loaded."""
    flag, config = f"--{args.flag('model_config')}", args.model_config
    channels, side, _ = empty_space(args).shape(args.resolution)
    if args.pretrained_model_name_or_path is not None:
        _check_pretrained(args, channels, side, None)
    elif _SIZE_NAME.fullmatch(config or _DEFAULT):
        with usage_errors(flag, OF_CONFIGS):
            asked = Asked(channels, None, side, 1 if labelled else None)
            complete_config(config or _DEFAULT, asked)


def make_network(args: Arguments, space: LatentSpace, classes: int | None, seed: int) -> Any:
    """The network to train, float32 on the CPU, built from its config or loaded, for the data's
    number of ``classes``, None for unconditional training; one of two times where such are drawn.
    """
    network = _single_network(args, space, classes, seed)
    if args.formulation != "mean_flow":
        return network
    from diffusers_curriculum.models.two_times import with_two_times  # here, as it takes seconds

    with usage_errors("--formulation mean_flow"):
        return with_two_times(network)


def _single_network(args: Arguments, space: LatentSpace, classes: int | None, seed: int) -> Any:
    channels, side, _ = space.shape(args.resolution)
    if args.pretrained_model_name_or_path is not None:
        return _pretrained(args, channels, side, classes)
    with usage_errors(f"--{args.flag('model_config')}", OF_CONFIGS):
        return build_network(
            args.model_config or _DEFAULT,
            channels=channels,
            out_channels=channels * (1 + (args.learned_variance != "none")),
            sample_size=side,
            num_classes=classes,
            seed=seed,
        )


def _pretrained(args: Arguments, channels: int, side: int, classes: int | None) -> Any:
    """The network of a saved pipeline, once its config is known to fit."""
    _check_pretrained(args, channels, side, classes)
    path, name = args.pretrained_model_name_or_path, _network_folder(args)
    variant = variants(path, args.revision, args.variant, [name])[name]
    with usage_errors("--pretrained_model_name_or_path", OF_CONFIGS):
        return load_network(path, revision=args.revision, variant=variant, subfolder=name)


def _network_folder(args: Arguments) -> str:
    index = pipeline_index(args)
    named = [name for name in NETWORK_FOLDERS if any(index.get(name) or ())]
    if len(named) != 1:
        raise UsageError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} has no "
            "transformer or unet to train: give an image pipeline."
        )
    return named[0]


def _check_pretrained(args: Arguments, channels: int, side: int, classes: int | None) -> None:
    """Refuse a saved network that takes other latents, or too few classes; its config tells."""
    path, name = args.pretrained_model_name_or_path, _network_folder(args)
    flag = f"--pretrained_model_name_or_path {path!r}"
    variants(path, args.revision, args.variant, [name])
    with usage_errors("--pretrained_model_name_or_path", OF_CONFIGS):
        network = empty_network(path, args.revision, name)
    size = network.config["sample_size"]
    if (network.config["in_channels"], size) not in ((channels, side), (channels, None)):
        raise UsageError(
            f"{flag}: its network takes {network.config['in_channels']} channels of side {size}, "
            f"and --resolution {args.resolution} gives {channels} of side {side}: change "
            "--resolution or the autoencoder."
        )
    learns = learns_variance(network)
    if learns != (args.learned_variance != "none"):
        remedy = "vlb (train it) or ignore (leave it)" if learns else "none"
        raise UsageError(
            f"{flag}: its network has {network.config['out_channels']} output channels, but "
            f"--learned_variance is {args.learned_variance}: give {remedy}."
        )
    if classes is not None and (not takes_labels(network) or num_classes(network) < classes):
        raise UsageError(
            f"{flag}: its network knows {num_classes(network)} classes, and the data has {classes}."
        )


def ready(args: Arguments, network: Any, device: torch.device) -> Any:
    """Put the network on ``device``, in training mode, with the kernels asked for."""
    network.requires_grad_(True).train().to(device)
    choose_attention(args, network)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network


def folder_name(network: Any) -> str:
    """The network's folder in pipelines and checkpoints: "transformer" or "unet"."""
    return NETWORK_FOLDERS[type(network).__name__.endswith("UNet2DModel")]


def model_facts(args: Arguments, classes: int | None) -> dict[str, Any]:
    """What tells the network and its frozen autoencoder; cheap, and without loading either."""
    flag, config = f"--{args.flag('model_config')}", args.model_config
    facts: dict[str, Any] = {"classes": classes, "pipeline": None, "config": config}
    if args.pretrained_model_name_or_path is not None:
        facts["pipeline"] = _identity(args.pretrained_model_name_or_path, args.revision)
    elif config is not None and not _SIZE_NAME.fullmatch(config):
        with usage_errors(flag):
            facts["config"] = hash_config(read_config(config))
    facts["autoencoder"] = autoencoder_identity(args)
    return facts


def autoencoder_identity(args: Arguments) -> Any:
    """What tells the autoencoder: a name on the Hub, or SHA-256 of the files of a folder, as two of
    one architecture differ in nothing else. None for pixels."""
    source = autoencoder_source(args)
    if source is None:
        return None
    path, subfolder = source
    folder = Path(path, subfolder or "")
    if not folder.is_dir():
        return {"name": path, "subfolder": subfolder, "revision": _revision(args, path)}
    names = ("config.json", "*.safetensors", "*.safetensors.index.json")
    files = sorted(file for name in names for file in folder.glob(name))
    return hash_lines(f"{file.name} {file_sha256(file)}" for file in files)


def _revision(args: Arguments, path: str) -> str | None:
    """--revision is one of the pretrained pipeline's repository."""
    return args.revision if path == args.pretrained_model_name_or_path else None


def _identity(path: str, revision: str | None = None) -> Any:
    if not Path(path).is_dir():
        return {"name": path, "revision": revision}
    files = [f for f in Path(path).iterdir() if f.is_file()]
    return hash_lines(str((f.name, f.stat().st_size)) for f in sorted(files))
