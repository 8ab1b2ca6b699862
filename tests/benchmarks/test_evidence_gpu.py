"""benchmarks/evidence: networks of diffusers, a device, and the tier for a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import data, large, training
from benchmarks.evidence.cells import SETTINGS, Cell, cells_of, config
from benchmarks.evidence.large import SeveralNetworks
from benchmarks.evidence.measuring import prepare
from benchmarks.evidence.running import seconds_of
from benchmarks.evidence.sampling import generate, generators

DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "patch_size": 4,
}
UNET = {
    "_class_name": "UNet2DModel",
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
MINUSCULE = {"steps": 2, "first_checkpoint": 1, "seeds": 2, "batch": 4, "samples": 8}


@pytest.fixture
def minuscule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tier for a GPU with other networks, pictures of 8 x 8, and next to no steps."""
    for name, told in (("dit_s_4", DIT), ("small_unet", UNET)):
        (tmp_path / f"{name}.json").write_text(json.dumps(told), "utf-8")
    monkeypatch.setattr(large, "network_file", lambda name: str(tmp_path / f"{name}.json"))
    names = ["cat", "dog", "cat-off", "dog-off"] * 10
    random = np.random.default_rng(0)
    found = data.captioned([*random.random((len(names), 8, 8))], names)
    monkeypatch.setitem(data.DATA, "icons_64", lambda: found)
    few = MINUSCULE | {"sampling_steps": [2]}
    monkeypatch.setitem(config("tiers", "gpu"), "settings", few)
    clear()
    yield
    clear()


def clear() -> None:
    data.pictures.cache_clear()
    large.forward_flops.cache_clear()


@pytest.mark.parametrize("name", ["dit_s_4", "small_unet"])
@pytest.mark.usefixtures("minuscule")
def test_networks_of_diffusers_are_one_for_each_seed(name: str) -> None:
    words = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    shape = {"size": 64, "name": name, "classes": 2}
    many = SeveralNetworks(range(3), words=words, **shape)
    alone = SeveralNetworks([1], words=words, **shape)
    with torch.no_grad():
        for parameter in [*many.networks[1].parameters()]:
            parameter.add_(0.01)  # a DiT starts as zero
        for parameter in alone.parameters():
            parameter.add_(0.01)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, many.nothing, 0, 1]] * 3)
    level = torch.linspace(-8, 8, 5).expand(3, 5)
    found = many(x, level, labels)
    assert found.shape == x.shape
    torch.testing.assert_close(found[1], alone(x[1:2], level[1:2], labels[1:2])[0])
    others = many(x, level, labels.flip(1))[1]
    assert (others[:2] - found[1][:2]).abs().max() > 1e-6
    assert torch.equal(others[2], found[1][2])  # nothing in both
    assert (many(x, -level, labels)[1][0] - found[1][0]).abs().max() > 1e-6
    found[1].square().sum().backward()
    grads = [[p.grad for p in network.parameters()] for network in many.networks]
    reached = [any(g is not None and bool(g.any()) for g in each) for each in grads]
    assert reached == [False, True, False]
    plain = SeveralNetworks([0], words=None, **shape)
    plain(x[:1], level[:1], torch.full((1, 5), plain.nothing))  # a row of its tables


@pytest.mark.usefixtures("minuscule")
def test_the_tier_for_a_gpu_runs_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.evidence.judge.STEPS", 2)
    folder, text = tmp_path / "out", tmp_path / "out" / "RESULTS.md"
    told = ["--only", "icons_64_*", "--output_dir", str(folder)]
    assert command.main(["gpu", "--held_out", "--processes", "1", *told]) == 0
    found = [json.loads(file.read_text("utf-8")) for file in folder.glob("icons_64_*.json")]
    assert len(found) == 6
    for each in found:
        assert each["config"]["network"]["_class_name"] in ("DiTTransformer2DModel", "UNet2DModel")
        assert len(each["checkpoints"][-1]["metrics"]["agreement"]) == 2
    assert command.main(["report", "--tier", "gpu", *told, "--results", str(text)]) == 0
    assert "### icons_64_dit, linear_v" in text.read_text("utf-8")


@pytest.mark.usefixtures("minuscule")
def test_training_moves_each_network_and_its_average(tmp_path: Path) -> None:
    (one,) = [c for c in cells_of("gpu") if c.name == "icons_64_unet/linear_v/uniform"]
    trainer = prepare(one, tmp_path)
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.step(0)
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize(
    ("task", "target", "method"),
    [
        ("digits", "linear_v", "min_snr"),
        ("digits", "edm", "uniform"),
        ("mixture_2", "flow", "logit_normal"),
        ("icons_64_dit", "linear_v", "laplace_0_1"),
        ("icons_64_unet", "flow", "uniform"),
    ],
)
@pytest.mark.usefixtures("minuscule")
def test_all_of_a_step_and_of_a_sample_is_on_the_device(
    task: str, target: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device "meta", whose tensors have no numbers and suffer none of another device."""
    monkeypatch.setattr(training, "normal", lambda shape, _: torch.empty(shape, device="meta"))
    monkeypatch.setattr(training, "generators", lambda seeds, what, _="": generators(seeds, what))
    few = SETTINGS | MINUSCULE | {"width": 8, "blocks": 1}
    trainer = prepare(Cell(task, target, method, few), tmp_path, "meta")
    trainer.optimizer = torch.optim.AdamW(trainer.parameters)  # the fused one knows real devices
    trainer.step(0)
    assert {p.device.type for p in [*trainer.parameters, *trainer.average]} == {"meta"}
    noise = torch.empty(2, 8, trainer.task.size, device="meta")  # type: ignore[attr-defined]
    labels = torch.zeros(8, dtype=torch.long, device="meta") if trainer.network.nothing else None
    made = generate(trainer.network, trainer.target, noise, labels, steps=2, guidance=2.0)
    assert made.device.type == "meta"
    assert made.shape == noise.shape


def test_a_gpu_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["quick", "--device", "cuda", "--output_dir", str(tmp_path)]) == 2
    assert "--device cuda: torch finds no CUDA GPU here" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_the_tier_for_a_gpu_is_sized_for_400_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    blank = data.Pictures(torch.zeros(2, 64 * 64), torch.tensor([0, 1]), 2)
    monkeypatch.setitem(data.DATA, "icons_64", lambda: blank)
    clear()
    total = sum(seconds_of(cell, "cuda") for cell in cells_of("gpu"))
    clear()
    assert 300 < total < 400
