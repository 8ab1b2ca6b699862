"""`diffusers-curriculum calibrate`: the law of data and networks in closed form, and its file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, UNet2DModel
from PIL import Image

from diffusers_curriculum import TimestepSampler
from diffusers_curriculum.cli import main
from diffusers_curriculum.pipelines import UnconditionalPipeline
from tests.scripts.small_runs import TINY_UNET, make_unconditional_bench

Capture = pytest.CaptureFixture[str]
STD = 0.32  # of pixels that seldom leave [-1, 1]
SCHEDULERS: dict[str, Any] = {
    "edm": EDMEulerScheduler(sigma_data=STD),
    "v_prediction": DDPMScheduler(prediction_type="v_prediction"),
}
FILE = "timestep_sampler_config.json"


def write_noise(folder: Path, count: int, std: float) -> Path:
    """Images of 8 x 8 whose pixels are independent: normal, or of two values for unit scale."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(1)
    for number in range(count):
        pixels = draw.standard_normal((8, 8, 3))
        pixels = np.sign(pixels) if std == 1 else (pixels * std).clip(-1, 1)
        plain = ((pixels + 1) * 127.5).round().astype(np.uint8)
        Image.fromarray(plain).save(folder / f"{number:03d}.png")
    return folder


def exact_pipeline(folder: Path, kind: str) -> Path:
    """A pipeline whose network answers 0, the best estimate there is: of v for independent numbers
    of unit variance, of EDM's F for normal ones of deviation sigma_data."""
    network: Any = UNet2DModel.from_config(TINY_UNET | {"sample_size": 8})
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    UnconditionalPipeline(SCHEDULERS[kind], unet=network).save_pretrained(folder)
    return folder


def calibrate(*argv: object) -> int:
    return main(["calibrate", *map(str, argv)])


def built(folder: Path) -> TimestepSampler:
    return TimestepSampler.from_config(json.loads((folder / FILE).read_text("utf-8")))


def distance(sampler: TimestepSampler, std: float) -> float:
    """Total variation between a law, without its floor, and cosh((l + 2 ln c) / 2)^-6."""
    log_snr = sampler.levels.positions + 2 * math.log(std)
    expected = torch.cosh(log_snr / 2).pow(-6) * -sampler.levels.edges.diff()
    law = sampler.law(0, torch.device("cpu"))
    return float((law / law.sum() - expected / expected.sum()).abs().sum() / 2)


def numbers(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line)]


@pytest.mark.parametrize(("kind", "std"), [("edm", STD), ("v_prediction", 1.0)])
@pytest.mark.parametrize("alone", [False, True], ids=["network", "data"])
def test_the_law_of_what_is_known_in_closed_form(
    kind: str, std: float, alone: bool, tmp_path: Path, capsys: Capture
) -> None:
    images, source = write_noise(tmp_path / "images", 100, std), tmp_path / "source"
    if alone:
        SCHEDULERS[kind].save_pretrained(source)
    else:
        exact_pipeline(source, kind)
    data = ("--train_data_dir", images, "--resolution", 8, "--cache_dir", tmp_path / "cache")
    assert calibrate(source, *data, "--output_dir", tmp_path / "law") == 0
    sampler = built(tmp_path / "law")
    assert distance(sampler, std) < 0.05
    assert (sampler.learns, sampler.floor) == (False, 0.1)
    told = capsys.readouterr().out.splitlines()
    centre = -2 * math.log(std)
    # quartiles of cosh(l / 2)^-6, by symmetry around its median, and 5 % of it
    found = numbers(next(line for line in told if line.startswith("log-SNR")))
    assert found == pytest.approx([c + centre for c in (0, -0.57, 0.57, -1.47, 1.47)], abs=0.15)
    normalised = next(line for line in told if line.startswith("normalised"))
    scale, _, quartiles = normalised.rpartition(": ")
    assert float(scale.rpartition(" ")[2]) == pytest.approx(std, rel=0.03)
    assert numbers(quartiles) == pytest.approx([-0.57, 0, 0.57], abs=0.15)
    inside = sampler.levels.log_snr
    share = float(((inside < found[3]) | (inside > found[4])).double().mean())
    outside = next(line for line in told if "uniform draws" in line)
    assert int(outside.partition("%")[0]) == pytest.approx(100 * share, abs=1)
    assert told[-1] == f"--timestep_sampler_config {tmp_path / 'law' / FILE}"


def test_it_trains_from_its_file(tmp_path: Path, capsys: Capture) -> None:
    bench = make_unconditional_bench(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    argv = ("--train_data_dir", bench.images, "--resolution", 8, "--cache_dir", bench.cache)
    assert calibrate(tmp_path / "scheduler", *argv, "--output_dir", tmp_path / "law") == 0
    file = tmp_path / "law" / FILE
    bench.train(tmp_path / "run", "--max_train_steps", 2, "--timestep_sampler_config", file)
    used = json.loads((tmp_path / "run" / "timestep_sampler" / FILE).read_text("utf-8"))
    assert used["density_args"] == built(tmp_path / "law").config["density_args"]
    assert calibrate(tmp_path / "run", *argv, "--samples", 8, "--output_dir", tmp_path / "on") == 0
    laws = [built(tmp_path / name).config["density_args"]["density"] for name in ("law", "on")]
    assert laws[0] != laws[1]  # of the data alone, and of the network


def test_what_cannot_be_calibrated_is_refused_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    images, source = (
        write_noise(tmp_path / "images", 12, STD),
        exact_pipeline(tmp_path / "p", "edm"),
    )
    SCHEDULERS["edm"].save_pretrained(tmp_path / "s")
    cases = (
        ((tmp_path / "nothing",), "there is no such file"),
        ((tmp_path / "s", "--samples", 8), "--samples is 8, which has no effect on a scheduler"),
        ((tmp_path / "s", "--bins", 8), "--bins is 8, which has no effect on a scheduler alone"),
        ((source, "--bins", 1), "--bins is 1: it must be at least 2"),
        ((source, "--samples", 64), "there are 12 samples of data: give at most 10"),
        ((source, "--device", "none"), "--device is 'none'"),
        ((source, "--output_dir", images), "exists already"),
    )
    data = ("--train_data_dir", images, "--cache_dir", tmp_path / "cache")
    for argv, message in cases:
        assert calibrate("--output_dir", tmp_path / "law", *argv, *data) == 2
        out, err = capsys.readouterr()
        lines = [x for x in err.splitlines() if x.startswith("diffusers-curriculum calibrate")]
        assert out == ""
        assert len(lines) == 1
        assert message in lines[0]
        assert not (tmp_path / "law").exists()


def test_images_that_are_all_the_same_have_no_law(tmp_path: Path, capsys: Capture) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for number in range(4):
        (tmp_path / "same").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "same" / f"{number}.png")
    DDPMScheduler().save_pretrained(tmp_path / "s")
    data = ("--train_data_dir", tmp_path / "same", "--cache_dir", tmp_path / "cache")
    argv = ("--resolution", 8, "--output_dir", tmp_path / "law")
    assert calibrate(tmp_path / "s", *data, *argv) == 2
    assert "4 images half known" in capsys.readouterr().err
