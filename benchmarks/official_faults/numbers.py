"""R2 to R5 and R9: do the numbers of a run survive a resumption and more processes?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, product
from typing import Any

from benchmarks.official_faults.report import Row
from benchmarks.official_faults.workplace import SAVED, STEPS, Outcome, Workplace

RESUMED = f"--max_train_steps {STEPS} --resume_from_checkpoint checkpoint-{SAVED}"
PARALLEL_STEPS = 50
EPOCH = 9  # steps: 18 images in batches of 2


def exact_resume(place: Workplace) -> Iterator[Row]:
    """Is resuming from the middle of an epoch exact?"""
    again = place.run("--max_train_steps", STEPS, "--checkpointing_steps", SAVED)
    resumed = _resumed(place)
    first = SAVED + 1
    bits = [run.losses[first] for run in (place.whole, again, resumed)]
    losses = [float.fromhex(loss) for loss in bits]
    same = sum(place.whole.losses[s] == resumed.losses[s] for s in range(first, STEPS + 1))
    yield Row(
        "R2",
        exact_resume.__doc__ or "",
        f"{'yes' if same == STEPS - SAVED else 'no'}: loss of step {first} is {losses[0]:.6f} "
        f"uninterrupted and {losses[2]:.6f} after resuming; {same} of {STEPS - SAVED} losses have "
        f"the same bits (two uninterrupted runs: {_equal(place.whole, again)} of {STEPS})",
        RESUMED,
        {"uninterrupted": bits[0], "uninterrupted_again": bits[1], "resumed": bits[2]},
    )


def consumption(place: Workplace) -> Iterator[Row]:
    """Is every sample of the interrupted epoch used once?"""
    whole, resumed = _samples(place.whole), _samples(_resumed(place))
    seen = Counter(chain(*whole[:SAVED], *resumed[: EPOCH - SAVED]))
    undisturbed = Counter(chain(*whole[:EPOCH]))
    twice, missed = sum(n > 1 for n in seen.values()), len(undisturbed.keys() - seen.keys())
    yield Row(
        "R3",
        consumption.__doc__ or "",
        f"{'no' if twice or missed else 'yes'}: in steps 1 to {EPOCH}, of {len(undisturbed)} "
        f"samples {twice} were used twice or more and {missed} not at all (uninterrupted: "
        f"{sum(n > 1 for n in undisturbed.values())} and 0)",
        RESUMED,
        {"twice": twice, "missed": missed, "samples": len(undisturbed)},
    )


def overshoot(place: Workplace) -> Iterator[Row]:
    """How many optimizer steps are made for --max_train_steps 10, resumed from 4?"""
    steps = len(_resumed(place).all("step"))
    done = place.resume(place.saved(), "--max_train_steps", SAVED).all("step")
    yield Row(
        "R4",
        overshoot.__doc__ or "",
        f"{SAVED} + {steps} = {SAVED + steps} ({len(place.whole.all('step'))} without an "
        f"interruption); a finished run of {SAVED}, resumed with --max_train_steps {SAVED}, makes "
        f"{len(done)} more",
        RESUMED,
        {
            "uninterrupted": len(place.whole.all("step")),
            "after_resuming": steps,
            "after_the_end": len(done),
        },
    )


def ranks_differ(place: Workplace) -> Iterator[Row]:
    """Do two processes with --seed draw different timesteps and noise?"""
    runs = place.run_two("--max_train_steps", PARALLEL_STEPS)
    one, other = (run.all("draw") for run in runs)
    total = len(one)
    same = {
        name: sum(a[name] == b[name] for a, b in zip(one, other, strict=True))
        for name in ("timesteps", "noise")
    }
    yield Row(
        "R5",
        ranks_differ.__doc__ or "",
        f"{'no' if same['noise'] else 'yes'}: timesteps are identical at {same['timesteps']} of "
        f"{total} steps, noise tensors at {same['noise']} of {total}",
        f"--max_train_steps {PARALLEL_STEPS}, two gloo processes",
        {"steps": total, **same, "statuses": [run.status for run in runs]},
    )


def learning_rates(place: Workplace) -> Iterator[Row]:
    """Are learning rates the same with one and with two processes (same global batch)?"""
    lengths = {"steps": ("--max_train_steps", 12), "epochs": ("--num_train_epochs", 2)}
    found: dict[str, dict[str, Any]] = {}
    for (name, length), accumulation in product(lengths.items(), (1, 2)):
        flags = (
            *length,
            "--lr_scheduler",
            "linear",
            "--lr_warmup_steps",
            2,
            "--gradient_accumulation_steps",
            accumulation,
        )
        one = _rates(place.run(*flags, batch=2))
        two = _rates(place.run_two(*flags, batch=1)[0])
        found[f"{name}, accumulation {accumulation}"] = {"one": one, "two": two}
    different = [name for name, lists in found.items() if lists["one"] != lists["two"]]
    told = "; ".join(f"{name}: {_difference(**found[name])}" for name in different)
    yield Row(
        "R9",
        learning_rates.__doc__ or "",
        f"no: {told}" if different else f"yes, in all {len(found)} combinations",
        "--lr_scheduler linear --lr_warmup_steps 2, --max_train_steps 12 or --num_train_epochs 2, "
        "--gradient_accumulation_steps 1 or 2; 1 process with batches of 2, 2 with batches of 1",
        found,
    )


MEASURES = {
    "R2": exact_resume,
    "R3": consumption,
    "R4": overshoot,
    "R5": ranks_differ,
    "R9": learning_rates,
}


def _resumed(place: Workplace) -> Outcome:
    """The run that goes on from the first checkpoint to the last step, made once."""
    if "resumed" not in place.shared:
        place.shared["resumed"] = place.resume(place.saved(), "--max_train_steps", STEPS)
    return place.shared["resumed"]


def _equal(one: Outcome, other: Outcome) -> int:
    return sum(other.losses.get(step) == loss for step, loss in one.losses.items())


def _samples(run: Outcome) -> list[list[str]]:
    return [event["ids"] for event in run.all("captions")]


def _rates(run: Outcome) -> list[float]:
    if run.status:
        raise RuntimeError(f"exit status {run.status}: {run.error}")
    return [event["lr"] for event in run.all("step")]


def _difference(one: list[float], two: list[float]) -> str:
    pairs = list(zip(one, two, strict=False))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    if at == len(pairs):
        return f"{len(one)} and {len(two)} steps"
    return f"step {at + 1} has {pairs[at][0]:.3g} and {pairs[at][1]:.3g}"
