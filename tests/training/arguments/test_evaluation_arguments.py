"""Flags of the metrics: each wrong use refused, with the value and the remedy."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_curriculum.training.arguments import evaluation as evaluation_arguments
from diffusers_curriculum.training.arguments.evaluation import (
    add_evaluation_arguments,
    check_evaluation,
)
from diffusers_curriculum.training.errors import UsageError

ON = "--eval_steps 5 --eval_metrics "
OWN = "--eval_feature_model someone/network"

# Command line -> what the message must say: the value, then the remedy.
WRONG = {
    "--eval_steps 5": ("--eval_steps is 5", "--eval_metrics, one or more of fid, kid"),
    "--eval_metrics fid kid": ("--eval_metrics is fid kid", "needs --eval_steps N"),
    "--eval_samples 50": ("--eval_samples is 50", "no effect without --eval_steps"),
    "--eval_num_inference_steps 3": ("is 3", "no effect without --eval_steps"),
    "--eval_generation_batch_size 3": ("is 3", "no effect without --eval_steps"),
    OWN: ("someone/network", "no effect without --eval_steps"),
    "--eval_feature_weights here": ("is here", "no effect without --eval_steps"),
    f"--eval_steps 0 --eval_metrics kid {OWN}": ("--eval_steps is 0", "at least 1"),
    f"{ON}kid {OWN} --eval_samples 3": ("--eval_samples is 3", "at least 4"),
    f"{ON}kid {OWN} --eval_num_inference_steps 0": ("inference_steps is 0", "at least 1"),
    f"{ON}kid {OWN} --eval_generation_batch_size 0": ("batch_size is 0", "at least 1"),
    f"{ON}kid kid {OWN}": ("kid kid", "once"),
    f"{ON}fid fd_dinov2 {OWN}": ("someone/network", "drop one"),
    f"{ON}fid {OWN} --eval_feature_weights here": ("is here", "through Inception"),
    f"{ON}fd_dinov2 precision_recall --eval_feature_weights here": ("is here", "Inception"),
    f"{ON}fid --eval_feature_weights /nowhere/x.pth": ("/nowhere/x.pth", "no such file"),
    f"{ON}fid --eval_feature_model /nowhere/x": ("/nowhere/x", "save_pretrained"),
}


def parsed(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_evaluation_arguments(parser)
    return parser.parse_args(line.split())


@pytest.mark.parametrize("line", WRONG)
def test_wrong_uses(line: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_evaluation(parsed(line))
    for part in WRONG[line]:
        assert part in str(caught.value)


@pytest.mark.parametrize("missing", ["torchmetrics", "torch_fidelity", "torchvision"])
def test_a_missing_package_is_told_before_anything_is_loaded(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    with pytest.raises(UsageError) as caught:
        check_evaluation(parsed(f"{ON}fd_dinov2 fid"))
    pip_name = missing.replace("_", "-")
    assert f"pip install {pip_name}" in str(caught.value)
    # torchmetrics has no other remedy
    assert ("--eval_feature_model PATH" in str(caught.value)) == (missing != "torchmetrics")


def test_what_works_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"")
    for line in (
        "",
        f"{ON}fid kid fd_dinov2 precision_recall",
        f"{ON}precision_recall --eval_feature_weights {weights}",
        f"{ON}fid precision_recall --eval_feature_model {tmp_path} --eval_samples 50",
        f"{ON}fd_dinov2 {OWN}",
    ):
        check_evaluation(parsed(line))


def test_parsing_and_checking_load_nothing_heavy() -> None:
    code = (
        "import argparse, sys\n"
        f"from {evaluation_arguments.__name__} import check_evaluation, add_evaluation_arguments\n"
        "parser = argparse.ArgumentParser()\n"
        "add_evaluation_arguments(parser)\n"
        f"check_evaluation(parser.parse_args({f'{ON}kid {OWN}'.split()}))\n"
        "heavy = {'torch', 'transformers', 'torchmetrics', 'diffusers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
