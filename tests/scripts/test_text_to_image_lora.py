"""Training an adapter: what is trained, clipped, averaged, saved and pushed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.loop import job
from diffusers_curriculum.training.parts.adapters import WEIGHTS_FILE
from diffusers_curriculum.training.parts.families.base import ModelFamily
from diffusers_curriculum.training.publish import hub
from tests.scripts.small_runs import Bench, adapted, status
from tests.scripts.test_faults_and_push import TOKEN, FakeApi, bytes_below

STEPS = ("--max_train_steps", 3, "--checkpointing_steps", 3)


@pytest.fixture
def lora(bench: Bench) -> Bench:
    """The script of this file on the small pipeline."""
    return adapted(bench)


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("limit", [1e-4, 1e6])
def test_the_applied_update_is_clipped(
    lora: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, accumulation: int
) -> None:
    before: list[Tensor] = []

    def descent(args: Any, parameters: list[Tensor], *rest: Any) -> Any:
        before.extend(parameter.detach().clone() for parameter in parameters)
        return torch.optim.SGD(parameters, lr=1.0)

    monkeypatch.setattr(job, "build_optimizer", descent)
    more = ("--max_grad_norm", limit, "--gradient_accumulation_steps", accumulation)
    record = lora.train(tmp_path, "--max_train_steps", 1, *more)
    pairs = zip(before, record.last.weights.parameters(), strict=True)
    moved = torch.cat([(a.detach() - b).flatten().double() for b, a in pairs])
    norm = record.steps[0].norm
    assert norm is not None
    assert 100 * 1e-4 < norm < 1e6  # far longer than the limit
    assert float(moved.norm()) == pytest.approx(min(norm, limit), rel=1e-2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_adapter_alone_changes_and_is_float32(
    lora: Bench, tmp_path: Path, precision: str
) -> None:
    record = lora.train(tmp_path, *STEPS, "--mixed_precision", precision)
    unet, run = record.last.models.network, record.last
    mine = {id(parameter) for parameter in run.weights.parameters()}
    assert {p.dtype for p in run.weights.parameters()} == {torch.float32}
    assert {p.dtype for p in run.models.vae.parameters()} == {
        p.dtype for p in unet.parameters() if id(p) not in mine
    }
    base = UNet2DConditionModel.from_pretrained(lora.pipeline / "unet").state_dict()
    now = {
        k.replace(".base_layer", ""): v for k, v in unet.state_dict().items() if "lora_" not in k
    }
    assert now.keys() == base.keys()
    assert all(torch.equal(now[k], w.to(now[k].dtype)) for k, w in base.items())
    assert all(bool(w.any()) for k, w in run.weights.state_dict().items() if "lora_B" in k)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == mine


def test_recomputing_gives_the_same_gradients(lora: Bench, tmp_path: Path) -> None:
    plain = lora.train(tmp_path / "a", *STEPS)
    again = lora.train(tmp_path / "b", *STEPS, "--gradient_checkpointing")
    assert again.steps == plain.steps
    assert all(step.norm for step in plain.steps)


# -- what is saved ---------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_and_not_the_base(lora: Bench, tmp_path: Path) -> None:
    record = lora.train(tmp_path, *STEPS, "--use_ema", "--ema_decay", 0.5)
    weights = record.last.weights.state_dict()
    folder = tmp_path / "checkpoint-3"
    files = {p.relative_to(folder).as_posix(): load_file(p) for p in folder.rglob("*.safetensors")}
    saved = files[f"lora/{WEIGHTS_FILE}"]
    assert {name: w.shape for name, w in saved.items()} == {k: w.shape for k, w in weights.items()}
    averaged = files["lora_ema/diffusion_pytorch_model.safetensors"]
    assert averaged.keys() == saved.keys()
    assert any(not torch.equal(averaged[name], w) for name, w in saved.items())
    numbers = sum(w.numel() for w in weights.values())
    held = {name: sum(t.numel() for t in tensors.values()) for name, tensors in files.items()}
    assert held.pop("optimizer.safetensors") == 2 * numbers + len(weights)
    assert max(held.values()) == numbers
    left = load_file(tmp_path / WEIGHTS_FILE)  # averages are what a run leaves
    assert all(torch.equal(left[name], w) for name, w in averaged.items())


def test_another_base_is_another_run(
    lora: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora.train(tmp_path / "run", *STEPS)
    other = Path(shutil.copytree(lora.pipeline, tmp_path / "other"))
    (file,) = (other / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"] += 1  # of the same name and size
    save_file(weights, file, metadata={"format": "pt"})
    more = ("--resume_from_checkpoint", "latest", "--pretrained_model_name_or_path", other)
    assert status(lora.argv(tmp_path / "run", *STEPS, *more), lora.script) == 2
    assert "digest of the base model's frozen network is" in capsys.readouterr().err


# -- the Hub ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [(), ("--validation_prompt", "a")])
def test_an_adapter_is_pushed(
    lora: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: tuple[str, ...]
) -> None:
    api = FakeApi(TOKEN)
    monkeypatch.setattr(hub, "make_client", lambda token, given: api)
    more = ("--push_to_hub", "--hub_token", TOKEN, "--prediction_type", "v_prediction")
    lora.train(tmp_path / "my-lora", *STEPS, *more, *prompt)
    (commit,) = api.commits
    expected = {"README.md", WEIGHTS_FILE, "timestep_sampler/timestep_sampler_config.json"}
    assert commit.keys() == expected | ({"val_imgs_grid.png"} if prompt else set())
    card = commit["README.md"].decode()
    for part in (
        "# LoRA weights: somebody/my-lora",
        "- lora\n",
        "load_lora_weights('somebody/my-lora')",
        'prediction_type="v_prediction"',
        "* Rank: 4",
    ):
        assert part in card
    assert not any(TOKEN.encode() in content for content in bytes_below(tmp_path).values())


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--rank", 0), ("--rank is 0", "at least 1")),
        (("--lora_alpha", -1), ("--lora_alpha is -1.0", "above 0")),
        (("--lora_dropout", 1), ("--lora_dropout is 1.0", "[0, 1)")),
        (("--lora_target_modules", "to_w"), ("'to_w'", "names end in")),
        (("--lora_target_modules", "norm1"), ("norm1", "is not supported")),
        (("--rank", 3, "--init_lora_weights", "orthogonal"), ("--rank 3", "even")),
        (("--use_dora", "--save_format", "kohya"), ("--use_dora", "--save_format diffusers")),
        (("--validation_steps", 1), ("--validation_steps", "--validation_prompt")),
    ],
)
def test_a_wrong_adapter_is_refused_before_a_model_is_loaded(
    lora: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[object, ...],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.setattr(ModelFamily, "load_part", lambda *args: pytest.fail("a model is loaded"))
    assert status(lora.argv(tmp_path, *STEPS, *more), lora.script) == 2
    told = capsys.readouterr().err
    assert [part for part in parts if part not in told] == []


def test_without_peft_the_package_is_named(
    lora: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = environment.installed
    monkeypatch.setattr(environment, "installed", lambda name: name != "peft" and installed(name))
    assert status(lora.argv(tmp_path, *STEPS), lora.script) == 2
    assert "pip install 'diffusers-curriculum[lora]'" in capsys.readouterr().err
