"""--cache_latents in the scripts of captions: what is trained stays the same.

What a cache holds and refuses: tests/training/cache. Images alone: test_image_scripts.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.scripts.small_runs import BENCHES, Bench, hashes, status

SCRIPTS = ["text_to_image", "text_to_image_lora", "text_to_image_sdxl"]
CACHED = ("--cache_latents", "--latent_crops", 2, "--random_flip")


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each script of captions but the one of flow matching; see test_flow_families.py."""
    return BENCHES[request.param](tmp_path_factory.mktemp("bench"))


def test_kept_latents_give_the_same_run(script: Bench, tmp_path: Path) -> None:
    more = ("--max_train_steps", 3, "--lr_warmup_steps", 0, "--center_crop", "--noise_offset", 0.1)
    kept = script.train(tmp_path / "kept", *more, "--cache_latents")
    plain = script.train(tmp_path / "plain", *more)
    found, expected = ([float.fromhex(loss) for loss in run.losses] for run in (kept, plain))
    assert found == pytest.approx(expected, rel=1e-5)
    files = {path.name for path in (tmp_path / "kept" / "latents").iterdir()}
    told_sizes = {"size.npy"} if "sdxl" in script.script else set()
    assert files == {"manifest.json", "verified.json", "mean.npy", "std.npy"} | told_sizes
    assert not kept.last.models.has_vae


def test_a_run_with_kept_latents_goes_on_bit_for_bit(
    script: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*CACHED, "--max_train_steps", 4, "--checkpointing_steps", 2, "--use_ema")
    more += ("--curriculum", "difficulty", "--curriculum_patience", 1)
    more += ("--curriculum_max_share", 9, "--latent_cache_dir", tmp_path / "cache")
    whole = script.train(tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = (*more, "--resume_from_checkpoint", "latest")
    rest = script.train(tmp_path / "again", *resumed)
    assert rest.steps == whole.steps[2:]
    last = tmp_path / "whole" / "checkpoint-4"
    assert hashes(tmp_path / "again" / "checkpoint-4") == hashes(last)

    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    without = [word for word in script.argv(tmp_path / "again", *resumed) if word != CACHED[0]]
    at = without.index("--latent_crops")
    del without[at : at + 2]
    at = without.index("--latent_cache_dir")
    del without[at : at + 2]
    assert status(without, script.script) == 2
    assert "images.cache_latents is " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_curves_with_and_without_agree_within_the_spread_of_seeds(
    script: Bench, tmp_path: Path
) -> None:
    """Of images from which crops are cut out at different places: two of each, or any."""
    steps, seeds = 2000 if script.script == Bench.script else 500, 5
    wide = tmp_path / "wide"
    shutil.copytree(script.images, wide)
    for number, path in enumerate(sorted(wide.glob("*.png"))):
        with Image.open(path) as image:
            image.resize((24 + 4 * number, 12)).save(path)
    means: dict[bool, list[list[float]]] = {True: [], False: []}
    for seed in range(seeds):
        for kept, found in means.items():
            more = CACHED if kept else ("--random_flip",)
            common = ("--train_data_dir", wide, "--max_train_steps", steps, "--seed", seed)
            common += ("--lr_warmup_steps", 0)
            record = script.train(tmp_path / f"{seed}-{kept}", *common, *more, batch=4)
            losses = np.array([float.fromhex(loss) for loss in record.losses])
            found.append(losses.reshape(4, -1).mean(1).tolist())
    with_cache, without = np.array(means[True]), np.array(means[False])
    spread = without.std(0, ddof=1)
    apart = np.abs(with_cache.mean(0) - without.mean(0))
    print(f"apart {apart}, spread of {seeds} seeds {spread}")
    assert (apart < spread).all()
