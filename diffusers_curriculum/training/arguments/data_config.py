"""--data_config: where the images of a run come from, if from several sources, as a file.

Each row holds flags for one source, by their names, and what it leaves out is that of the command
line.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers_curriculum.training.arguments.flag import Bound, Flag, place
from diffusers_curriculum.training.arguments.laws import is_file
from diffusers_curriculum.training.arguments.validation import held_out_share
from diffusers_curriculum.training.errors import UsageError

_PLACES = ("dataset_name", "train_data_dir")
_OF_A_DATA_SET = ("dataset_name", "dataset_config_name", "train_data_dir", "train_split")
_FLAGS = (*_OF_A_DATA_SET, "image_column", "caption_column", "instance_prompt", "max_train_samples")
_LAW = ("timestep_sampler", "timestep_sampler_args")
REPEATS = Flag(
    "repeats", float, 1.0, bound=Bound("above 0 and at most 10,000", lambda x: 0 < x <= 10_000)
)
DATA_CONFIG = place(
    "data_config",
    help="JSON or YAML file of several sources of images, each with a number of repeats and, if "
    "wanted, a --timestep_sampler of its own (docs/data.md)",
    metavar="FILE",
)


@dataclass(frozen=True)
class Source:
    """A row of the file.

    Attributes:
        where: what messages call it.
        flags: values of flags that hold for it, by their names.
        repeats: how many times each of its images is seen in an epoch.
    """

    where: str
    flags: Mapping[str, Any]
    repeats: float

    @property
    def place(self) -> str:
        """The name or the folder of its images."""
        return str(self.flags.get("dataset_name") or self.flags.get("train_data_dir"))

    @property
    def has_law(self) -> bool:
        """Whether its noise levels are drawn by a law of its own."""
        return "timestep_sampler" in self.flags

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let a UsageError tell which row it is of."""
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{self.where}: {error}") from error

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed run is compared with, beside the samples; a folder may be moved."""
        flags = {name: self.flags.get(name) for name in _OF_A_DATA_SET[:2]}
        return flags | {"repeats": self.repeats}

    def put(self, args: Any) -> Any:
        """The arguments of a run on it alone."""
        own = copy.copy(args)
        flags = dict(self.flags)
        if "caption_column" in flags:
            flags = {"instance_prompt": None} | flags
        if self.has_law:
            flags = {"timestep_sampler_args": {}} | flags
        for name, value in flags.items():
            setattr(own, name, value)
        return own


def settle_sources(args: Any) -> None:
    """Read the file, if there is one."""
    if args.data_config is None:
        return
    rows = _read(args.data_config)
    declared = {flag.name: flag for flag in args.flags if flag.name in (*_FLAGS, *_LAW)}
    declared["repeats"] = REPEATS
    args.sources = tuple(
        _source(f"--data_config {args.data_config}, row {number}", row, declared)
        for number, row in enumerate(rows, 1)
    )


def check_sources(args: Any) -> None:
    """Refuse flags beside the file that say where images come from."""
    given = [name for name in _PLACES if args[name] is not None]
    if args.sources and given:
        name = given[0]
        raise UsageError(
            f"--data_config {args.data_config} and --{name} {args[name]} both name the images: "
            "drop one of the two, or put that into a row of the file."
        )
    if args.sources and args.streaming:
        raise UsageError(
            "--streaming reads the shards of one data set one after the other, and --data_config "
            f"{args.data_config} mixes several: drop one of the two."
        )
    if args.sources and args.max_train_samples is not None:
        raise UsageError(
            f"--max_train_samples {args.max_train_samples} beside --data_config does not say of "
            "which source: put max_train_samples into its rows."
        )
    if args.sources and all(source.has_law for source in args.sources):
        _check_law_of_run(args)
    split = args.validation_split
    if args.sources and split is not None and held_out_share(split) is None:
        raise UsageError(
            f"--validation_split {split} names a split, and --data_config several sources: give a "
            "share of all their samples, such as 0.05, or --validation_data_dir."
        )


def _check_law_of_run(args: Any) -> None:
    """Refuse a law of the run that nothing is drawn from."""
    flags = "timestep_sampler", "timestep_sampler_config", "timestep_bias_strategy", "curriculum"
    given = [name for name in flags if name in args.given - args.by_recipe]
    if given and not args.with_prior_preservation:
        raise UsageError(
            f"--{given[0]} {args[given[0]]} has no effect, as each row of --data_config "
            f"{args.data_config} has a timestep_sampler: leave it out of one of them, or drop "
            f"--{given[0]}."
        )


def _read(name: str) -> list[Any]:
    """The rows of a file."""
    from diffusers_curriculum.training.arguments.documents import read_document  # few ask for it

    rows = read_document("--data_config", name)
    if not isinstance(rows, list) or not rows:
        kind = "no rows" if rows in ([], None) else f"one {type(rows).__name__}"
        raise UsageError(
            f"--data_config {name} holds {kind}: give a list with one row for each source, such as "
            '[{"train_data_dir": "cats", "repeats": 2}, {"train_data_dir": "dogs"}].'
        )
    return rows


def _source(where: str, row: Any, declared: Mapping[str, Flag]) -> Source:
    """A row that was checked."""
    known = ", ".join(declared)
    if not isinstance(row, dict):
        raise UsageError(f"{where} is {row!r}: give names and values, of {known}.")
    unknown = [name for name in row if name not in declared]
    if unknown:
        raise UsageError(f"{where} has {unknown[0]!r}, which no row can have: choose from {known}.")
    found = {name: _value(where, declared[name], value) for name, value in row.items()}
    repeats, missing = float(found.pop("repeats", 1)), None
    if not found.keys() & {*_PLACES}:
        missing = f"{where} does not say where its images are: give dataset_name or train_data_dir."
    elif "dataset_config_name" in found and "dataset_name" not in found:
        missing = f"{where} has dataset_config_name, which has no effect without dataset_name."
    elif "instance_prompt" in found and "caption_column" in found:
        missing = f"{where} has instance_prompt and caption_column: drop one of the two."
    elif found.get("timestep_sampler_args") and not _takes_parameters(found):
        missing = (
            f"{where} has timestep_sampler_args, which has no effect without a timestep_sampler "
            "in the same row other than uniform and a file."
        )
    if missing:
        raise UsageError(missing)
    return Source(where, found, repeats)


def _value(where: str, flag: Flag, value: Any) -> Any:
    """A value of a row as the flag of that name would give it."""
    checked = flag.from_file(where, value)
    return checked if flag.convert is None else flag.convert(f"{where}: {flag.name}", checked)


def _takes_parameters(row: Mapping[str, Any]) -> bool:
    name = row.get("timestep_sampler", "uniform")
    return name != "uniform" and not is_file(name)
