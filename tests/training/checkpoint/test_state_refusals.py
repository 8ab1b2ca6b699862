"""A checkpoint that does not fit the run, or a state that fits no checkpoint, is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint
from diffusers_curriculum.training.checkpoint.state import TrainingState
from diffusers_curriculum.training.errors import CheckpointError
from tests.training.tiny_state import Sampler, bits, make_state, make_unet, train


def save(root: Path, state: TrainingState, step: int) -> Path:
    return save_checkpoint(root, step, partial(state.write, step=step), {"world_size": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after three steps; tests that change it take a copy."""
    state = make_state(0)
    train(state, 0, 3)
    return save(tmp_path_factory.mktemp("run"), state, 3)


def assert_refused(state: TrainingState, folder: Path, match: str) -> None:
    before = bits(state)
    with pytest.raises(CheckpointError, match=match):
        state.read(folder)
    assert bits(state) == before


def other_clusters() -> TrainingState:
    state = make_state(1)
    state.sampler = Sampler(clusters=6)
    return state


def other_sampler() -> TrainingState:
    state = make_state(1)
    assert isinstance(state.sampler, Sampler)
    del state.sampler.state["best"]
    return state


def other_optimizer() -> TrainingState:
    state = make_state(1)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1)
    return state


def other_average() -> TrainingState:
    state = make_state(1)
    assert state.ema is not None
    state.ema.to(dtype=torch.float64)
    return state


UNFIT: dict[str, tuple[Callable[[], TrainingState], str]] = {
    "no average": (lambda: make_state(1, ema=False), r"only the checkpoint has \['ema'\]"),
    "no tracker": (lambda: make_state(1, trackers={}), "tracker_mean"),
    "other name": (lambda: make_state(1, model_name="transformer"), "no weights in transformer/"),
    "other width": (lambda: make_state(1, unet=make_unet(1, 4)), r"shapes \[\d+\] is"),
    "other dtype": (lambda: make_state(1, unet=make_unet(1).double()), "torch.float64"),
    "other dtype of the average": (other_average, "unet_ema: .*torch.float64"),
    "other clusters": (other_clusters, r"sampler\.losses has shape \(5,\)"),
    "other sampler": (other_sampler, "sampler does not fit"),
    "other optimizer": (other_optimizer, "class is 'AdamW', the run's 'SGD'"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_checkpoint_of_another_run_is_refused_before_anything_changes(
    saved: Path, what: str
) -> None:
    make, match = UNFIT[what]
    assert_refused(make(), saved, match)


def test_a_part_that_refuses_its_state_stops_the_rest(tmp_path: Path) -> None:
    state = make_state(0)
    assert isinstance(state.sampler, Sampler)
    state.sampler.state["calls"] = -1
    assert_refused(make_state(1), save(tmp_path, state, 0), "sampler .* calls is negative")


def test_swapped_in_averages_are_not_saved_as_weights(tmp_path: Path) -> None:
    state = make_state(0)
    assert state.ema is not None
    state.ema.store(state.model.parameters())
    with pytest.raises(RuntimeError, match="restore"):
        save(tmp_path, state, 0)
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_plain_data_is_refused(tmp_path: Path) -> None:
    state = make_state(0)
    assert isinstance(state.sampler, Sampler)
    state.sampler.state["path"] = Path("x")
    with pytest.raises(CheckpointError, match=r"sampler\.path is a PosixPath"):
        save(tmp_path, state, 0)
    with pytest.raises(CheckpointError, match="tracker_a/b' is no file name"):
        save(tmp_path, make_state(0, trackers={"a/b": Sampler()}), 0)


def test_weights_without_training_state_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, make_unet(0).save_pretrained, {})
    assert_refused(make_state(1), folder, "training_state.json is missing")


@pytest.mark.parametrize("change", ["dtype", "name"])
def test_other_weights_are_refused_without_an_average_too(tmp_path: Path, change: str) -> None:
    """Nothing else than the weights differs here."""
    folder = save(tmp_path, make_state(0, ema=False), 0)
    unet = make_unet(1)
    if change == "dtype":
        unet.double()
    else:
        unet.register_buffer("extra", torch.zeros(1))
    match = "unet: .*torch.float64" if change == "dtype" else "extra is only in the run"
    assert_refused(make_state(ema=False, unet=unet), folder, match)
