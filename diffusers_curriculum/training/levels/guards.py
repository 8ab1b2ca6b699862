"""What to think over before a law learns while the model trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers_curriculum.samplers import TimestepSampler
from diffusers_curriculum.training.arguments.command_line import Arguments

WARM_UP_SHARE = 0.2  # of a run, for the information rate: an untrained network has none to tell


def learning_warnings(args: Arguments, sampler: TimestepSampler, steps: int) -> Iterator[str]:
    """The warnings for a run of ``steps`` updates, one sentence each; none for a law that does not
    learn."""
    for part in sampler.walk():
        move_steps = part.config.get("move_steps")
        if move_steps is not None and move_steps >= steps:
            yield (
                f"{part.name()} moves over {move_steps} updates, and the run has {steps}: it does "
                "not arrive; --timestep_sampler_args move_steps=N or move_share=0.25 makes it "
                "faster."
            )
        warm_up = part.config.get("warm_up")
        if warm_up is None:
            continue
        name, least = part.name(), int(WARM_UP_SHARE * steps)
        if warm_up >= steps:
            yield (
                f"{name} learns after a warm-up of {warm_up} updates, and the run has {steps}: its "
                f"law is never used; --timestep_sampler_args warm_up={least} makes it shorter."
            )
        elif name == "information_rate":
            yield from _of_information_rate(args, part.config, least)


def _of_information_rate(args: Arguments, config: Any, least: int) -> Iterator[str]:
    """What those who train with InfoNoise (arXiv 2602.18647) report."""
    if config["warm_up"] < least:
        yield (
            f"information_rate follows the network after {config['warm_up']} updates: while it is "
            "untrained, its errors gather the mass at the clean end; "
            f"--timestep_sampler_args warm_up={least} gate=0.15 waits for a fifth of the run."
        )
    if args.loss_weighting != "none":
        yield (
            f"information_rate beside --loss_weighting {args.loss_weighting}: the law divides by "
            "the weight, so that the two work against each other; leave one of them out."
        )
