"""Flags of shards that are read where they lie."""

from __future__ import annotations

from typing import Any

from diffusers_curriculum.training.arguments.flag import Need, count, tracked

STREAMING = tracked(
    "streaming",
    help="read tar shards (WebDataset) or Parquet where they lie, on the Hub or here: a data set, "
    "a folder, or a pattern of files as --dataset_name",
)
SHUFFLE_BUFFER = count(
    "shuffle_buffer",
    1000,
    "samples that are shuffled among one another, of shards in random order",
    setting="dataset",
    needs=(Need("--streaming", lambda a: a.streaming),),
)


def settle_looks(args: Any) -> None:
    """What is streamed is not read before it is trained on, unless that is asked for."""
    if args.streaming and "bad_samples" not in args.given:
        args.bad_samples = "off"
