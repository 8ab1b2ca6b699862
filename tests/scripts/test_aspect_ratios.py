"""--use_aspect_ratio_buckets in a run: batches of one size, told to the network, and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_curriculum.densities import shift_from_tokens
from tests.scripts.small_runs import BENCHES, finite, train


def write(folder: Path) -> Path:
    """Ten pictures, half of them wide."""
    folder.mkdir(parents=True)
    draw, entries = np.random.default_rng(0), []
    for number in range(10):
        size = (16, 32, 3) if number % 2 else (32, 20, 3)
        Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
        entries.append({"file_name": f"{number}.png", "text": f"picture {number}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


KEPT = ("--cache_latents", "--latent_crops", 2, "--random_flip")


@pytest.mark.parametrize(
    ("name", "kept"),
    [("text_to_image", ()), ("text_to_image_sdxl", ()), ("text_to_image_sdxl", KEPT), ("flow", ())],
)
def test_a_run_in_buckets_goes_on_as_it_would_have(
    name: str, kept: tuple[object, ...], tmp_path: Path
) -> None:
    bench = BENCHES[name](tmp_path / "bench")
    bench = replace(bench, images=write(tmp_path / "pictures"))
    more = ("--resolution", 16, "--use_aspect_ratio_buckets", "--lr_warmup_steps", 0)
    more = (*more, "--aspect_ratio_buckets", "16,24;24,16", "--checkpointing_steps", 3)
    more = (*more, *kept, "--report_to", "none", "--max_train_steps")
    key, shrunk = ("mean", 2) if kept else ("pixel_values", 1)
    step, seen = bench.module.training_step, list[Any]()

    def noted(run: Any, number: int, slots: Any, batch: dict[str, Any]) -> Any:
        seen.append(batch)
        return step(run, number, slots, batch)

    with mock.patch.object(bench.module, "training_step", noted):
        whole = bench.train(tmp_path / "whole", *more, 6)
    assert finite(whole)
    shapes = [tuple(shrunk * side for side in batch[key].shape[-2:]) for batch in seen]
    assert {*shapes} == {(16, 24), (24, 16)}
    if name == "text_to_image_sdxl":  # the size that is told is that of the sample
        for batch, shape in zip(seen, shapes, strict=True):
            told = batch["time_ids"][:, -2:].tolist()
            assert told == [list(shape)] * len(told)
            assert {tuple(row) for row in batch["time_ids"][:, :2].tolist()} <= {(16, 32), (32, 20)}

    bench.train(tmp_path / "parts", *more, 3)
    rest = bench.train(tmp_path / "parts", *more, 6, "--resume_from_checkpoint", "latest")
    assert rest.steps == whole.steps[3:]
    facts = json.loads((tmp_path / "whole" / "run.json").read_text())["facts"]["dataset"]
    assert facts["buckets"] == {"batch": 2, "16x24": 5, "24x16": 5}


def test_the_shift_of_a_sample_is_that_of_its_own_size(tmp_path: Path) -> None:
    bench = BENCHES["flow"](tmp_path / "bench")
    bench = replace(bench, images=write(tmp_path / "pictures"))
    more = ("--resolution", 16, "--use_aspect_ratio_buckets", "--lr_warmup_steps", 0)
    more = (*more, "--aspect_ratio_buckets", "16,16;16,32", "--report_to", "none")
    module, drawn = bench.module, list[Any]()
    predict = module.predict

    def noted(run: Any, latents: Any, conditioning: Any, sample: Any, draw: Any) -> Any:
        drawn.append((run, latents.shape[-2] * latents.shape[-1] // 4, sample))
        return predict(run, latents, conditioning, sample, draw)

    with mock.patch.object(module, "predict", noted):
        train(bench.argv(tmp_path / "run", *more, "--max_train_steps", 5), script=bench.script)
    tokens = {count for _, count, _ in drawn}
    assert len(tokens) == 2
    small = min(tokens)
    for run, count, sample in drawn:
        sigma = run.sampler.levels.sigma[sample.indices].double()
        s = shift_from_tokens(count) / shift_from_tokens(small)
        wanted = 1000 * s * sigma / (1 + (s - 1) * sigma)
        torch.testing.assert_close(sample.timesteps.double(), wanted, rtol=1e-4, atol=0.2)
        assert (sample.log_snr is None) == (count == small)
