"""A run that went wrong saves nothing, a run that went well is pushed, and no token is left."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import train_text_to_image_curriculum as script
from diffusers_curriculum import training
from diffusers_curriculum.training.checkpoint import remote
from diffusers_curriculum.training.publish import hub
from tests.scripts.small_runs import Bench, checkpoint_names, status, train

TOKEN = "hf_ThisIsTheSecretOfTheTest"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.reliability
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run(
    bench: Bench,
    tmp_path: Path,
    log_every: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward, calls = UNet2DConditionModel.forward, [0]

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        (output,) = forward(self, *args, **kwargs)
        return (output * (torch.nan if calls[0] == 3 else 1.0),)

    monkeypatch.setattr(UNet2DConditionModel, "forward", failing)
    more = ("--max_train_steps", 9, "--checkpointing_steps", 2, "--log_every", log_every)
    assert status(bench.argv(tmp_path, *more, "--use_ema")) == 3
    assert "not finite" in capsys.readouterr().err
    assert checkpoint_names(tmp_path) == {"checkpoint-2"}
    assert not (tmp_path / "model_index.json").exists()
    assert calls[0] <= 4


@pytest.mark.reliability
def test_a_gradient_that_is_not_finite_ends_the_run(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = script.training_step

    def failing(run: Any, number: int, *args: Any) -> Any:
        result = step(run, number, *args)
        if number == 1:
            next(iter(run.models.network.parameters())).grad[0] = torch.inf
        return result

    monkeypatch.setattr(script, "training_step", failing)
    more = ("--max_train_steps", 4, "--checkpointing_steps", 1)
    assert status(bench.argv(tmp_path, *more)) == 3
    assert checkpoint_names(tmp_path) == {"checkpoint-1"}


# -- the Hub ---------------------------------------------------------------------------------------


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_no_file_holds_the_token(bench: Bench, tmp_path: Path) -> None:
    more = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--hub_token", TOKEN)
    train(bench.argv(tmp_path, *more))
    files = bytes_below(tmp_path)
    assert any("events.out" in name for name in files)
    assert [name for name, content in files.items() if TOKEN.encode() in content] == []


class FakeApi:
    """What huggingface_hub's client is asked for."""

    def __init__(self, token: str | None) -> None:
        self.token = token
        self.created: list[str] = []
        self.commits: list[dict[str, bytes]] = []

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        self.created.append(name)
        return type("Address", (), {"repo_id": f"somebody/{name}"})

    def create_commit(self, name: str, additions: Any, *, commit_message: str) -> Any:
        files = {a.path_in_repo: a.path_or_fileobj for a in additions}
        self.commits.append({k: Path(v).read_bytes() for k, v in files.items()})
        self.created.append(f"{name}: {commit_message}")
        return type("Commit", (), {"commit_url": "https://example.org/commit"})


@pytest.mark.parametrize("prompts", [(), ("--validation_prompts", "a")])
@pytest.mark.parametrize("finished", [False, True])
def test_push_needs_neither_prompts_nor_wandb(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompts: tuple[str, ...],
    finished: bool,
) -> None:
    api = FakeApi(TOKEN)
    monkeypatch.setattr(hub, "make_client", lambda token, given: api)
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    folder = tmp_path / "sd-pictures"
    if finished:
        train(bench.argv(folder, "--max_train_steps", 1, "--checkpointing_steps", 1))
    more = ("--push_to_hub", "--hub_token", TOKEN, "--resume_from_checkpoint", "latest", *prompts)
    record = train(bench.argv(folder, *more, "--max_train_steps", 1))
    assert len(record.steps) == int(not finished)
    assert api.created == ["sd-pictures", "somebody/sd-pictures: End of training"]
    (commit,) = api.commits
    law = "timestep_sampler/timestep_sampler_config.json"
    assert {"README.md", "model_index.json", law} <= commit.keys()
    assert ("val_imgs_grid.png" in commit) == bool(prompts)
    assert not any("checkpoint" in name or "logs" in name for name in commit)
    assert b"somebody/sd-pictures" in commit["README.md"]
    assert [name for name, content in commit.items() if TOKEN.encode() in content] == []
    assert not any(TOKEN.encode() in content for content in bytes_below(folder).values())


def test_every_save_pushes_what_a_run_can_go_on_from(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = FakeApi(TOKEN)
    monkeypatch.setattr(hub, "make_client", lambda token, given: api)
    more = ("--checkpointing_steps", 2, "--validation_split", 0.5, "--use_ema")
    pushed = (*more, "--push_to_hub", "--hub_token", TOKEN, "--hub_strategy", "every_save")
    whole = train(bench.argv(tmp_path / "first", "--max_train_steps", 4, *pushed))
    assert api.created[1:] == [
        f"somebody/first: {m}" for m in ("Step 2", "Step 4", "End of training")
    ]
    first, _, last = api.commits
    assert "last-checkpoint/manifest.json" in first
    assert first["model_index.json"] == last["model_index.json"]
    assert first[f"unet/{WEIGHTS}"] != last[f"unet/{WEIGHTS}"]
    assert "validation_loss.png" in first
    card = last["README.md"].decode()
    for part in ("validation_loss.png", "from_pretrained('somebody/first')", "max_train_steps: 4"):
        assert part in card
    assert str(tmp_path) not in card
    assert not any(TOKEN.encode() in content for content in last.values())

    # As huggingface_hub would bring it (tests/training/publish/test_hub_transfer.py)
    for name, content in first.items():
        path = tmp_path / "snapshot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(remote, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    resumed = ("--resume_from_checkpoint", "hub:somebody/first")
    rest = train(bench.argv(tmp_path / "again", "--max_train_steps", 4, *more, *resumed))
    assert rest.steps == whole.steps[2:]


# -- devices ---------------------------------------------------------------------------------------


def fixed_devices(tree: ast.AST) -> list[int]:
    """Lines that choose a device by name; asking which one is there is no choice."""
    asked = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"(cuda|mps|xpu)(:\d+)?", node.value)
            and id(node) not in asked
        )
        or (
            isinstance(node, ast.Call)
            and re.search(r"(^|\.)cuda(\.(?!is_available)\w+)?$", ast.unparse(node.func))
        )
    ]


def test_no_device_is_hard_coded() -> None:
    files = [Path(script.__file__), *Path(training.__path__[0]).rglob("*.py")]
    assert len(files) > 10
    found = {file.name: fixed_devices(ast.parse(file.read_text("utf-8"))) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('x.to("cuda")', 1),
        ('torch.autocast("cuda")', 1),
        ("x.cuda()", 1),
        ("torch.cuda.empty_cache()", 1),
        ('torch.device("cuda:0")', 1),
        ('device.type == "cuda"', 0),
        ("torch.cuda.is_available()", 0),
        ("x.to(accelerator.device)", 0),
    ],
)
def test_a_hard_coded_device_would_be_found(source: str, count: int) -> None:
    assert len(fixed_devices(ast.parse(source))) == count
