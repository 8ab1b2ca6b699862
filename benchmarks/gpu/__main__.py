"""Runs every part in a process of its own, within a time of its own, and writes the report.

python -m benchmarks.gpu quick|full --device cuda [--output_dir DIR]
python -m benchmarks.gpu quick|full --device cpu --smoke --output_dir DIR   # does the code run?
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import LEFT_OUT, markdown

ROOT = Path(__file__).parents[2]
SCHEMA = 1
SHORTEST_SECONDS = 10  # less is not worth a start
# Part -> seconds it may take, in each tier; what the parts of a tier may take together is less.
TIERS = {
    "quick": {"environment": 25, "script": 35, "synchronisation": 30, "resume": 35, "baseline": 50},
    "full": {
        "environment": 25,
        "speed": 125,
        "larger": 85,
        "caches": 40,
        "compiled": 65,
        "script": 60,
    },
}
TOTAL_SECONDS = {"quick": 145, "full": 392}  # below 150 and 400 with everything around it
SMOKE_SECONDS = 300  # of a part, where the question is whether its code runs
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "MPLBACKEND": "agg",
}
_PROBE = """
import torch
found = torch.cuda.is_available()
print("DEVICE", torch.cuda.get_device_name(0) if found else "")
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts (or, inside, one of them); returns the exit status."""
    args = _parse(argv)
    if args.part:
        return _run_one(args)
    name = "CPU"
    if args.device == "cuda":
        name = _cuda_device()
        if not name:
            print("No CUDA GPU here: nothing was measured.")
            return 0
    output = Path(args.output_dir or ROOT / "benchmarks" / "results" / _folder_name(name))
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.log").write_text("", encoding="utf-8")
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "device": args.device,
        "device_name": name,
        "tier": args.tier,
        "smoke": args.smoke,
        "seconds": 0.0,
        "parts": {},
    }
    start, limits = time.monotonic(), TIERS[args.tier]
    chosen = [part for part in limits if part in (args.only or limits)]
    for part in chosen:  # until it is its turn
        report["parts"][part] = _entry(LEFT_OUT, 0.0, limits[part], {}, "it was not reached")
    for part in chosen:
        left = TOTAL_SECONDS[args.tier] - (time.monotonic() - start)
        seconds = SMOKE_SECONDS if args.smoke else min(limits[part], left)
        report["parts"][part] = _run_part(part, seconds, args, output)
        report["seconds"] = round(time.monotonic() - start, 1)
        _write(output, report)
        print(f"{part}: {report['parts'][part]['status']}", flush=True)
    print(markdown(report))
    bad = any(p["status"] in ("failed", "timeout") for p in report["parts"].values())
    return 1 if bad else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("tier", choices=TIERS, nargs="?", default="quick")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="minuscule sizes, single steps")
    parser.add_argument("--output_dir", help="default: benchmarks/results/<device>")
    names = sorted({part for parts in TIERS.values() for part in parts})
    parser.add_argument("--only", nargs="+", choices=names, help="these parts of the tier only")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work_dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _cuda_device() -> str:
    """Name of the GPU, "" if there is none; asked in another process, to hold no memory here."""
    told = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    found = re.search(r"^DEVICE (.*)$", told.stdout, re.MULTILINE)
    if found is None:
        sys.stderr.write(told.stderr[-2000:])
        raise SystemExit(f"{sys.executable} cannot ask torch for a GPU: install the package first.")
    return found.group(1).strip()


def _folder_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _run_part(part: str, seconds: float, args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Run one part in a process group that is ended with everything in it when time is up."""
    start = time.monotonic()
    if seconds < SHORTEST_SECONDS:
        return _entry("timeout", 0.0, seconds, {}, "no time was left")
    findings = output / f"{part}.json"  # stays where this process is ended, too
    findings.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as work_dir:
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--part",
            part,
            "--device",
            args.device,
            "--findings",
            str(findings),
            "--work_dir",
            work_dir,
            "--until",
            str(time.time() + seconds),
            *(["--smoke"] if args.smoke else []),
        ]
        with open(output / "gpu.log", "a", encoding="utf-8") as log:
            log.write(f"\n===== {part}\n")
            log.flush()
            status = _finish(command, _environment(part, args.device), log, seconds)
    rows = json.loads(findings.read_text("utf-8")) if findings.is_file() else {}
    findings.unlink(missing_ok=True)
    taken = round(time.monotonic() - start, 1)
    if status is None:
        return _entry("timeout", taken, seconds, rows, f"took more than {seconds:.0f} s")
    if status != 0 or not rows:
        tail = _tail(output / "gpu.log")
        return _entry("failed", taken, seconds, rows, f"exit status {status}: {tail}")
    return _entry(_status(rows), taken, seconds, rows, _first_error(rows))


def _environment(part: str, device: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    given = {**os.environ, **QUIET, "PYTHONPATH": path}
    if part == "resume":
        given["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if device == "cpu":
        given["ACCELERATE_USE_CPU"] = "true"
    return given


def _finish(
    command: list[str], environment: dict[str, str], log: Any, seconds: float
) -> int | None:
    """The exit status, or None when the time was up."""
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # also what the part started itself, and also when this process is interrupted
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _entry(
    status: str, taken: float, limit: float, rows: dict[str, Any], error: str | None
) -> dict[str, Any]:
    return {
        "status": status,
        "seconds": taken,
        "limit_seconds": round(limit, 1),
        "error": error,
        "rows": rows,
    }


def _status(rows: dict[str, Any]) -> str:
    found = [row["status"] for row in rows.values()]
    if "failed" in found:
        return "failed"
    return "passed" if "passed" in found else found[0]


def _first_error(rows: dict[str, Any]) -> str | None:
    errors = (f"{k}: {row['error']}" for k, row in rows.items() if row["status"] == "failed")
    return next(errors, None)


def _tail(path: Path) -> str:
    return path.read_text("utf-8", errors="replace")[-1500:]


def _run_one(args: argparse.Namespace) -> int:
    """One part, inside its own process; its rows tell how it went."""
    import torch

    from benchmarks.gpu.findings import Findings
    from benchmarks.gpu.settings import Settings, prepare_device

    device = torch.device("cuda:0" if args.device == "cuda" else "cpu")
    settings = Settings(device, args.smoke, args.work_dir)
    prepare_device(settings)
    part = import_module(f"benchmarks.gpu.{args.part}")
    part.measure(Findings(args.findings, args.until), settings)
    return 0


def _write(output: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    (output / "gpu.json").write_text(text, encoding="utf-8")
    (output / "gpu.md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    # asked to end, it ends the part that is running too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
