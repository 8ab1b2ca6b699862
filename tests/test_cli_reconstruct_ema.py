"""`diffusers-curriculum reconstruct-ema`: a copy of a pipeline with averaged weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_curriculum.cli import main
from diffusers_curriculum.training.parts.averages import PowerEMA
from diffusers_curriculum.training.parts.reconstruction import gamma_of

STEPS = 120
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_run(folder: Path, *, every: int = 10, shard: str = "10GB") -> list[np.ndarray]:
    """A finished run with snapshots; the weights of its first parameter after each step."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    ema = PowerEMA(unet.named_parameters(), config=unet.config)
    first, course = next(unet.parameters()), []
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.01 * np.cos(step / 20))
        course.append(first.detach().double().numpy().copy())
        ema.update(step)
        if step % every == 0:
            ema.snapshot(folder / "power_ema", step)
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.save_pretrained(folder, max_shard_size=shard)
    (folder / "timestep_sampler_config.json").write_text("{}")
    (folder / "checkpoint-120").mkdir()
    return course


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, make_run(folder)


def call(*argv: object) -> int:
    return main(["reconstruct-ema", *map(str, argv)])


def refused(capsys, *argv: object) -> str:
    """The one line of a command that is refused."""
    assert call(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def expected(course: list[np.ndarray], sigma_rel: float) -> np.ndarray:
    """The direct mean over all steps."""
    edges = np.arange(len(course) + 1) / len(course)
    return np.tensordot(np.diff(edges ** (gamma_of(sigma_rel) + 1)), np.stack(course), 1)


@pytest.mark.parametrize("step", [None, 80])
def test_the_copy_has_the_average_and_the_run_stays_as_it_was(run, tmp_path, capsys, step):
    folder, course = run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = () if step is None else ("--step", step)
    assert call(folder, "--sigma_rel", 0.075, "--output_dir", tmp_path / "a" / "out", *flags) == 0
    out = tmp_path / "a" / "out"
    told = capsys.readouterr().out
    assert f"unet averaged with sigma_rel=0.075 at step {step or STEPS}, from 24 snapshots" in told
    unet = DDPMPipeline.from_pretrained(out).unet
    found = next(unet.parameters()).detach().double().numpy()
    wanted = expected(course[:step], 0.075)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(course[(step or STEPS) - 1] - wanted).max() > 5e-3  # the weights themselves
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert {path.name for path in out.iterdir()} == {
        "unet",
        "scheduler",
        "model_index.json",
        "timestep_sampler_config.json",
        "ema_reconstruction.json",
    }
    report = json.loads((out / "ema_reconstruction.json").read_text())
    assert report["residual"] < 0.02
    assert sum(report["coefficients"].values()) == pytest.approx(1)
    assert {path: path.read_bytes() for path in before} == before


def test_sharded_and_half_precision_weights_keep_their_form(tmp_path):
    course = make_run(tmp_path / "run", every=20, shard="20KB")
    network = tmp_path / "run" / "unet"
    shards = sorted(path.name for path in network.glob("*.safetensors"))
    assert len(shards) > 1
    index = json.loads((network / f"{WEIGHTS}.index.json").read_text())
    assert call(tmp_path / "run", "--sigma_rel", 0.1, "--output_dir", tmp_path / "out") == 0
    for shard in shards:
        names = {name for name, file in index["weight_map"].items() if file == shard}
        with safe_open(tmp_path / "out" / "unet" / shard, framework="pt") as file:
            assert set(file.keys()) == names
            assert file.metadata() == {"format": "pt"}  # which other libraries insist on
    unet = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    found = next(unet.parameters()).detach().double().numpy()
    np.testing.assert_allclose(found, expected(course, 0.1), atol=1e-5)
    unet.half().save_pretrained(network)
    for path in network.glob("*-of-*"):
        path.unlink()
    assert call(tmp_path / "run", "--sigma_rel", 0.1, "--output_dir", tmp_path / "half") == 0
    saved = load_file(tmp_path / "half" / "unet" / WEIGHTS)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}


def test_nothing_is_written_over(run, tmp_path, capsys):
    folder, _ = run
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").touch()
    flags = ("--sigma_rel", 0.1, "--output_dir")
    assert "exists already: name a new folder" in refused(capsys, folder, *flags, taken)
    assert "exists already" in refused(capsys, folder, *flags, folder)
    assert "exists already" in refused(capsys, folder, *flags, taken / "mine.txt")
    assert "lies in" in refused(capsys, folder, *flags, folder / "unet" / "new")
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    (taken / "mine.txt").unlink()
    assert call(folder, *flags, taken) == 0  # an empty folder may be given


def test_what_cannot_be_made_is_refused_before_anything_is_written(run, tmp_path, capsys):
    folder, _ = run
    out = ("--output_dir", tmp_path / "out")
    assert "holds no pipeline" in refused(capsys, tmp_path, "--sigma_rel", 0.1, *out)
    assert "sigma_rel is 0.5" in refused(capsys, folder, "--sigma_rel", 0.5, *out)
    assert "outside 1..120" in refused(capsys, folder, "--sigma_rel", 0.1, "--step", 121, *out)
    assert "of its profile out" in refused(capsys, folder, "--sigma_rel", 0.25, *out)
    assert not (tmp_path / "out").exists()
    assert call(folder, "--sigma_rel", 0.25, "--max_residual", 0.5, *out) == 0


def test_snapshots_of_another_model_are_refused(tmp_path, capsys):
    make_run(tmp_path / "run", every=60)
    config = tmp_path / "run" / "unet" / "config.json"
    changed = json.loads(config.read_text()) | {"dropout": 0.25}
    config.write_text(json.dumps(changed))
    out = ("--sigma_rel", 0.1, "--output_dir", tmp_path / "out")
    assert "of a model with another config" in refused(capsys, tmp_path / "run", *out)
    config.write_text("[]")
    assert "holds no object" in refused(capsys, tmp_path / "run", *out)
    for path in (tmp_path / "run" / "power_ema").iterdir():
        path.unlink()
    assert "holds no snapshots" in refused(capsys, tmp_path / "run", *out)
    (tmp_path / "run" / "unet" / WEIGHTS).unlink()
    assert "holds no safetensors file" in refused(capsys, tmp_path / "run", *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_weights_of_another_shape_leave_nothing_behind(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "run", every=60)
    path = tmp_path / "run" / "unet" / WEIGHTS
    tensors = load_file(path)
    save_file(tensors | {"conv_in.bias": torch.zeros(9)}, path, metadata={"format": "pt"})
    out = ("--sigma_rel", 0.1, "--output_dir", tmp_path / "out")
    assert "conv_in.bias has shape (9,) and its average (8,)" in refused(
        capsys, tmp_path / "run", *out
    )
    del tensors["conv_in.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "lacks 1 averaged weights, as conv_in.bias" in refused(capsys, tmp_path / "run", *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
