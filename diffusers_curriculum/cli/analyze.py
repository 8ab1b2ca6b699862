"""`diffusers-curriculum analyze`: which noise levels are difficult, and what to try."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusers_curriculum.cli.preview import add_flags
from diffusers_curriculum.cli.reconstruct_ema import check_output
from diffusers_curriculum.cli.source import read_source
from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.flag import (
    BATCH,
    FROM_ZERO,
    LEVELS,
    POSITIVE,
    SEED,
    Bound,
    Family,
    Need,
    count,
    tracked,
)
from diffusers_curriculum.training.arguments.run import IMAGES, SOURCE

if TYPE_CHECKING:
    from diffusers_curriculum.analysis.difficulty import Difficulty
    from diffusers_curriculum.training.parts.analysed import Analysed

REPORT, NUMBERS, SUGGESTED = "report.html", "difficulty.json", "suggested"
_PICTURES = ("resolution", "image_interpolation_mode", "background")
_EVEN = Bound(
    "an even number of at least 4, or 0 for none", lambda x: not x or (x > 3 and not x % 2)
)
_TWO = Bound("at least 2", lambda x: x >= 2)
ANALYSIS = CommandLine(
    "What an analysis knows of a training command.",
    (
        SOURCE,
        Family("data", tuple(flag for flag in IMAGES.flags if flag.name in _PICTURES)),
        Family(
            "data",
            (
                tracked("caption_column", str, "text", "column with the captions"),
                tracked("label_column", str, "label", "column with the classes"),
            ),
            check_machine=lambda args: environment.check_data(args, "a folder of images"),
        ),
        Family.of(
            "analysis",
            tracked(
                "samples", int, 64, "samples that networks are probed with", bound=_TWO, most=BATCH
            ),
            tracked("bins", int, 24, "noise levels that are looked at", bound=_TWO, most=LEVELS),
            tracked("clusters", int, 5, "clusters of suggested curricula", bound=_TWO, most=LEVELS),
            tracked(
                "gradient_samples",
                int,
                16,
                "samples of gradients, 0: none",
                bound=_EVEN,
                most=BATCH,
            ),
            count("most_checkpoints", 6, "checkpoints of a run that are probed, evenly spread"),
            tracked(
                "raw_weights",
                help="probe the weights of checkpoints and not their averages, nor the pipeline",
            ),
            tracked(
                "convergence_steps",
                int,
                0,
                "train a new network for each cluster, and one for all, for so many steps",
                bound=FROM_ZERO,
            ),
            tracked(
                "convergence_rate",
                float,
                1e-3,
                "their learning rate (AdamW)",
                bound=POSITIVE,
                needs=(Need("--convergence_steps", lambda a: a.convergence_steps > 0),),
            ),
            count("batch_size", 16, "samples at a time", most=BATCH),
            tracked("seed", int, 0, "seed of samples and noise", bound=SEED),
            tracked("device", str, help="such as cuda (default: a GPU where there is one)"),
        ),
    ),
    changes={
        "resolution": {
            "default": None,
            "help": "side of the images (default: the network's, or 32)",
        },
        "max_train_samples": {
            "default": 1000,
            "help": "read that many samples, chosen by the seed",
        },
        "train_split": {"help": "split to read (default: train; all of a --train_data_dir)"},
    },
)


class Found(NamedTuple):
    """What SOURCE is: a scheduler, and the folder of a pipeline or a finished run."""

    scheduler: Any
    folder: Path | None


def add_analyze(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "analyze",
        help="measure which noise levels are difficult, and suggest laws and clusters",
        description="Measure how difficult each noise level is, for a data set and for a network"
        " that learns it: relative entropy, errors, information, gradients, progress between"
        " checkpoints, convergence of clusters. Writes a report as one HTML file, all numbers as"
        " JSON, and configs of samplers to try with --timestep_sampler_config.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="pipeline folder, --output_dir of a finished run (its checkpoints are compared), or a"
        " scheduler's folder or config file (the data alone)",
    )
    add("--output_dir", required=True, help="where the report is written; a new folder")
    add_flags(parser, ANALYSIS)
    parser.set_defaults(handler=_analyze)


def _analyze(args: argparse.Namespace) -> tuple[str, int]:
    """Check, load, measure, write; imported late so that `--help` need not wait."""
    from diffusers_curriculum.training.parts.analysed import load_analysed
    from diffusers_curriculum.training.parts.study import measure

    own = ANALYSIS.parse([word for flag in args.training_flags for word in flag])
    output, found = Path(args.output_dir).resolve(), find_source(args.source)
    check_output(output, [])
    check_useful(own, found)
    _check_gradients(own)
    device = device_of(own.device)
    analysed = load_analysed(own, found.folder, found.scheduler, device)
    difficulty = measure(own, analysed)
    _write(args, own, analysed, difficulty, output)
    first = difficulty.suggestions[0]
    return (
        f"{output / REPORT}: {len(difficulty.probes)} networks on {own.samples} samples at"
        f" {len(difficulty.data.grid.indices)} noise levels\nto try first, {first.reason}:"
        f"\n--timestep_sampler_config {_config(output, first.name)}"
    ), 0


def find_source(name: str) -> Found:
    """The scheduler and, of a pipeline or run, the folder."""
    from diffusers_curriculum.training.storage.folders import checkpoints

    folder = Path(name).expanduser()
    whole = (folder / "model_index.json").is_file()
    if (folder / "pytorch_lora_weights.safetensors").is_file() and not whole:
        raise ValueError(
            f"{name} holds an adapter, and no network: load it into its pipeline by diffusers, "
            "call pipeline.fuse_lora() and pipeline.unload_lora_weights(), and give the pipeline "
            "that pipeline.save_pretrained() leaves."
        )
    if not whole and checkpoints(folder):
        raise ValueError(
            f"{name} is a run that has not finished: it has checkpoints, and no pipeline yet. Let "
            "it finish, or give the pipeline that it started from."
        )
    source = read_source(name)
    if source.training is None:
        raise ValueError(
            f"{name} has a sampler's config and no scheduler: give the scheduler or pipeline whose "
            "noise levels it draws."
        )
    return Found(source.training, folder if whole else None)


def check_useful(own: Any, found: Found, *more: str) -> None:
    """Refuse what has no effect on a scheduler alone, ``more`` besides what an analysis has."""
    flags = {"samples", "gradient_samples", "most_checkpoints", "raw_weights", *more}
    flags |= {"convergence_steps", "batch_size"}
    useless = sorted(flags & own.given)
    if found.folder is None and useless:
        raise ValueError(
            f"--{useless[0]} is {own[useless[0]]}, which has no effect on a scheduler alone: give "
            "a pipeline as SOURCE, or drop it."
        )
    if found.folder is None:
        own.samples = 0


def _check_gradients(own: Any) -> None:
    """Even numbers of samples, no more than are probed."""
    even = own.samples - own.samples % 2
    if "gradient_samples" in own.given and own.gradient_samples > even:
        raise ValueError(
            f"--gradient_samples is {own.gradient_samples}, and --samples {own.samples}: give at "
            f"most {even}."
        )
    own.gradient_samples = min(own.gradient_samples, even)


def device_of(name: str | None) -> Any:
    """The device of that name, by default a GPU where there is one; ValueError for none here."""
    import torch

    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--device is {wanted!r}: there is no such device here ({first})."
        ) from None


# -- writing ---------------------------------------------------------------------------------------


def _config(output: Path, name: str) -> str:
    return str(output / SUGGESTED / name / "timestep_sampler_config.json")


def _write(
    args: argparse.Namespace, own: Any, analysed: Analysed, difficulty: Difficulty, output: Path
) -> None:
    """Suggestions and numbers first, the report last."""
    from diffusers_curriculum.analysis.report import render
    from diffusers_curriculum.training.storage.files import write_atomically

    output.mkdir(parents=True, exist_ok=True)
    suggestions = difficulty.suggestions
    files = {each.name: str(each.save(output / SUGGESTED)) for each in suggestions}
    words = [f"--{name} {shlex.quote(str(own[name]))}" for name in sorted(own.given)]
    command = " ".join(["diffusers-curriculum analyze", shlex.quote(args.source), *words])
    levels = difficulty.data.grid.levels
    kind = type(analysed.scheduler).__name__
    facts = {
        "command": f"{command} --output_dir {shlex.quote(args.output_dir)}",
        "noise levels": f"{len(levels)} of {kind} ({levels.family}), {levels.prediction_type}",
        "networks": ", ".join(difficulty.probes) or "none: the data alone",
        "versions": ", ".join(f"{name} {number}" for name, number in _versions().items()),
    }
    numbers = {"command": facts["command"], "versions": _versions()} | difficulty.to_json()
    text = json.dumps(numbers, indent=1, allow_nan=False)
    write_atomically(output / NUMBERS, text + "\n")
    write_atomically(output / REPORT, render(difficulty, facts, files, _notes(own, difficulty)))


def _versions() -> dict[str, str]:
    import diffusers
    import torch

    from diffusers_curriculum import __version__

    own = {"diffusers-curriculum": __version__, "python": platform.python_version()}
    return own | {"torch": torch.__version__, "diffusers": diffusers.__version__}


def _notes(own: Any, difficulty: Difficulty) -> list[str]:
    """What the reader of this very report should know."""
    data, notes = difficulty.data, []
    if data.samples < 4 * data.dimension:
        notes.append(
            f"{data.samples} samples do not tell the covariance of {data.dimension} numbers: "
            "“Gaussian” and “linear” use the variance of each number alone."
        )
    if difficulty.probes:
        notes.append(
            f"The networks were probed with {own.samples} samples of the data given. Give data "
            "that they were not trained on to see what they know, and not what they remember."
        )
    return notes
