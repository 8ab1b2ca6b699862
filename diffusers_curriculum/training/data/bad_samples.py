"""Every sample is looked at before step 0; those that cannot be trained on stop the run or are
left out of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.run import POLICIES, SAMPLE_POLICIES
from diffusers_curriculum.training.data.checked_images import (
    read_checked,
    shared_file,
    write_checked,
)
from diffusers_curriculum.training.data.finding import BadSample, find_bad_samples
from diffusers_curriculum.training.data.masks import Masks
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.storage.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

CACHE_FILE = "checked_images.json"
SKIPPED_FILE = "skipped_samples.jsonl"
SKIPPED_HELD_OUT_FILE = "skipped_held_out.jsonl"
SAMPLED = 1000  # images that --bad_samples sample looks at
_SHOWN = 5  # samples in a message


def usable_images(
    args: Arguments,
    accelerator: Any,
    dataset: Dataset,
    *,
    source: str | None = None,
    skipped_file: str = SKIPPED_FILE,
    masks: Masks | None = None,
    **text_columns: str,
) -> Dataset:
    """:func:`usable_rows` as a command line asks for it; every process of a run calls it, with
    ``caption_column`` or ``label_column`` where there is one.

    Args:
        source: of the rows, where they are not what is trained on.
    """
    from accelerate.utils import gather_object

    own = args.dataset_name or args.train_data_dir or [each.place for each in args.sources]
    place = str(source or own)
    return usable_rows(
        dataset,
        args.image_column,
        **text_columns,
        masks=masks,
        policy=args.bad_samples,
        limit=args.bad_samples_limit,
        output_dir=args.output_dir,
        resolution=args.resolution,
        cache=shared_file(args.cache_dir, place, args.resolution),
        skipped_file=skipped_file,
        progress=accelerator.is_local_main_process,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        gather=gather_object,
    )


def usable_held_out(
    args: Arguments, accelerator: Any, dataset: Dataset, **text_columns: str
) -> Dataset:
    """:func:`usable_images` of those that are kept apart."""
    source, skipped = args.validation_data_dir, SKIPPED_HELD_OUT_FILE
    named = {"source": source, "skipped_file": skipped, **text_columns}
    return usable_images(args, accelerator, dataset, **named)


def usable_rows(
    dataset: Dataset,
    image_column: str = "image",
    caption_column: str | None = None,
    *,
    label_column: str | None = None,
    masks: Masks | None = None,
    policy: str = "raise",
    limit: float = 0.01,
    output_dir: str | Path,
    resolution: int = 512,
    cache: str | Path | None = None,
    skipped_file: str = SKIPPED_FILE,
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> Dataset:
    """Look at every sample, each process at its share, and return those to train on, in order.

    All return the same rows or raise; what was skipped stands in ``skipped_file``, as JSON lines.

    Args:
        dataset: rows with the image column undecoded, as `load_images` returns them.
        caption_column, label_column, masks: looked at where they are not None.
        policy: "raise" refuses any bad sample, "skip" leaves them out; "sample" and "off" refuse,
            and look at the captions or classes of all rows, but at `SAMPLED` images or at none.
        limit: largest share of bad samples that may be skipped, in [0, 1].
        resolution: of training, in pixels; an image that resizing takes over PIL's limit is bad.
        cache: file that remembers good images; None is ``output_dir/checked_images.json``.
        gather: joins the lists of all processes, such as ``accelerate.utils.gather_object``.

    Raises:
        UsageError: one message that lists every bad sample, where there are more than allowed; an
            unknown policy; no sample left; the list of skipped samples cannot be written.
    """
    path, total = Path(cache or Path(output_dir, CACHE_FILE)), len(dataset)
    looked_at, known = _looked_at(policy, total), read_checked(path, resolution)
    found = find_bad_samples(
        dataset,
        image_column,
        caption_column,
        label_column=label_column,
        masks=masks,
        resolution=resolution,
        rows=range(total * rank // world_size, total * (rank + 1) // world_size),
        looked_at=looked_at,
        known=known,
        progress=progress,
    )
    fresh, odd = gather(found.fresh), gather(found.odd)
    bad = sorted(gather(found.bad), key=lambda sample: sample.row)
    if rank == 0 and fresh:
        write_checked(path, known, fresh)
    refuse_bad_samples(bad, total, policy=policy, limit=limit, listed=rank == 0)
    if rank == 0:
        _log_skipped(bad, total, Path(output_dir, skipped_file))
        _log_look(odd, policy, len(looked_at), total)
    unusable = {sample.row for sample in bad}
    return dataset.select([r for r in range(total) if r not in unusable]) if bad else dataset


def _looked_at(policy: str, total: int) -> range | frozenset[int]:
    """Rows whose images are decoded; a sample of them is the same for every run."""
    if policy not in SAMPLE_POLICIES:
        raise UsageError(f"--bad_samples is {policy!r}: choose from {', '.join(SAMPLE_POLICIES)}.")
    if policy in POLICIES or (policy == "sample" and total <= SAMPLED):
        return range(total)
    count = SAMPLED if policy == "sample" else 0
    draw = host_generator(0, purpose="checked_samples")
    return frozenset(draw.choice(total, count, replace=False).tolist())


def refuse_bad_samples(
    bad: Sequence[BadSample],
    total: int,
    *,
    policy: str = "raise",
    limit: float = 0.01,
    listed: bool = True,
) -> None:
    """Raise UsageError if there are more bad samples among ``total`` than the policy allows, or no
    good ones; it lists each on a line where ``listed``: one process of several is enough."""
    # A quotient, not limit * total: 0.29 * 100 is less than 29.
    allowed = policy == "skip" and len(bad) < total and len(bad) / total <= limit
    if not bad or allowed:
        return
    head = f"{len(bad)} of {total} samples cannot be used"
    if policy != "skip":
        head += "; repair or remove them, or leave them out with --bad_samples skip"
    elif len(bad) < total:
        head += f", more than --bad_samples_limit {limit:g} allows; repair or remove them"
    names = [f"  {sample}" for sample in bad] if listed else ["  (listed by the first process)"]
    raise UsageError("\n".join([f"{head}:", *names]))


def _log_look(odd: Sequence[BadSample], policy: str, looked_at: int, total: int) -> None:
    """Log what is odd without being bad, and where not every image was looked at."""
    if odd:
        told = "; ".join(map(str, odd[:_SHOWN])) + ("; ..." if len(odd) > _SHOWN else "")
        logger.warning("%d images are trained on as they are stored: %s", len(odd), told)
    if looked_at < total:
        text = "%d of %d images were looked at (--bad_samples %s); another that cannot be read "
        logger.info(text + "ends the run when its turn comes.", looked_at, total, policy)


def _log_skipped(bad: Sequence[BadSample], total: int, path: Path) -> None:
    """Write the list of skipped samples, or remove one that no longer holds."""
    told = ({"path": sample.path, "row": sample.row, "reason": sample.reason} for sample in bad)
    try:
        if bad:
            write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in told))
            logger.warning("%d of %d samples are left out; see %s.", len(bad), total, path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"the list of skipped samples cannot be written ({error}): free some space, or choose "
            "another --output_dir."
        ) from error
