"""Flags of aspect-ratio buckets, named as in diffusers' newer scripts."""

from __future__ import annotations

from typing import Any

from diffusers_curriculum.training.arguments.flag import SIDE, Family, Need, tracked
from diffusers_curriculum.training.errors import UsageError

_BUCKETED = Need("--use_aspect_ratio_buckets", lambda a: a.use_aspect_ratio_buckets)
_UNBUCKETED = {
    "streaming": "the sizes of all images must be known",
    "data_config": "batches of a bucket would mix the repeats of sources",
    "with_prior_preservation": "class images are squares",
    "mask_column": "masks are cut to squares",
    "mask_from_alpha": "masks are cut to squares",
}


def _sizes(flag: str, value: Any) -> tuple[tuple[int, int], ...] | None:
    """(height, width) of each bucket, of "H,W;H,W"."""
    if value is None:
        return None
    try:
        found = [tuple(map(int, size.split(","))) for size in value.strip(" ;").split(";")]
    except ValueError:
        found = []
    if not found or not all(
        len(size) == 2 and 1 <= min(size) <= max(size) <= SIDE for size in found
    ):
        raise UsageError(
            f"{flag} is {value!r}: give heights and widths in pixels, up to {SIDE}, such as "
            "'512,512;448,576;576,448'."
        )
    return tuple((height, width) for height, width in found)


def _check_buckets(args: Any) -> None:
    """Refuse what does not go with batches of one bucket."""
    if not args.use_aspect_ratio_buckets:
        return
    if args.compile != "none":
        raise UsageError(
            f"--compile {args.compile} makes graphs for one size of images, and "
            "--use_aspect_ratio_buckets has many: drop one of the two."
        )
    for name, why in _UNBUCKETED.items():
        if args[name]:
            raise UsageError(
                f"--{name} does not go with --use_aspect_ratio_buckets, as {why}: drop one of the "
                "two."
            )


BUCKETS = Family.of(
    "data",
    tracked(
        "use_aspect_ratio_buckets",
        help="cut images of like form to one size, and fill each batch with one size, in the place "
        "of squares",
    ),
    tracked(
        "aspect_ratio_buckets",
        str,
        help="these sizes, as 'height,width;height,width' (default: about --resolution squared "
        "pixels, up to 2:1)",
        metavar="SIZES",
        convert=_sizes,
        needs=(_BUCKETED,),
    ),
    check=_check_buckets,
)
