"""Every training script goes on from a checkpoint that it wrote before, as it went on then.

Each folder in tests/fixtures/script_checkpoints holds all that a run needs, or for an adapter uses
what another one holds: images, models, flags (argv.json), a checkpoint, and what the steps after it
computed (expected.json). Draws must be the same everywhere; losses to 1e-4; every bit where
versions and processor are those of the record.
Only what a run tells and leaves is looked at, so that the inside of the scripts may change.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from diffusers_curriculum import TimestepSampler
from tests.training.older_facts import told_today

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "script_checkpoints"
SCRIPTS = {
    "class_conditional": "examples.class_conditional.train_class_conditional_curriculum",
    "unconditional": "examples.unconditional.train_unconditional_curriculum",
    "vit_vqgan": "train_vit_vqgan",
    "text_to_image": "train_text_to_image_curriculum",
    "text_to_image_lora": "examples.text_to_image.train_text_to_image_lora_curriculum",
}
STOPPED, STEPS = 5, 10  # the checkpoint that is kept, and the length of the run
LAW = "timestep_sampler/timestep_sampler_state.safetensors"  # which older versions did not leave
ADAPTER = "pytorch_lora_weights.safetensors"  # whose header tells more than that of the record
LARGEST = 700_000  # bytes of a folder

pytestmark = pytest.mark.reliability


@dataclass(frozen=True)
class Resumed:
    """What a script was to compute after its checkpoint, and what it has."""

    name: str
    wanted: dict[str, Any]
    found: dict[str, Any]
    output: Path

    @property
    def same_machine(self) -> bool:
        """Whether every bit must be the same."""
        return self.wanted["machine"] == self.found["machine"]


def command(name: str, work: Path) -> list[str]:
    """The flags of a folder's run, its paths filled in; results and caches go below ``work``."""
    paths = {
        "{pipeline}": FIXTURES / name / "pipeline",
        "{images}": FIXTURES / name / "images",
        "{checkpoints}": FIXTURES,
        "{cache}": work / "cache",
        "{output}": work / "run",
    }
    words = json.loads((FIXTURES / name / "argv.json").read_text())
    for placeholder, path in paths.items():
        words = [word.replace(placeholder, str(path)) for word in words]
    return words


def run(name: str, argv: Sequence[str], output: Path) -> dict[str, Any]:
    """Run a script to its end, and return what it told and left, as plain data."""
    logged: dict[int, dict[str, float]] = {}
    drawn: dict[int, list[int]] = {}
    sample = TimestepSampler.sample

    def log(_: Any, values: dict[str, float], step: int, **__: Any) -> None:
        logged.setdefault(step, {}).update(values)

    def noting(sampler: Any, *args: Any, step: int, **kwargs: Any) -> Any:
        levels = sample(sampler, *args, step=step, **kwargs)
        drawn.setdefault(step + 1, []).extend(levels.indices.tolist())  # as logged: finished steps
        return levels

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _reset_accelerate()
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            mock.patch.object(Accelerator, "log", log),
            mock.patch.object(TimestepSampler, "sample", noting),
        ):
            _script(name, patch).main(argv)
    finally:
        _reset_accelerate()
        torch.set_num_threads(threads)
    checkpoint = output / f"checkpoint-{STEPS}"
    return {
        "machine": _machine(),
        "steps": [_step(number, logged[number], drawn.get(number)) for number in sorted(logged)],
        "exported": _digests(output),
        "checkpoint": _digests(checkpoint),
        "facts": json.loads((checkpoint / "manifest.json").read_text())["facts"],
    }


def resume(name: str, work: Path) -> dict[str, Any]:
    """Go on from a folder's checkpoint, in ``work``; see :func:`run`."""
    kept = f"checkpoint-{STOPPED}"
    shutil.copytree(FIXTURES / name / kept, work / "run" / kept)
    argv = [*command(name, work), "--resume_from_checkpoint", "latest"]
    return run(name, argv, work / "run")


def _script(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """A script's module; the autoencoder's is found as when it is run as a script."""
    if name == "vit_vqgan":
        patch.syspath_prepend(str(ROOT / "examples" / "autoencoder"))
    return importlib.import_module(SCRIPTS[name])


def _step(number: int, metrics: dict[str, float], indices: list[int] | None) -> dict[str, Any]:
    """One step: its loss by every bit and as a number, its levels, and all that was logged."""
    loss = float(metrics["train_loss"] if "train_loss" in metrics else metrics["train/loss"])
    told = {"step": number, "loss": loss, "loss_hex": loss.hex(), "lr": metrics["lr"]}
    told |= {} if indices is None else {"indices": indices}
    return told | {"metrics": {name: float(value).hex() for name, value in metrics.items()}}


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of tensors and state below a folder, by relative path; not of other checkpoints,
    nor of files that tell versions and places."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*"))]
    return {
        path.as_posix(): hashlib.sha256((folder / path).read_bytes()).hexdigest()
        for path in paths
        if path.suffix == ".safetensors" or path.name == "training_state.json"
        if not path.parts[0].startswith("checkpoint-")
    }


def _machine() -> dict[str, str]:
    """What the last bits of a sum depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    vendors = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    names = ("diffusers", "transformers", "accelerate", "safetensors")
    return {name: metadata.version(name) for name in names} | {
        "torch": torch.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "processor": vendors[0] if vendors else platform.processor(),
    }


def _reset_accelerate() -> None:
    """Forget the process-wide state that one Accelerator leaves for the next."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module", params=SCRIPTS)
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """One script's run, gone on with."""
    name = request.param
    if name.endswith("lora"):
        pytest.importorskip("peft")
    if name.startswith("text_to_image"):
        pytest.importorskip("transformers", minversion="5")  # which saved their pipeline
    wanted = json.loads((FIXTURES / name / "expected.json").read_text())
    work = tmp_path_factory.mktemp(name)
    return Resumed(name, wanted, resume(name, work), work / "run")


def test_same_draws_and_losses(resumed: Resumed) -> None:
    """Same draws to the last bit, same losses as far as processors agree."""
    if resumed.name == "unconditional" and torch.__version__.startswith("2.6."):
        pytest.skip("on a CPU, torch 2.6 draws other numbers for dropout")
    wanted, found = resumed.wanted["steps"], resumed.found["steps"]
    numbers = list(range(STOPPED + 1, STEPS + 1))
    assert [step["step"] for step in found] == [step["step"] for step in wanted] == numbers
    assert [step.get("indices") for step in found] == [step.get("indices") for step in wanted]
    has_levels = resumed.name != "vit_vqgan"
    assert all(("indices" in step) == has_levels for step in found)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-9)
        assert theirs["metrics"].keys() <= ours["metrics"].keys()


def test_same_settings_and_files(resumed: Resumed) -> None:
    """The next checkpoint tells the same settings, by names where a default has changed since, and
    run and checkpoint have the same files."""
    wanted, found = resumed.wanted, resumed.found
    facts = dict(found["facts"])
    scale = facts.pop("data_scale", None)  # measured now, as the old run had not
    assert (scale is None) == (resumed.name == "vit_vqgan")
    assert scale is None or scale["std"] > 0
    assert facts == told_today(wanted["facts"])
    law = set() if resumed.name == "vit_vqgan" else {LAW}
    assert found["exported"].keys() == wanted["exported"].keys() | law
    assert found["checkpoint"].keys() == wanted["checkpoint"].keys()


def test_all_that_is_left_can_be_read_by_the_group(resumed: Resumed) -> None:
    """Weights that safetensors wrote have the permissions of files that the program opens."""
    modes = {file: stat.S_IMODE(file.stat().st_mode) for file in resumed.output.rglob("*")}
    usual = modes[resumed.output / "run.json"]
    odd = {file.name: oct(mode) for file, mode in modes.items() if file.is_file() and mode != usual}
    assert odd == {}


def test_same_bits(resumed: Resumed) -> None:
    """On the machine of the record: every number that is told, and every file that is left."""
    wanted, found = resumed.wanted, resumed.found
    if not resumed.same_machine:
        pytest.skip(f"recorded on {wanted['machine']}, this is {found['machine']}")
    for ours, theirs in zip(found["steps"], wanted["steps"], strict=True):
        assert ours["loss_hex"] == theirs["loss_hex"]
        assert ours["lr"] == theirs["lr"]
        assert {key: ours["metrics"][key] for key in theirs["metrics"]} == theirs["metrics"]
    for part in ("exported", "checkpoint"):
        names = [name for name in wanted[part] if Path(name).name != ADAPTER]
        assert [found[part][name] for name in names] == [wanted[part][name] for name in names]


@pytest.mark.parametrize("name", SCRIPTS)
def test_folders_are_small(name: str) -> None:
    files = [path for path in (FIXTURES / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST
