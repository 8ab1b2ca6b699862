"""`diffusers-curriculum preview`: what a training command would train on, before it is run."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_curriculum.cli.recipe import CHANGES, RECIPES, check_recipe, settle_recipe
from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.curriculum import CURRICULUM, PACING
from diffusers_curriculum.training.arguments.flag import LEVELS, Family, count
from diffusers_curriculum.training.arguments.imports import IMPORT, import_modules
from diffusers_curriculum.training.arguments.noise_levels import PREDICTION, TIMESTEPS
from diffusers_curriculum.training.arguments.run import RUN

if TYPE_CHECKING:
    from diffusers_curriculum.analysis.preview import Preview
    from diffusers_curriculum.cli.source import Source
    from diffusers_curriculum.samplers import TimestepSampler

ENDINGS = (".png", ".svg", ".json")
_SAMPLING = (TIMESTEPS, CURRICULUM, PACING)
_LENGTH = Family("training", tuple(flag for flag in RUN.flags if flag.name == "max_train_steps"))
TRAINING = CommandLine(
    "What a preview knows of a training command.",
    (_LENGTH, *RECIPES, PREDICTION, *_SAMPLING),
    changes=CHANGES,
)
INFERENCE_STEPS = count(
    "inference_steps", 50, "sampling steps to check (default %(default)s)", most=LEVELS
)
# What the uniform sampler, which is its own reference, has no use for.
_NOT_FOR_UNIFORM = ("--timestep_floor", "--importance_correction")


class _Forward(argparse.Action):
    """Keeps a flag of the training script as it was typed, for that script's own parser."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        words = values if isinstance(values, list) else [values]
        flags = [*namespace.training_flags, (self.option_strings[0], *map(str, words))]
        namespace.training_flags = flags


def add_preview(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand, with the training script's own flags."""
    parser = commands.add_parser(
        "preview",
        help="show which noise levels a training command would train on",
        description="Show which noise levels would be trained on: density over log-SNR and over"
        " timesteps, the same times the loss weight, the share of each cluster, the stages of a"
        " curriculum, quantiles, and what to think over. No model is loaded.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="pipeline folder, scheduler folder or config file, timestep_sampler_config.json, or"
        " pipeline on the Hub",
    )
    add("--output", metavar="FILE", help=f"write a picture or numbers: {', '.join(ENDINGS)}")
    add(
        "--compare",
        nargs="+",
        metavar="SAMPLER",
        help="overlay several: NAME, NAME:key=value,key=value or a timestep_sampler_config.json",
    )
    IMPORT.add_to(parser)
    INFERENCE_STEPS.add_to(parser)
    add_flags(parser, TRAINING)
    parser.set_defaults(handler=_preview)


def add_flags(parser: argparse.ArgumentParser, command_line: CommandLine) -> None:
    """Declare the flags of a command line, whose own parser has types, choices and checks: what is
    given is kept as it was typed, in ``training_flags``."""
    parser.set_defaults(training_flags=[])
    for family in command_line.families:
        group = parser.add_argument_group(family.title)
        for flag in family.flags:
            group.add_argument(
                f"--{flag.name}",
                action=_Forward,
                nargs=0 if flag.type is None else flag.nargs,
                metavar=flag.metavar or ("|".join(flag.choices) if flag.choices else None),
                help=flag.help,
            )


def _preview(args: argparse.Namespace) -> tuple[str, int]:
    """Answer with text, or write the file; imported late so that `--help` need not wait."""
    from diffusers_curriculum.analysis.terminal import TERMINAL, show
    from diffusers_curriculum.cli.source import read_source

    import_modules("--import", args.imports)
    output = _checked_output(args.output)
    INFERENCE_STEPS.check(args.inference_steps)
    source = read_source(args.source)
    by_recipe = [flag for flag in args.training_flags if flag[0] in ("--recipe", "--resolution")]
    check_recipe(_parsed(by_recipe), args.source, source.training)
    if args.compare:
        return _compare(args, source, output), 0
    return show(_one(args, source, args.training_flags), str(output or TERMINAL)), 0


def _one(args: argparse.Namespace, source: Source, flags: Sequence[Sequence[str]]) -> Preview:
    """The preview for one set of training flags; a sampler's config stands for them."""
    from diffusers_curriculum.samplers import TimestepSampler
    from diffusers_curriculum.training.levels import timesteps

    own = _parsed(flags, source.training)
    if own.data_scale == "auto":
        raise ValueError("--data_scale auto is measured by a run: give the number to see the law.")
    made = _sampler_flags() & {f"--{own.flag(name)}" for name in own.given}
    if source.sampler is None or (made and source.training is not None):
        return _shown(args, source, own, timesteps.build_sampler(own, source.training, 0))
    if made:
        by_hand = made & {flag[0] for flag in flags}
        told = min(by_hand) if by_hand else f"--recipe {own.recipe}"
        raise ValueError(
            f"{args.source} says which sampler it is, so {told} has no effect: drop it, or give "
            "the scheduler instead."
        )
    return _shown(args, source, own, TimestepSampler.from_config(source.sampler))


def _shown(
    args: argparse.Namespace, source: Source, own: Arguments, sampler: TimestepSampler
) -> Preview:
    """The preview of a sampler with what else the training flags say."""
    from diffusers_curriculum.analysis.preview import make_preview
    from diffusers_curriculum.training.levels import timesteps

    weights = timesteps.build_loss_weights(own, timesteps.build_objective(own, sampler))
    return make_preview(
        sampler,
        weights,
        own.max_train_steps,
        inference=source.inference,
        inference_steps=args.inference_steps,
        refusal=timesteps.length_fault(own, sampler, own.max_train_steps),
        data_std=None if own.data_scale == 1 else own.data_scale,
    )


def _parsed(flags: Sequence[Sequence[str]], scheduler: Any = None) -> Arguments:
    """Training flags as the training script takes them."""
    words = [word for flag in flags for word in flag]
    return TRAINING.parse(words, partial(settle_recipe, scheduler=scheduler), machine=False)


def _compare(args: argparse.Namespace, source: Source, output: Path | None) -> str:
    """Several samplers under the same other flags."""
    from diffusers_curriculum.analysis.terminal import comparison_table

    given = [flag[0] for flag in args.training_flags if flag[0].startswith("--timestep_sampler")]
    if given:
        raise ValueError(f"{given[0]} and --compare both name a sampler: drop one of the two.")
    previews = {name: _compared(args, source, name) for name in args.compare}
    text = comparison_table(previews)
    if output is None:
        return text
    if output.suffix == ".json":
        numbers = {name: preview.to_json() for name, preview in previews.items()}
        output.write_text(json.dumps(numbers, allow_nan=False) + "\n", "utf-8")
    else:
        from diffusers_curriculum.analysis.plots import plot_comparison, save_figure

        save_figure(plot_comparison(previews), output)
    return f"{text}\n\n{output}: {len(previews)} samplers"


def _compared(args: argparse.Namespace, source: Source, name: str) -> Preview:
    """The preview of one name of --compare."""
    from diffusers_curriculum.cli.source import read_source
    from diffusers_curriculum.samplers import TimestepSampler

    if name.endswith(".json") or "/" in name:
        found = read_source(name)
        if found.sampler is None:
            raise ValueError(f"--compare {name}: this is no timestep_sampler_config.json.")
        other = [flag for flag in args.training_flags if flag[0] not in _sampler_flags()]
        own = _parsed(other, source.training)
        return _shown(args, source, own, TimestepSampler.from_config(found.sampler))
    if source.training is None:
        raise ValueError(f"--compare {name} needs a schedule: give the scheduler as SOURCE.")
    density, _, arguments = name.partition(":")
    useless = _NOT_FOR_UNIFORM if density == "uniform" else ()
    flags = [flag for flag in args.training_flags if flag[0] not in useless]
    flags.append(("--timestep_sampler", density))
    if arguments:
        flags.append(("--timestep_sampler_args", *re.split(r",(?=\w+=)", arguments)))
    return _one(args, source._replace(sampler=None), flags)


def _sampler_flags() -> set[str]:
    """The flags that say how noise levels are drawn, as opposed to weighted."""
    flags = [flag for family in _SAMPLING for flag in family.flags]
    return {f"--{flag.name}" for flag in flags if flag.setting != "loss_weighting"}


def _checked_output(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name)
    if path.suffix not in ENDINGS:
        raise ValueError(f"--output is {name}: the name must end in {', '.join(ENDINGS)}.")
    if not path.parent.is_dir():
        raise ValueError(f"--output is {name}: there is no folder {path.parent}. Create it first.")
    return path
