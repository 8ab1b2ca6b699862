"""The GPU benchmark's code, run on the CPU with minuscule sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import (
    baseline,
    caches,
    clock,
    compiled,
    flops,
    images,
    larger,
    resume,
    script,
    speed,
    subject,
    synchronisation,
)
from benchmarks.gpu import findings as findings_module
from benchmarks.gpu.findings import CheckError, Findings, Unavailable, check
from benchmarks.gpu.report import markdown
from benchmarks.gpu.script_runs import Watched, run_script
from benchmarks.gpu.settings import Settings
from diffusers_curriculum.models.networks import build_network

ROOT = Path(__file__).parents[2]
STATUSES = {"passed", "failed", "timeout", "not installed", "not applicable", "out of memory"}
STATUSES |= {"left out"}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield Settings(torch.device("cpu"), smoke=True, work_dir=tmp_path)
    subject.reset_accelerate()


def rows_of(part: Any, settings: Settings) -> dict[str, Any]:
    findings = Findings(settings.work_dir / "findings.json")
    part.measure(findings, settings)
    stored = json.loads((settings.work_dir / "findings.json").read_text("utf-8"))
    assert stored == findings.rows
    assert {row["status"] for row in stored.values()} <= STATUSES
    assert findings.status == "passed", stored
    return stored


# -- every part runs -------------------------------------------------------------------------------


def test_synchronisations(settings: Settings) -> None:
    rows = rows_of(synchronisation, settings)
    assert len(rows) == 7
    assert rows["curriculum, bf16"]["synchronisations"] == "not applicable"


@pytest.mark.parametrize("part", [speed, baseline, caches])
def test_speeds(part: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "WINDOWS", 2)
    monkeypatch.setattr(speed, "SWEEP_WINDOWS", 2)
    rows = rows_of(part, settings)
    measured = [row for row in rows.values() if "ratio" in row]
    assert measured
    for row in measured:
        variants = [v for v in row.values() if isinstance(v, dict)]
        assert len(variants) == 2
        assert all(len(v["windows"]) == 2 and v["images_per_second"] > 0 for v in variants)
        assert all(v["peak_memory_gib"] is None for v in variants)


@pytest.mark.parametrize("part", [speed, larger])
def test_shares_of_the_peak(part: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SWEEP_WINDOWS", 1)
    rows = rows_of(part, settings)
    shared = {name: row for name, row in rows.items() if "share_of_matrix_peak" in row}
    assert len(shared) == 2, rows
    for row in shared.values():
        assert row["teraflops_per_image"] > 0
        assert 0 < row["share_of_matrix_peak"] < 1
    if part is larger:
        assert rows["SDXL LoRA, batch 2"]["parameters"] > 3 * 36_864
        assert rows["SDXL LoRA, batch 2"]["trained_parameters"] == 36_864


@pytest.mark.slow
def test_compiled_networks_are_measured(settings: Settings) -> None:
    rows = rows_of(compiled, settings)
    assert [row.get("compiled") for row in rows.values()] == ["none", "blocks", "full", None]


def test_operations_are_counted_forward_and_backward() -> None:
    a, b = torch.randn(4, 8, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    assert flops.counted(lambda: a @ b) == 2 * 4 * 8 * 16
    assert flops.counted(lambda: (a @ b).sum().backward()) == 3 * 2 * 4 * 8 * 16
    assert flops.share(10.0, 2e12, 4e13)["share_of_matrix_peak"] == 0.5


def test_the_script_trains(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "_command", lambda *_: {"exit_status": 0})  # see the slow test
    rows = rows_of(script, settings)
    assert len(rows["bf16"]["losses"]) == 2
    assert rows["bf16"]["processors"] == ["AttnProcessor2_0"]
    assert rows["fp16"]["status"] == "not applicable"


def in_this_process(argv: list[str], result: Path) -> list[str]:
    return run_script([*argv, "--resume_from_checkpoint", "latest"]).losses


def test_resuming_is_exact(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_resumed", in_this_process)  # see the slow test
    rows = rows_of(resume, settings)
    assert rows["fp32"]["equal_losses"] == 8
    assert rows["fp32"]["equal_files"] >= 8
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("resumed", "hashes", "message"),
    [
        (["0x3", "0x4"], {"unet": "a"}, None),
        (["0x3", "0x5"], {"unet": "a"}, "losses"),
        (["0x3", "0x4"], {"unet": "b"}, "these files .* differ: unet"),
        (["0x3", "0x4"], {"unet": "a", "ema": "c"}, "these files .* differ: ema"),
    ],
)
def test_an_inexact_resumption_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resumed: list[str],
    hashes: dict[str, str],
    message: str | None,
) -> None:
    def run(argv: list[str], stop_before: int | None = None) -> Watched:
        return Watched(["0x1", "0x2"] + ([] if stop_before else ["0x3", "0x4"]))

    monkeypatch.setattr(resume, "run_script", run)
    monkeypatch.setattr(resume, "_resumed", lambda *_: resumed)
    whole = {"unet": "a"}
    monkeypatch.setattr(resume, "_hashes", lambda p: whole if p.parent.name == "whole" else hashes)
    with nullcontext() if message is None else pytest.raises(CheckError, match=message):
        resume._compare(tmp_path, [], "")


@pytest.mark.slow
@pytest.mark.parametrize("tier", gpu.TIERS)
def test_all_of_it(tier: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", tier, "--device", "cpu", "--smoke"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run([*command, "--output_dir", str(tmp_path)], cwd=ROOT, env=environment)
    report = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert told.returncode == 0, report
    assert {part["status"] for part in report["parts"].values()} == {"passed"}


# -- the report ------------------------------------------------------------------------------------


def test_the_report_has_its_fields(tmp_path: Path) -> None:
    argv = ["--device", "cpu", "--smoke", "--output_dir", str(tmp_path), "--only", "environment"]
    assert gpu.main(argv) == 0
    report = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    own = {"schema", "device", "device_name", "tier", "smoke", "seconds", "parts"}
    assert report.keys() == own
    assert [path.name for path in tmp_path.glob("*.json")] == ["gpu.json"]
    part = report["parts"]["environment"]
    assert part.keys() == {"status", "seconds", "limit_seconds", "error", "rows"}
    assert part["rows"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "| environment | passed |" in (tmp_path / "gpu.md").read_text("utf-8")


def test_a_part_that_dies_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    argv = ["--device", "cpu", "--output_dir", str(tmp_path), "--only", "resume", "baseline"]
    assert gpu.main(argv) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"]
    assert [part["status"] for part in parts.values()] == ["failed", "failed"]
    assert parts["resume"]["error"].startswith("exit status 1")


def test_a_part_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/child\nwait\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(gpu, "SHORTEST_SECONDS", 0)
    monkeypatch.setitem(gpu.TOTAL_SECONDS, "quick", 4)
    assert gpu.main(["--device", "cpu", "--output_dir", str(tmp_path), "--only", "baseline"]) == 1
    part = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"]["baseline"]
    assert part["status"] == "timeout"
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    for _ in range(100):  # a busy machine takes a while to end what was killed
        if not child.exists() or child.read_text("utf-8").split()[2] in "ZX":
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"{child} lives")


def test_a_run_that_is_cut_tells_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_part(part: str, *_: Any) -> dict[str, Any]:
        if part == "script":
            raise KeyboardInterrupt
        return {"status": "passed", "seconds": 1.0, "limit_seconds": 9.0, "error": None, "rows": {}}

    monkeypatch.setattr(gpu, "_run_part", run_part)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["quick", "--device", "cpu", "--output_dir", str(tmp_path)])
    parts = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"]
    assert list(parts) == list(gpu.TIERS["quick"])
    assert [part["status"] for part in parts.values()] == ["passed"] + ["left out"] * 4
    assert "| baseline | left out |" in (tmp_path / "gpu.md").read_text("utf-8")


def test_tiers_keep_their_time() -> None:
    for tier, most in {"quick": 150, "full": 400}.items():
        assert gpu.TOTAL_SECONDS[tier] <= most - 5
        assert max(gpu.TIERS[tier].values()) < gpu.TOTAL_SECONDS[tier]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "full", str(tmp_path / "out")]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout == "No CUDA GPU here: nothing was measured.\n"
    assert not (tmp_path / "out").exists()


# -- its tools -------------------------------------------------------------------------------------


def test_a_failing_row_does_not_end_the_others(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("a kernel died")

    def missing() -> dict[str, Any]:
        raise Unavailable("not installed")

    def too_large() -> dict[str, Any]:
        raise torch.OutOfMemoryError("no room")

    findings = Findings(tmp_path / "rows.json")
    assert findings.status == "passed"
    for name, row in {"a": fails, "b": missing, "c": too_large, "d": lambda: {"x": 1}}.items():
        findings.attempt(name, row)
    rows = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    assert [row["status"] for row in rows.values()] == [
        "failed",
        "not installed",
        "out of memory",
        "passed",
    ]
    assert rows["a"]["error"] == "RuntimeError: a kernel died"
    assert "fails" in rows["a"]["stack"]
    assert findings.status == "failed"
    assert gpu._status(rows) == "failed"
    assert gpu._first_error(rows) == "a: RuntimeError: a kernel died"
    part = {"status": "failed", "seconds": 1.0, "limit_seconds": 9.0, "error": "a", "rows": rows}
    report = {"device_name": "X", "smoke": False, "parts": {"speed": part}}
    assert "| a | failed | RuntimeError: a kernel died |" in markdown(report)


def test_rows_without_time_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, path = [100.0], tmp_path / "rows.json"
    monkeypatch.setattr(findings_module.time, "time", lambda: now[0])
    monkeypatch.setattr(findings_module.time, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> dict[str, Any]:
        stored = json.loads(path.read_text("utf-8"))
        assert len(stored) == 4  # an end in the midst of it tells of all
        now[0] += seconds
        return {}

    findings = Findings(path, until=119.0)
    findings.attempt_all({f"{s}": (lambda s=s: takes(s)) for s in (2.0, 9.0, 1.0, 0.5)})
    stored = json.loads(path.read_text("utf-8"))
    assert [row["status"] for row in stored.values()] == ["passed"] * 2 + ["left out"] * 2
    assert stored["0.5"]["error"] == "no time was left for this row"
    assert findings.status == "passed"


def test_processors_are_looked_at() -> None:
    subject.check_processors(["XFormersAttnProcessor"], xformers=True)
    subject.check_processors(["AttnProcessor2_0"], xformers=False)
    for found, wanted in (
        ([], True),
        (["AttnProcessor2_0"], True),
        (["AttnProcessor2_0", "XFormersAttnProcessor"], True),
        (["XFormersAttnProcessor"], False),
    ):
        with pytest.raises(CheckError, match="processors"):
            subject.check_processors(found, wanted)


def test_a_check_shows_its_message() -> None:
    check(True, "fine")
    with pytest.raises(CheckError, match="broken"):
        check(False, "broken")


def test_windows_alternate_and_count_images() -> None:
    order: list[str] = []
    variants = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = clock.paired_windows(torch.device("cpu"), variants, 4, windows=3, length=0.0)
    assert order == list("aabb" + "ab" + "ababab")  # warm-up, rate, windows
    assert len(found["a"]["windows"]) == len(found["ratio_of_pairs"]) == 3


def test_images_are_made_where_there_are_no_scans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert images.write_images(tmp_path / "scans", 12, 16) == "scanned digits"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert images.write_images(tmp_path / "made", 12, 16) == "generated images"
    for folder in ("scans", "made"):
        rows = (tmp_path / folder / "metadata.jsonl").read_text("utf-8").splitlines()
        names = [json.loads(row)["file_name"] for row in rows]
        assert len(names) == 12
        assert all((tmp_path / folder / name).is_file() for name in names)


def test_the_real_sizes_are_stable_diffusions() -> None:
    models = subject.build_models(subject.SD15, torch.device("meta"), torch.bfloat16)
    counts = [
        sum(p.numel() for p in model.parameters())
        for model in (models.network, models.vae, *models.encoders.values())
    ]
    # the published parameter counts of the three parts of Stable Diffusion 1.5
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    with torch.device("meta"):
        sdxl: Any = UNet2DConditionModel(**larger.SDXL)
        dit = build_network("DiT-XL/2", channels=4, sample_size=32, num_classes=1000)
    assert sum(p.numel() for p in sdxl.parameters()) == 2_567_463_684
    assert sum(p.numel() for p in dit.parameters()) > 670_000_000
