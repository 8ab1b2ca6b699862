"""R16 to R20: a run that meets something that it cannot go on with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.official_faults import faults
from benchmarks.official_faults.report import Row
from benchmarks.official_faults.workplace import SAVED, Workplace

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BAD = "09.png"


def nonfinite(place: Workplace) -> Iterator[Row]:
    """NaN loss from step 3 on: does it stop, and what is saved?"""
    flags = ("--max_train_steps", 6, "--checkpointing_steps", 6)
    ended = place.run(*flags, faults=[faults.nan_from(3)])
    pipeline, total = _nonfinite(ended.folder / WEIGHTS)
    checkpoint, _ = _nonfinite(ended.folder / "checkpoint-6" / WEIGHTS)
    yield Row(
        "R16",
        nonfinite.__doc__ or "",
        f"exit {ended.status} after {len(ended.all('step'))} of 6 steps; {pipeline} of {total} "
        f"UNet tensors of the saved pipeline are not finite, {checkpoint} of the checkpoint's",
        "--max_train_steps 6 --checkpointing_steps 6; loss made NaN from step 3 on",
        {"status": ended.status, "nonfinite": pipeline, "tensors": total},
    )


def bad_image(place: Workplace) -> Iterator[Row]:
    """One truncated image: is it found before training, and is it named?"""
    images = place.root / "truncated"
    shutil.copytree(place.bench.images, images)
    content = (images / BAD).read_bytes()
    (images / BAD).write_bytes(content[: len(content) // 2])
    ended = place.run("--train_data_dir", images, "--max_train_steps", 20)
    steps, named = len(ended.all("step")), BAD in ended.output
    yield Row(
        "R18",
        bad_image.__doc__ or "",
        f"exit {ended.status} after {steps} steps, {ended.error!r}; the file is "
        f"{'named' if named else 'not named'}",
        f"--max_train_steps 20; {BAD} cut in half",
        {"status": ended.status, "steps": steps, "named": named},
    )


def sigterm(place: Workplace) -> Iterator[Row]:
    """SIGTERM after step 3: is a checkpoint written?"""
    flags = ("--max_train_steps", 20, "--checkpointing_steps", 5)
    ended = place.run(*flags, faults=[faults.sigterm_after(3)])
    yield Row(
        "R19",
        sigterm.__doc__ or "",
        f"{'yes' if ended.checkpoints else 'no'}, ended by signal {-(ended.status or 0)} with "
        f"{len(ended.all('step'))} steps lost",
        "--max_train_steps 20 --checkpointing_steps 5",
        {"status": ended.status, "checkpoints": ended.checkpoints},
    )


def disk_full(place: Workplace) -> Iterator[Row]:
    """The disk is full at a save: is the old checkpoint whole, and the new one no trap?"""
    old = place.whole.folder / f"checkpoint-{SAVED}"
    limit = max(file.stat().st_size for file in old.rglob("*") if file.is_file()) - 1
    more = ("--max_train_steps", 8, "--checkpointing_steps", 2)
    for rotation in ((), ("--checkpoints_total_limit", 1)):
        folder = place.saved()
        fault = faults.file_size_limit(limit)
        ended = place.resume(folder, *more, *rotation, faults=[fault])
        whole = (folder / old.name).exists() and _same(folder / old.name, old)
        latest = ("--resume_from_checkpoint", "latest", "--max_train_steps", 7)
        again = place.run(*latest, folder=folder)
        yield Row(
            "R20",
            disk_full.__doc__ or "",
            f"exit {ended.status}, {ended.error!r}; the old checkpoint is "
            f"{'whole' if whole else 'gone'}; left: {', '.join(ended.checkpoints)}; `latest` then: "
            f"exit {again.status}" + (f", {again.error!r}" if again.error else ""),
            " ".join(map(str, (*more, *rotation))) + "; RLIMIT_FSIZE below the optimizer's size",
            {
                "status": ended.status,
                "old_whole": whole,
                "left": ended.checkpoints,
                "status_of_latest": again.status,
            },
        )


MEASURES = {"R16": nonfinite, "R18": bad_image, "R19": sigterm, "R20": disk_full}


def _nonfinite(file: Path) -> tuple[int, int]:
    """How many tensors of a file have a value that is not finite, and how many there are."""
    tensors = load_file(file).values()
    return sum(not torch.isfinite(t).all() for t in tensors), len(tensors)


def _same(folder: Path, other: Path) -> bool:
    files = sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    return all(
        (folder / f).exists() and (folder / f).read_bytes() == (other / f).read_bytes()
        for f in files
    )
