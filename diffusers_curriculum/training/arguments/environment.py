"""Checks of a command line against the machine: folders, packages, devices, names on the Hub."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from glob import iglob
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffusers_curriculum.models.image_files import has_files
from diffusers_curriculum.training.arguments.flag import path as as_path
from diffusers_curriculum.training.errors import HubError, UsageError

# Tracker name of accelerate -> packages, any of which provides it; most are called alike.
_ALONE = ("wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")} | {name: (name,) for name in _ALONE}

BY_BITSANDBYTES = ("4bit", "8bit")  # kinds of --quantize_base
_TELL_THE_COMMAND = {"wandb", "comet_ml", "swanlab", "clearml"}  # what the program was called with
CUDA_GRAPHS = "reduce-overhead"  # the --compile_mode that replays them
NO_TRACKER = "none"  # transformers' word, too
_WRITTEN = ("output_dir", "logging_dir")  # places that a run does not read
REMOTE, REMOTE_FOLDER = "hub:", "last-checkpoint"  # a checkpoint on the Hub, and where it is there
LOCAL = ("/", "./", "../", "~")  # of names that cannot be those of a repository
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def installed(package: str) -> bool:
    """Whether ``package`` can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def satisfied(requirement: str) -> bool:
    """Whether what pip would install for ``requirement``, such as "name>=1.0", is there."""
    from packaging.requirements import Requirement  # --version answers without any dependency

    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return False


def settle_local_rank(args: Any) -> None:
    """Launchers say the rank by a variable, which overrides the flag."""
    text = os.environ.get("LOCAL_RANK", "-1")
    try:
        rank = int(text)
    except ValueError:
        raise UsageError(
            f"the environment variable LOCAL_RANK is {text!r}: make it an integer or unset it."
        ) from None
    args.local_rank = args.local_rank if rank == -1 else rank


def check_folder(args: Any, name: str, wanted: str) -> None:
    """Refuse a path to a folder of something ``wanted`` that is not there; anything else may be a
    name on the Hub."""
    value = getattr(args, name)
    if value is not None and value.startswith(LOCAL) and not Path(value).is_dir():
        raise UsageError(
            f"--{name} is {value}: there is no such folder. Give a folder with {wanted}, or the "
            "name of a repository on the Hub."
        )


def check_data(args: Any, wanted: str) -> None:
    """Refuse a run without data, a local folder being the one ``wanted``; --show_timesteps looks at
    the scheduler only."""
    missing = args.dataset_name is None and args.train_data_dir is None and not args.sources
    if missing and "show_timesteps" not in args.given:
        raise UsageError(
            "neither --dataset_name nor --train_data_dir is given: name a data set on the Hub, or "
            f"{wanted}."
        )
    if not (args.streaming and any(iglob(args.dataset_name or ""))):
        check_folder(args, "dataset_name", "a data set")
    # Together with --dataset_name the folder lies inside that data set, not on this machine.
    if args.train_data_dir is not None and args.dataset_name is None:
        check_image_folder("--train_data_dir", args.train_data_dir, wanted)


def check_image_folder(flag: str, name: str, wanted: str) -> None:
    """Refuse a folder of images, the one ``wanted``, that is not there, or empty."""
    folder, problem = Path(name), None
    if not folder.is_dir():
        problem = "it is a file" if folder.exists() else "there is no such folder"
    elif not has_files(folder):
        problem = "the folder is empty"
    if problem:
        raise UsageError(f"{flag} is {folder}: {problem}. Give {wanted}.")


def check_output(args: Any) -> None:
    """Refuse an output folder that cannot be one, and a tracker that is not there."""
    folder = Path(args.output_dir)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"--output_dir is {args.output_dir}: {path} is a file. Name a folder.")
    if args.overwrite_output_dir:
        _check_overwritten(args, folder.resolve())
    _check_tracker(args.report_to, args.flag("report_to"))


def _check_overwritten(args: Any, folder: Path) -> None:
    """Refuse to move aside what this run reads."""
    places = [f for f in args.flags if f.convert is as_path and f.dest not in _WRITTEN]
    for flag in places:
        value = args[flag.dest]
        if flag.dest == "resume_from_checkpoint" and value and not value.startswith(REMOTE):
            value = checkpoint_path(args.output_dir, value)
        if value and Path(value).resolve().is_relative_to(folder):
            raise UsageError(
                f"--{flag.name} is {args[flag.dest]}, which lies in --output_dir {folder}: "
                "--overwrite_output_dir would move it aside. Drop that, or give another folder."
            )


def _check_tracker(name: str, flag: str) -> None:
    if name in ("all", NO_TRACKER):
        return
    if name not in TRACKERS:
        known = ", ".join(("all", NO_TRACKER, *TRACKERS))
        raise UsageError(f"--{flag} is {name!r}: choose from {known}.")
    if not any(map(installed, TRACKERS[name])):
        package = TRACKERS[name][0]
        raise UsageError(
            f"--{flag} is {name}, but {package} is not installed: pip install {package}, or choose "
            "another tracker."
        )


def checkpoint_path(output_dir: str, request: str) -> Path:
    """The folder that --resume_from_checkpoint names: a bare name lies inside the output folder, as
    officially, and anything else is literal."""
    path = Path(request).expanduser()
    return (Path(output_dir, path) if path.name == request else path).resolve()


def check_resume(args: Any) -> None:
    """Refuse a checkpoint that is not there; `latest` may find nothing, which is a fresh start."""
    name = args.resume_from_checkpoint
    if name is None or name == "latest":
        return
    if name.startswith(REMOTE):
        repo_id = name.removeprefix(REMOTE).partition("@")[0]
        check_repository_name(repo_id, f"--resume_from_checkpoint as {REMOTE}")
        return
    path = checkpoint_path(args.output_dir, name)
    if not path.is_dir():
        raise UsageError(
            f"--resume_from_checkpoint is {name}: there is no folder {path}. Give latest, a "
            "checkpoint-N inside --output_dir, the path of a checkpoint, or hub:OWNER/NAME."
        )


def check_reports(args: Any) -> None:
    """Refuse pictures that cannot be drawn or written."""
    name = args.show_timesteps
    if name == "terminal":
        return
    if not installed("matplotlib"):
        raise UsageError(
            "pictures of what is trained on (timesteps.png, --show_timesteps) need matplotlib: "
            "pip install matplotlib."
        )
    if name is None:
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


def check_token(args: Any) -> None:
    """Refuse a token that a tracker could make public, as it stores the command line."""
    chosen = filter(installed, TRACKERS) if args.report_to == "all" else [args.report_to]
    if args.hub_token is not None and (telling := _TELL_THE_COMMAND & {*chosen}):
        raise UsageError(
            f"--{args.flag('report_to')} {args.report_to} together with --hub_token is refused, "
            f"because the token could become public ({', '.join(sorted(telling))}): drop "
            "--hub_token and log in with `hf auth login`."
        )


def check_hub(args: Any) -> None:
    """Refuse a name that the Hub would."""
    if args.push_to_hub:
        check_repository_name(repository_name(args.hub_model_id, args.output_dir))


def repository_name(hub_model_id: str | None, output_dir: str | Path) -> str:
    """The repository to push to: the given one, else the name of the output folder."""
    return hub_model_id or Path(output_dir).resolve().name


def is_repository_name(name: str) -> bool:
    """Whether ``name`` has the form "name" or "owner/name"."""
    return bool(_REPOSITORY.fullmatch(name))


def check_repository_name(repo_id: str, given_by: str = "--hub_model_id as ") -> None:
    """Raise HubError unless ``repo_id`` is a name that the Hub accepts."""
    if not is_repository_name(repo_id) or ".." in repo_id or "--" in repo_id:
        raise HubError(
            f"repository name {repo_id!r} is not one that the Hub accepts; give {given_by}"
            "NAME or OWNER/NAME of letters, digits, '-', '_' and '.', without '--' or '..'"
        )


def check_quantized(args: Any) -> None:
    """Refuse a base in fewer bits without the package that does it, or on a device that can't."""
    flag, package = f"--quantize_base {args.quantize_base}", "bitsandbytes"
    if args.bnb_quantization_config_path is not None:
        flag = "--bnb_quantization_config_path"
    elif args.quantize_base is None:
        return
    elif args.quantize_base not in BY_BITSANDBYTES:
        package = "torchao"
    if not installed(package):
        raise UsageError(
            f"{flag} needs {package}: pip install 'diffusers-curriculum[quantization]', or drop "
            "the flag."
        )
    import torch

    if package == "bitsandbytes" and not torch.cuda.is_available():
        raise UsageError(
            f"{flag} needs a CUDA device and torch sees none: --quantize_base int8wo works on any."
        )


def check_peft(args: Any) -> None:
    """Refuse an adapter without the package that makes it."""
    if not installed("peft"):
        raise UsageError("an adapter needs peft: pip install 'diffusers-curriculum[lora]'.")


def check_compiler(args: Any) -> None:
    """Refuse to compile without the C++ compiler that torch.compile calls, and without the device
    that its mode is for."""
    name = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if args.compile != "none" and shutil.which(name) is None:
        raise UsageError(
            f"--compile {args.compile} needs a C++ compiler and there is no {name}: install it, "
            "name another by the environment variable CXX, or drop the flag."
        )
    if args.compile_mode != CUDA_GRAPHS:
        return
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            f"--compile_mode {args.compile_mode} replays CUDA graphs and torch sees no CUDA "
            "device: drop the flag."
        )


def check_attention(args: Any) -> None:
    """Refuse two flags that name different attentions."""
    if args.enable_xformers_memory_efficient_attention and args.attention not in (None, "xformers"):
        raise UsageError(
            f"--enable_xformers_memory_efficient_attention and --attention {args.attention} both "
            "say what computes attention: drop one of the two."
        )


def check_kernels(args: Any) -> None:
    """Refuse an attention without its package or without a CUDA device."""
    flag, name = f"--attention {args.attention}", args.attention
    if args.enable_xformers_memory_efficient_attention:
        flag, name = "--enable_xformers_memory_efficient_attention", "xformers"
    if name in (None, "sdpa", "math", "flex"):  # which are everywhere
        return
    package = {"xformers": "xformers", "flash": "flash-attn"}.get(name)
    if package is not None and not installed(package.replace("-", "_")):
        raise UsageError(f"{flag} needs {package}: pip install {package}, or drop the flag.")
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            f"{flag} needs a CUDA device and torch sees none: drop the flag; PyTorch's own "
            "attention is used then."
        )
