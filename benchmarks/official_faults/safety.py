"""R22, R23 and R28: secrets, uploads, and wrong invocations."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.official_faults import faults
from benchmarks.official_faults.report import Row
from benchmarks.official_faults.trial import LOADED
from benchmarks.official_faults.workplace import Outcome, Workplace
from tests.scripts.small_runs import write_images

TOKEN = "hf_" + "OfficialFaults" * 3
PUSH = ("--push_to_hub", "--hub_model_id", "faults", "--hub_token", TOKEN)
PROMPTS = ("--validation_prompts", "a picture")
NOTES = "my-notes.txt"

# What is wrong; {names} are places made by ``_places``. None of it needs a GPU or a package.
WRONG: dict[str, tuple[object, ...]] = {
    "wrong image column": ("--image_column", "picture"),
    "wrong caption column": ("--caption_column", "caption"),
    "missing folder of images": ("--train_data_dir", "/nowhere/pictures"),
    "empty folder of images": ("--train_data_dir", "{empty}"),
    "a missing caption": ("--train_data_dir", "{uncaptioned}"),
    "no such pipeline": ("--pretrained_model_name_or_path", "/nowhere/sd"),
    "missing checkpoint": ("--resume_from_checkpoint", "checkpoint-7"),
    "unknown tracker": ("--report_to", "tensorbord"),
    "unknown lr scheduler": ("--lr_scheduler", "cosinus"),
    "unknown prediction type": ("--prediction_type", "score"),
    "zero steps": ("--max_train_steps", 0),
    "no batch": ("--train_batch_size", 0),
    "an image of no size": ("--resolution", -8),
    "NaN for a rate": ("--learning_rate", "nan"),
    "output is a file": ("--output_dir", "{file}"),
    "a mistyped flag": ("--lr_shedule", "cosine"),
}


def secrets(place: Workplace) -> Iterator[Row]:
    """TensorBoard and --hub_token: how many files hold the token?"""
    ended = place.run("--max_train_steps", 1, "--report_to", "tensorboard", "--hub_token", TOKEN)
    holding = _holding(ended.folder)
    yield Row(
        "R22",
        secrets.__doc__ or "",
        f"{len(holding)}: {', '.join(map(_kind, holding))}",
        "--max_train_steps 1 --report_to tensorboard --hub_token TOKEN",
        {"status": ended.status, "files": len(holding)},
    )


def uploads(place: Workplace) -> Iterator[Row]:
    """--push_to_hub: which files leave?"""
    for name, installed, prompts in (
        ("without wandb", (), PROMPTS),
        ("with wandb, without prompts", (faults.wandb_installed,), ()),
    ):
        ended = place.run(
            "--max_train_steps",
            1,
            *PUSH,
            *prompts,
            faults=[*installed, faults.hub(place.root / "unused")],
        )
        yield Row(
            "R23",
            f"Does --push_to_hub end well {name}?",
            f"{'yes' if not ended.status else 'no'}: exit {ended.status}"
            + (f" after training, {ended.error!r}" if ended.error else ""),
            f"--max_train_steps 1 --push_to_hub {' '.join(prompts)}".strip(),
            {"status": ended.status, "sent": (place.root / "unused").exists()},
        )
    yield _sent(place)


def wrong_invocations(place: Workplace) -> Iterator[Row]:
    """Wrong invocations: refused, how soon, and before a model is loaded?"""
    places = _places(place.root)
    ends = {}
    for name, flags in WRONG.items():
        filled = [places.get(str(flag)[1:-1], flag) for flag in flags]
        ends[name] = place.run("--max_train_steps", 20, *filled)
    accepted = [name for name, end in ends.items() if end.status == 0]
    early = [name for name, end in ends.items() if end.status and not _loaded(end)]
    usage = [name for name, end in ends.items() if end.status == 2]
    seconds = {name: end.seconds for name, end in ends.items() if end.status}
    yield Row(
        "R28",
        wrong_invocations.__doc__ or "",
        f"{len(seconds)} of {len(ends)} refused, {len(early)} before a model was loaded, "
        f"{len(usage)} with status 2; {statistics.median(seconds.values()):.1f} s in the median, "
        f"{max(seconds.values()):.1f} s at most after the imports; accepted with exit 0: "
        f"{', '.join(accepted) or 'none'}",
        "--max_train_steps 20 and one mistake",
        {
            name: {
                "flags": _flags(name),
                "status": end.status,
                "seconds": end.seconds,
                "models_loaded": _loaded(end),
                "steps": len(end.all("step")),
                "error": end.error,
            }
            for name, end in ends.items()
        },
    )


MEASURES = {"R22": secrets, "R23": uploads, "R28": wrong_invocations}


def _sent(place: Workplace) -> Row:
    folder, told = place.folder(), place.root / "sent"
    folder.mkdir()
    (folder / NOTES).write_text("not for others")
    flags = ("--max_train_steps", 2, "--checkpointing_steps", 2, *PUSH, *PROMPTS)
    ended = place.run(*flags, folder=folder, faults=[faults.wandb_installed, faults.hub(told)])
    if not told.exists():
        raise RuntimeError(f"nothing was sent: exit {ended.status}, {ended.error}")
    names = told.read_text().splitlines()
    states = [name for name in names if name.startswith("checkpoint-")]
    tokens = {str(file.relative_to(folder)) for file in _holding(folder)} & set(names)
    everything = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    return Row(
        "R23",
        uploads.__doc__ or "",
        f"{len(names)} of {len(everything)} files of the folder: {len(states)} of the checkpoint, "
        f"{len(tokens)} with the token, {'also' if NOTES in names else 'not'} a foreign text file",
        "--max_train_steps 2 --checkpointing_steps 2 --push_to_hub --hub_token TOKEN "
        "--validation_prompts 'a picture'; wandb replaced by an empty module, the Hub by a list",
        {
            "status": ended.status,
            "sent": len(names),
            "of": len(everything),
            "checkpoint_files": len(states),
            "with_token": len(tokens),
            "foreign": NOTES in names,
        },
    )


def _holding(folder: Path) -> list[Path]:
    """The files below ``folder`` whose bytes hold the token."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [file for file in files if TOKEN.encode() in file.read_bytes()]


def _kind(file: Path) -> str:
    """A name without the time and the machine that TensorBoard puts into its own."""
    return "a TensorBoard event file" if file.name.startswith("events.") else file.name


def _flags(name: str) -> str:
    return " ".join(map(str, WRONG[name]))


def _loaded(run: Outcome) -> int:
    return sum(len(run.all(model.__name__)) for model in LOADED)


def _places(root: Path) -> dict[str, Path]:
    """Folders and files in which something is wrong."""
    (root / "empty").mkdir()
    (root / "file").write_text("no folder")
    images = write_images(root / "uncaptioned", 8)
    metadata = images / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows[3]["text"] = None
    metadata.write_text("\n".join(map(json.dumps, rows)))
    return {name: root / name for name in ("empty", "file", "uncaptioned")}
