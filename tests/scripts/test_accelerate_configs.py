"""Example configurations of accelerate: each is read by accelerate, and starts a run on CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_multi_gpu_env

from diffusers_curriculum.training.process.launcher import check_environment
from diffusers_curriculum.training.process.sharding import sharding_plugin
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from tests.fsdp2 import needs_fsdp2
from tests.reliability.two_processes import _free_port
from tests.scripts.small_runs import make_class_bench

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
RUNNABLE = [
    pytest.param(path, id=path.stem, marks=needs_fsdp2 if path.stem == "fsdp2" else ())
    for path in CONFIGS
]
CLUSTERS = ROOT / "examples" / "clusters"
KINDS = {
    "fsdp2": ("FSDP", 2, {}),
    "one_gpu": ("NO", 1, {}),
    "several_gpus": ("MULTI_CPU", 2, {}),
    "several_nodes": ("MULTI_CPU", 2, {"num_machines": 2}),
}


def test_there_is_one_for_each_way_to_run() -> None:
    assert {path.stem for path in CONFIGS} == {*KINDS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path) -> None:
    read: Any = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text("utf-8"))
    assert read.num_processes == written["num_processes"]
    assert read.fsdp_config == written.get("fsdp_config", {})


def launched(path: Path) -> dict[str, str]:
    """The environment that accelerate gives to the processes of a script."""
    words = ["--config_file", str(path), "script.py"]
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("path", RUNNABLE)
def test_scripts_accept_what_it_sets(path: Path) -> None:
    environment, fsdp2 = launched(path), path.stem == "fsdp2"
    words = ("--pretrained_model_name_or_path", "x", "--train_data_dir", "y")
    check_environment(TextToImage().parse(words, machine=False), environment)
    assert (sharding_plugin(environment) is not None) == fsdp2
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@needs_fsdp2
def test_the_examples_of_clusters_give_flags_that_there_are() -> None:
    shell = (CLUSTERS / "slurm.sh").read_text("utf-8")
    assert subprocess.run(["bash", "-n"], input=shell, text=True, check=False).returncode == 0
    pods = yaml.safe_load((CLUSTERS / "kubernetes.yaml").read_text("utf-8"))
    (container,) = pods["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    given = shell.split("train_text_to_image_curriculum.py")[1].strip(" \\\n'").replace("\\\n", "")
    for words in (given.split(), container["command"][2:]):
        TextToImage().parse(words, machine=False)
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert sharding_plugin(environment) is not None


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNNABLE)
def test_it_starts_a_run(path: Path, tmp_path: Path) -> None:
    """The same file, with fewer processes, on CPUs; nodes are launchers side by side."""
    bench = make_class_bench(tmp_path / "bench")
    kind, processes, changes = KINDS[path.stem]
    nodes = int(changes.get("num_machines", 1))
    options = {"num_processes": processes, "num_machines": nodes, "main_process_port": _free_port()}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(path)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    script = [str(ROOT / f"{bench.script.replace('.', '/')}.py")]
    script += bench.argv(tmp_path / "run", "--max_train_steps", 1)
    started = [_start([*command, "--machine_rank", str(n), *script]) for n in range(nodes)]
    for job in started:
        told, _ = job.communicate(timeout=240)
        assert job.returncode == 0, told[-3000:]
    (session,) = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["sessions"]
    found = session["in_effect"]
    assert (found["distributed_type"], found["num_processes"]) == (kind, processes)
    assert found["mixed_precision"] == "bf16"
    assert session["outcome"] == "done"


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    more = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    more |= {"GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
