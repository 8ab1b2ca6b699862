"""R10 to R15: checkpoints that are interrupted, damaged, strange, or poisoned."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product

from benchmarks.official_faults import faults
from benchmarks.official_faults.report import Row
from benchmarks.official_faults.workplace import SAVED, Outcome, Workplace, said

NAME = f"checkpoint-{SAVED}"
UNET = "unet/diffusion_pytorch_model.safetensors"
FILES = (UNET, "unet/config.json", "optimizer.bin", "scheduler.bin", "random_states_0.pkl")
FLIPS = (0.2, 0.4, 0.6, 0.8)  # where in the file
RESUME = f"--resume_from_checkpoint {NAME}"
ORDER = ("delete", "save_state")
TWO_SAVES = ("--max_train_steps", 4, "--checkpointing_steps", 2)


def killed_while_saving(place: Workplace) -> Iterator[Row]:
    """Is there a whole checkpoint after a SIGKILL between deletion and save?"""
    limit = ("--checkpoints_total_limit", 1)
    killed = place.run(*TWO_SAVES, *limit, faults=[faults.kill_at_save(2)])
    order = [f"{e['what']} {e['name']}" for e in killed.events if e["what"] in ORDER]
    left = killed.checkpoints
    names = ", ".join(left) or "nothing"
    yield Row(
        "R10",
        killed_while_saving.__doc__ or "",
        f"{'yes' if left else 'no'}: order {', '.join(order)}; left: {names}",
        "--checkpointing_steps 2 --checkpoints_total_limit 1; killed as the second save begins",
        {"status": killed.status, "left": left, "order": order},
    )
    killed = place.run(*TWO_SAVES, faults=[faults.kill_inside_save(2)])
    latest = ("--resume_from_checkpoint", "latest", "--max_train_steps", 5)
    resumed = place.run(*latest, folder=killed.folder)
    yield Row(
        "R10",
        "Does `latest` pass over a checkpoint whose save was killed?",
        f"{'no' if resumed.status else 'yes'}: {resumed.end}; folders: "
        f"{', '.join(killed.checkpoints)}",
        "--checkpointing_steps 2, killed in the second save; then --resume_from_checkpoint latest",
        {"status": resumed.status, "left": killed.checkpoints},
    )


def damage(place: Workplace) -> Iterator[Row]:
    """One flipped bit in a file of the checkpoint: is it noticed?"""
    clean = _weights(place.resume(place.saved()))
    statuses: dict[str, list[int | None]] = {name: [] for name in FILES}
    quiet: list[list[str]] = []  # what those say that do not notice
    changed = 0
    for name, share in product(FILES, FLIPS):
        folder = place.saved()
        faults.flip_bit(folder / NAME / name, share)
        ended = place.resume(folder)
        statuses[name].append(ended.status)
        if ended.status == 0:
            quiet.append(ended.warnings)
            changed += _weights(ended) != clean
    noticed = {name: sum(s != 0 for s in found) for name, found in statuses.items()}
    told = ", ".join(f"{name} {count}" for name, count in noticed.items())
    yield Row(
        "R11",
        damage.__doc__ or "",
        f"{sum(noticed.values())} of {len(FILES) * len(FLIPS)} ({told}; {len(FLIPS)} each); the "
        f"others end with exit 0, {sum(not w for w in quiet)} of them with not a word and the rest "
        f"with {said(list(chain(*quiet)))}; {changed} of them train other weights in the next step",
        f"{RESUME}; one bit, at 20, 40, 60 and 80 % of each file",
        {"statuses": statuses, "silent": sum(not w for w in quiet), "other_weights": changed},
    )
    folder = place.saved()
    (folder / NAME / "random_states_0.pkl").write_bytes(b"broken")
    yield _refusal("Noticed: an unreadable random_states_0.pkl?", place.resume(folder))
    folder = place.saved()
    content = (folder / NAME / UNET).read_bytes()
    (folder / NAME / UNET).write_bytes(content[: len(content) // 2])
    yield _refusal("Noticed: UNet weights cut in half?", place.resume(folder))


def missing(place: Workplace) -> Iterator[Row]:
    """Is a missing file of the checkpoint noticed?"""
    files = sorted(p for p in (place.whole.folder / NAME).rglob("*") if p.is_file())
    statuses = {}
    for file in files:
        folder, name = place.saved(), str(file.relative_to(place.whole.folder / NAME))
        (folder / NAME / name).unlink()
        statuses[name] = place.resume(folder).status
    ignored = [name for name, status in statuses.items() if status == 0]
    yield Row(
        "R12",
        missing.__doc__ or "",
        f"{len(files) - len(ignored)} of {len(files)} files; exit 0 without "
        f"{', '.join(ignored) or 'none'}",
        f"{RESUME}, each file deleted in turn",
        statuses,
    )
    yield _second_rank(place)


def _second_rank(place: Workplace) -> Row:
    fresh = place.run_two(*TWO_SAVES)
    there = [(fresh[0].folder / f"checkpoint-2/random_states_{r}.pkl").exists() for r in (0, 1)]
    flags = ("--max_train_steps", 4, "--resume_from_checkpoint", "checkpoint-2")
    resumed = place.run_two(*flags, folder=fresh[0].folder)
    draws = [run.all("draw")[0]["noise"] for run in (resumed[1], fresh[1])]
    again = draws[0] == draws[1]
    return Row(
        "R12",
        "Random states of the second of two processes: saved, and missed?",
        f"random_states_1.pkl {'is' if there[1] else 'is not'} saved; resuming ends with exit "
        f"{resumed[1].status}, process 1 says {said(resumed[1].warnings)}, and its first noise "
        f"is {'that of step 1 of the first run again' if again else 'not that of step 1'}",
        "--checkpointing_steps 2, then --resume_from_checkpoint checkpoint-2; two gloo processes",
        {"saved": there, "statuses": [run.status for run in resumed], "starts_again": again},
    )


MEASURES = {"R10": killed_while_saving, "R11": damage, "R12": missing}


def _refusal(what: str, ended: Outcome) -> Row:
    """Whether a resumption from something broken was refused, and what was said about it."""
    no, yes = f"no, exit 0 and {said(ended.warnings)}", f"yes, {ended.end}"
    facts = {"status": ended.status, "steps": len(ended.all("step"))}
    return Row("R11", what, no if ended.status == 0 else yes, RESUME, facts)


def _weights(run: Outcome) -> bytes:
    return (run.folder / UNET).read_bytes()
