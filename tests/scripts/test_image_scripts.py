"""Every formulation, latent space and network: trains, resumes bit for bit, exports and draws."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_curriculum.training.parts.averages import SNAPSHOTS_FOLDER
from tests.scripts.image_runs import (
    CLASS_SCRIPT,
    FORMULATIONS,
    NETWORKS,
    SPACES,
    UNCONDITIONAL_SCRIPT,
    Materials,
    drawn,
    load_pipeline,
    make_materials,
)
from tests.scripts.small_runs import finite, hashes, train

STEPS, STOPPED = 50, 23
EVERYTHING = (
    *("--max_train_steps", STEPS, "--use_ema", "--random_flip"),
    *("--power_ema", 0.1, "--power_ema_snapshot_steps", 25),
    *("--curriculum", "difficulty", "--curriculum_clusters", 4, "--curriculum_patience", 2),
    *("--curriculum_max_share", 1, "--timestep_draw", "stratified"),
)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    torch.set_num_threads(1)
    return make_materials(tmp_path_factory.mktemp("materials"))


def cases() -> list[object]:
    """All of the class-conditional script; of the other, one network of each pair is slow."""
    found: list[object] = []
    for script, kind, space, network in product(
        (CLASS_SCRIPT, UNCONDITIONAL_SCRIPT), FORMULATIONS, SPACES, NETWORKS
    ):
        few = kind in ("v_prediction", "sample") and space != "pixels"
        half = script == UNCONDITIONAL_SCRIPT and (network == "dit") == (space == "pixels")
        marks = (pytest.mark.slow,) if few or half else ()
        name = "-".join([script.split(".")[1], kind, space, network])
        found.append(pytest.param(script, kind, space, network, id=name, marks=marks))
    return found


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("script", "kind", "space", "network"), cases())
def test_trains_resumes_exports_and_draws_again(
    materials: Materials, tmp_path: Path, script: str, kind: str, space: str, network: str
) -> None:
    options = (*FORMULATIONS[kind], *EVERYTHING)
    if space != "pixels" and network == "unet":
        options += ("--cache_latents",)
    whole, part = tmp_path / "whole", tmp_path / "part"
    argv = materials.argv(whole, script, network, space, *options)
    record = train([*argv, "--checkpointing_steps", str(STOPPED)], script=script)
    assert record.numbers == list(range(STEPS))
    assert finite(record)

    # Go on from the middle
    shutil.copytree(whole / f"checkpoint-{STOPPED}", part / f"checkpoint-{STOPPED}")
    again = materials.argv(part, script, network, space, *options)
    rest = train([*again, "--resume_from_checkpoint", "latest"], script=script)
    assert rest.steps == record.steps[STOPPED:]
    folder = "transformer" if network == "dit" else "unet"
    for name in (folder, SNAPSHOTS_FOLDER):
        assert hashes(part / name) == hashes(whole / name)
        assert hashes(whole / name)

    # The exported pipelines draw the same, and what they draw depends on the seed and the class
    conditional = script == CLASS_SCRIPT
    first, second = (drawn(load_pipeline(output), conditional) for output in (whole, part))
    # the weights are the same bits, but kernels may round otherwise at other addresses in memory
    assert np.abs(first - second).max() < 1e-5
    assert np.isfinite(first).all()
    assert first.std() > 0
