"""`diffusers-curriculum reconstruct-ema`: a trained pipeline with a moving average of any width."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_curriculum.cli.source import SAMPLER_FILE, SAMPLER_FOLDER, read_object

if TYPE_CHECKING:
    from torch import Tensor

    from diffusers_curriculum.training.parts.reconstruction import Reconstruction

SNAPSHOTS = "power_ema"
NETWORKS = ("transformer", "unet")
REPORT_FILE = "ema_reconstruction.json"
_REMEDY = "Save the pipeline again."


def add_reconstruct_ema(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "reconstruct-ema",
        help="give a trained pipeline the moving average of another width",
        description="Copy the pipeline of a run that was trained with --power_ema, with the"
        " weights of its network averaged over another width. It is put together from the"
        f" snapshots in RUN_DIR/{SNAPSHOTS} (arXiv 2312.02696); nothing is trained.",
    )
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", help="the --output_dir of a finished training run")
    add("--sigma_rel", type=float, required=True, help="width, as a part of the training time")
    add("--step", type=int, help="average as it was after this many steps (default: the last)")
    add("--output_dir", required=True, help="where the copy is saved; a new folder")
    add(
        "--max_residual",
        type=float,
        default=0.1,
        help="largest part of the average's profile that may be missing (default 0.1)",
    )
    parser.set_defaults(handler=_reconstruct)


def _reconstruct(args: argparse.Namespace) -> tuple[str, int]:
    """Check all that can be checked, then write; imported late so that `--help` need not wait."""
    from diffusers_curriculum.models.saving import share_weights
    from diffusers_curriculum.training.parts.reconstruction import (
        plan_reconstruction,
        reconstructed,
    )
    from diffusers_curriculum.training.storage.folders import aside, publish, sync_tree

    run, output = Path(args.run_dir), Path(args.output_dir).resolve()
    parts = _parts(run)
    network = _network(run, parts)
    check_output(output, [run / name for name in (*parts, SNAPSHOTS)])
    plan = plan_reconstruction(run / SNAPSHOTS, args.sigma_rel, args.step, args.max_residual)
    _check_model(run / network, plan)
    folder = aside(output, "tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        _copy(run, parts, folder)
        _replace_weights(folder / network, dict(reconstructed(plan)))
        coefficients = zip(plan.snapshots, plan.coefficients, strict=True)
        report = {
            "sigma_rel": plan.sigma_rel,
            "step": plan.step,
            "residual": plan.residual,
            "coefficients": {snapshot.path.name: value for snapshot, value in coefficients},
        }
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        (folder / REPORT_FILE).write_text(text, "utf-8")
        share_weights(folder)
        sync_tree(folder)
        publish(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return (
        f"{output}: {network} averaged with sigma_rel={plan.sigma_rel:g} at step {plan.step},"
        f" from {len(plan.snapshots)} snapshots, residual={plan.residual:.2g}"
    ), 0


def _parts(run: Path) -> list[str]:
    """The folders of a pipeline's components; a ValueError where this is no pipeline."""
    index = run / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{run} holds no pipeline ({index.name} is missing): give the --output_dir of a"
            " finished training run."
        )
    names = read_object(index, "object", _REMEDY)
    return [name for name in names if not name.startswith("_") and (run / name).is_dir()]


def _network(run: Path, parts: list[str]) -> str:
    found = [name for name in NETWORKS if name in parts]
    if len(found) != 1:
        raise ValueError(f"{run} must hold one of {' and '.join(NETWORKS)}; it holds {parts}.")
    if not any((run / found[0]).glob("*.safetensors")):
        raise ValueError(f"{run / found[0]} holds no safetensors file. {_REMEDY}")
    return found[0]


def check_output(output: Path, taken: list[Path]) -> None:
    """Refuse an output folder that holds something, or lies in one of those ``taken``."""
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output_dir {output} exists already: name a new folder.")
    for folder in taken:
        if output.is_relative_to(folder.resolve()):
            raise ValueError(f"--output_dir {output} lies in {folder}: name a folder elsewhere.")


def _check_model(network: Path, plan: Reconstruction) -> None:
    """Refuse snapshots of another model than the pipeline's."""
    from diffusers_curriculum.training.parts.power_ema import config_hash

    config = read_object(network / "config.json", "object", _REMEDY)
    if config_hash(config) != plan.snapshots[0].config:
        raise ValueError(
            f"The snapshots in {plan.snapshots[0].path.parent} are of a model with another config"
            f" than {network}: give the folder that they were written with."
        )


def _copy(run: Path, parts: list[str], folder: Path) -> None:
    """Copy what makes the pipeline; checkpoints, snapshots, logs and pictures stay behind."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in (*parts, *([SAMPLER_FOLDER] if (run / SAMPLER_FOLDER).is_dir() else [])):
        shutil.copytree(run / name, folder / name)
    for name in ("model_index.json", "pipeline.py", SAMPLER_FILE):
        if (run / name).is_file():
            shutil.copy2(run / name, folder / name)


def _replace_weights(network: Path, averages: dict[str, Tensor]) -> None:
    """Put the averages into the network's files, in those files' dtypes; buffers stay. A ValueError
    says which parameter has no place in the files, or one of another shape."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    missing = set(averages)
    for path in sorted(network.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        for name in tensors.keys() & averages.keys():
            if tensors[name].shape != averages[name].shape:
                raise ValueError(
                    f"{path.name}: {name} has shape {tuple(tensors[name].shape)} and its average "
                    f"{tuple(averages[name].shape)}: the snapshots are of another model."
                )
            tensors[name] = averages[name].to(tensors[name].dtype)
        missing -= tensors.keys()
        path.unlink()  # the loaded ones may be windows into the file: it must not be written over
        save_file(tensors, path, metadata=metadata)
    if missing:
        raise ValueError(f"{network} lacks {len(missing)} averaged weights, as {min(missing)}.")
