"""Checks of a command line against the machine: folders, packages, devices, names on the Hub."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from diffusers_curriculum.training.errors import UsageError

# Tracker name of accelerate -> packages, any of which provides it.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "comet_ml": ("comet_ml",),
    "aim": ("aim",),
    "mlflow": ("mlflow",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "trackio": ("trackio",),
}

_LOCAL = ("/", "./", "../", "~")  # of names that cannot be those of a repository
# What a local folder of each flag must hold.
_MODELS = {
    "pretrained_model_name_or_path": "a saved pipeline",
    "pretrained_vae_model_name_or_path": "a saved autoencoder",
}


def check_environment(args: argparse.Namespace) -> None:
    """Refuse arguments that this machine cannot serve.

    Raises:
        UsageError: with the value and the remedy.
    """
    for flag, wanted in _MODELS.items():
        _check_folder(flag, getattr(args, flag, None), wanted)
    _check_config(args)
    _check_data(args)
    _check_output(args.output_dir)
    _check_resume(args.resume_from_checkpoint, args.output_dir)
    _check_show_timesteps(args.show_timesteps)
    _check_tracker(args)
    _check_hub(args)
    _check_kernels(args)


def installed(package: str) -> bool:
    """Whether ``package`` can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def _check_folder(flag: str, name: str | None, wanted: str) -> None:
    if name is not None and name.startswith(_LOCAL) and not Path(name).is_dir():
        raise UsageError(
            f"--{flag} is {name}: there is no such folder. Give a folder with {wanted}, or the "
            "name of a repository on the Hub."
        )


def _check_config(args: argparse.Namespace) -> None:
    flag = "model_config" if hasattr(args, "model_config") else "model_config_name_or_path"
    name = getattr(args, flag, None)
    if name is not None and name.startswith(_LOCAL) and not Path(name).exists():
        raise UsageError(
            f"--{flag} is {name}: there is no such file or folder. Give a config.json, its folder, "
            "or the name of a repository on the Hub."
        )


def _check_data(args: argparse.Namespace) -> None:
    # --show_timesteps looks at the scheduler only.
    if args.dataset_name is None and args.train_data_dir is None and args.show_timesteps is None:
        raise UsageError(
            "neither --dataset_name nor --train_data_dir is given: name a data set on the Hub, or "
            f"{_wanted_folder(args)}."
        )
    # Together with --dataset_name the folder lies inside that data set, not on this machine.
    if args.train_data_dir is not None and args.dataset_name is None:
        _check_data_folder(Path(args.train_data_dir), _wanted_folder(args))


def _wanted_folder(args: argparse.Namespace) -> str:
    if hasattr(args, "caption_column"):
        return "a folder of images and a metadata file (metadata.jsonl or metadata.csv) of captions"
    if hasattr(args, "label_column"):
        return "a folder of images with one sub-folder per class"
    return "a folder of images"


def _check_data_folder(folder: Path, wanted: str) -> None:
    if not folder.is_dir():
        problem = "it is a file" if folder.exists() else "there is no such folder"
        raise UsageError(f"--train_data_dir is {folder}: {problem}. Give {wanted}.")
    if not any(path.is_file() for path in folder.rglob("*")):
        raise UsageError(f"--train_data_dir is {folder}: the folder is empty. Give {wanted}.")


def _check_output(name: str) -> None:
    folder = Path(name)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"--output_dir is {name}: {path} is a file. Name a folder.")


def _check_resume(name: str | None, output_dir: str) -> None:
    # `latest` may find nothing, which means a fresh start.
    if name is None or name == "latest":
        return
    path = Path(name)
    # A bare name is looked up inside the output folder, as officially; anything else is literal.
    if path.name == name:
        path = Path(output_dir) / name
    if not path.is_dir():
        raise UsageError(
            f"--resume_from_checkpoint is {name}: there is no folder {path.resolve()}. Give "
            "latest, a checkpoint-N inside --output_dir, or the path of a checkpoint."
        )


def _check_show_timesteps(name: str | None) -> None:
    if name in (None, "terminal"):
        return
    if Path(name).suffix not in (".png", ".svg", ".json"):
        raise UsageError(
            f"--show_timesteps is {name}: the name must end in .png, .svg or .json, or be the word "
            "terminal."
        )
    if not Path(name).parent.is_dir():
        raise UsageError(
            f"--show_timesteps is {name}: there is no folder {Path(name).parent}. Create it first."
        )
    if not installed("matplotlib"):
        raise UsageError(f"--show_timesteps {name} needs matplotlib: pip install matplotlib.")


def _check_tracker(args: argparse.Namespace) -> None:
    name = args.report_to
    if name == "wandb" and args.hub_token is not None:
        raise UsageError(
            "--report_to wandb together with --hub_token is refused, because the token could "
            "become public: drop --hub_token and log in with `hf auth login`."
        )
    if name == "all":
        return
    if name not in TRACKERS:
        raise UsageError(f"--report_to is {name!r}: choose from all, {', '.join(TRACKERS)}.")
    if not any(map(installed, TRACKERS[name])):
        package = TRACKERS[name][0]
        raise UsageError(
            f"--report_to is {name}, but {package} is not installed: pip install {package}, or "
            "choose another tracker."
        )


def _check_hub(args: argparse.Namespace) -> None:
    if not args.push_to_hub:
        return
    # Both load diffusers, which a run that stays at home need not wait for here.
    from diffusers_curriculum.training.publish.card import check_repository_name
    from diffusers_curriculum.training.publish.hub import repository_name

    check_repository_name(repository_name(args.hub_model_id, args.output_dir))


def _check_kernels(args: argparse.Namespace) -> None:
    if getattr(args, "use_8bit_adam", False) and not installed("bitsandbytes"):
        raise UsageError("--use_8bit_adam needs bitsandbytes: pip install it, or drop the flag.")
    if args.enable_xformers_memory_efficient_attention:
        _check_xformers("--enable_xformers_memory_efficient_attention")


def _check_xformers(flag: str) -> None:
    if not installed("xformers"):
        raise UsageError(f"{flag} needs xformers: pip install xformers, or drop the flag.")
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            f"{flag} needs a CUDA device and torch sees none: drop the flag; PyTorch's own "
            "attention is used then."
        )
