"""R13 to R15: what is in the way, another run's checkpoint, and what runs when it is read."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.official_faults import faults
from benchmarks.official_faults.checkpoints import NAME, RESUME, TWO_SAVES, UNET
from benchmarks.official_faults.report import Row
from benchmarks.official_faults.trial import LOADED
from benchmarks.official_faults.workplace import SAVED, Outcome, Workplace

PICKLES = (
    "optimizer.bin",
    "scheduler.bin",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "unet/diffusion_pytorch_model.bin",
)


def strangers(place: Workplace) -> Iterator[Row]:
    """Is a folder checkpoint-best left alone?"""
    flags = {
        "rotation": (*TWO_SAVES, "--checkpoints_total_limit", 1),
        "latest": ("--max_train_steps", 5, "--resume_from_checkpoint", "latest"),
    }
    for name, more in flags.items():
        folder = place.saved()
        (folder / "checkpoint-best").mkdir()
        ended = place.run(*more, folder=folder)
        steps = len(ended.all("step"))
        yield Row(
            "R13",
            f"{strangers.__doc__} ({name})",
            f"{'no' if ended.status else 'yes'}: {ended.end}, after {steps} steps",
            " ".join(map(str, more)),
            {"status": ended.status, "steps": steps, "left": ended.checkpoints},
        )


def literal_path(place: Workplace) -> Iterator[Row]:
    """Does the full path of another run's checkpoint mean that checkpoint?"""
    other = place.saved()
    flags = ("--max_train_steps", 5, "--resume_from_checkpoint", other / NAME)
    alone = place.run(*flags)
    yield Row(
        "R14",
        literal_path.__doc__ or "",
        f"no: {alone.end}, after {_models(alone)} models were loaded; it looks for {NAME} in its "
        "own output folder",
        f"--resume_from_checkpoint OTHER_RUN/{NAME}",
        {"status": alone.status, "models_loaded_before": _models(alone)},
    )
    mine = place.run("--max_train_steps", SAVED, "--checkpointing_steps", SAVED, "--seed", 8)
    resumed = place.run(*flags, folder=mine.folder)
    loaded = [line for line in resumed.output.splitlines() if "Loading states from" in line]
    own = bool(loaded) and str(mine.folder) in loaded[0]
    yield Row(
        "R14",
        "And if its own output folder has a checkpoint of that name?",
        f"exit {resumed.status}, and the {'own one' if own else 'other one'} is loaded",
        f"--resume_from_checkpoint OTHER_RUN/{NAME}",
        {"status": resumed.status, "own": own},
    )


def poisoned(place: Workplace) -> Iterator[Row]:
    """Does a poisoned file in the checkpoint run code?"""
    clean = place.resume(place.saved())
    loaded = {e["file"]: e["weights_only"] for e in clean.all("torch.load")}
    ran, statuses, errors = [], {}, {}
    for name in PICKLES:
        folder = place.saved()
        if name.startswith("unet/"):
            (folder / NAME / UNET).unlink()
        canary = folder.parent / "canary"
        faults.poison(folder / NAME / name, canary)
        ended = place.resume(folder)
        statuses[name], errors[name] = ended.status, ended.error
        ran += [name] if canary.exists() else []
    ways = "; ".join(f"{f}: torch.load(weights_only={w})" for f, w in loaded.items())
    passed = [name for name, status in statuses.items() if status == 0]
    yield Row(
        "R15",
        poisoned.__doc__ or "",
        f"{'yes: ' + ', '.join(ran) if ran else f'no, in {len(statuses)} of {len(statuses)}'}; "
        f"{len(statuses) - len(passed)} are refused, exit 0 with {', '.join(passed)}; {ways}",
        f"{RESUME}, one file replaced in turn",
        {"ran": ran, "statuses": statuses, "errors": errors, "weights_only": loaded},
    )
    yield _custom_object(place)


def _custom_object(place: Workplace) -> Row:
    script = place.root / "registered.py"
    script.write_text(REGISTERED, "utf-8")
    folder = place.folder()
    folder.mkdir()
    wrote = place.run_other(script, folder, "save")
    faults.poison(folder / "state" / "custom_checkpoint_0.pkl", folder.parent / "canary")
    read = place.run_other(script, folder, "load")
    executed = (folder.parent / "canary").exists()
    return Row(
        "R15",
        "And accelerate's own file of an object given to register_for_checkpointing (the official "
        "script gives none)?",
        f"{'yes' if executed else 'no'}: a poisoned custom_checkpoint_0.pkl "
        f"{'ran' if executed else 'did not run'} in load_state",
        "a script of 9 lines instead of the official one",
        {"statuses": [wrote.status, read.status], "executed": executed},
    )


REGISTERED = """
import sys
from accelerate import Accelerator
class Counter:
    def state_dict(self): return {"n": 1}
    def load_state_dict(self, state): self.n = state["n"]
accelerator = Accelerator()
accelerator.register_for_checkpointing(Counter())
getattr(accelerator, sys.argv[1] + "_state")("state")
"""

MEASURES = {"R13": strangers, "R14": literal_path, "R15": poisoned}


def _models(run: Outcome) -> int:
    return sum(len(run.all(model.__name__)) for model in LOADED)
