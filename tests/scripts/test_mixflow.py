"""MixFlow's slower inputs in the training scripts: other noise, the same levels and targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.scripts.image_runs import CLASS_SCRIPT, UNCONDITIONAL_SCRIPT, Materials, make_materials
from tests.scripts.small_runs import Bench, finite, status, train


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    torch.set_num_threads(1)
    return make_materials(tmp_path_factory.mktemp("materials"))


@pytest.mark.parametrize("script", [CLASS_SCRIPT, UNCONDITIONAL_SCRIPT])
def test_slower_inputs_change_the_loss_and_not_what_is_drawn(
    materials: Materials, tmp_path: Path, script: str
) -> None:
    law = ("--formulation", "flow", "--max_train_steps", 2, "--timestep_sampler", "mixflow")
    network = "dit" if script == CLASS_SCRIPT else "unet"
    plain, slowed = (
        train(
            materials.argv(tmp_path / str(len(more)), script, network, "pixels", *law, *more),
            script=script,
        )
        for more in ((), ("--mixflow_gamma", 0.8))
    )
    assert finite(plain)
    assert finite(slowed)
    assert [s.indices for s in plain.steps] == [s.indices for s in slowed.steps]
    assert plain.losses[1] != slowed.losses[1]  # at first a DiT says 0 whatever it sees


def test_a_pipeline_that_is_no_flow_is_refused_before_it_is_loaded(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert status(bench.argv(tmp_path, "--mixflow_gamma", 0.8), bench.script) == 2
    assert not list(tmp_path.glob("checkpoint-*"))
