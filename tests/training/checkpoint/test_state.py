"""A run that is saved and read back goes on to the bit, or is told why not and left as it was."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from diffusers_curriculum.samplers import CurriculumTimestepSampler, LossSecondMomentTimestepSampler
from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint, verify_checkpoint
from diffusers_curriculum.training.checkpoint.state import TrainingState
from tests.training.tiny_state import Sampler, bits, make_state, train


def save(root: Path, state: TrainingState, step: int) -> Path:
    return save_checkpoint(root, step, partial(state.write, step=step), {"world_size": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after three steps; tests that change it take a copy."""
    state = make_state(0)
    train(state, 0, 3)
    return save(tmp_path_factory.mktemp("run"), state, 3)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("ema", [True, False])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, steps: int, ema: bool) -> None:
    straight = make_state(0, ema=ema)
    train(straight, 0, steps)
    folder = save(tmp_path, straight, steps)
    resumed = make_state(1, ema=ema)
    train(resumed, 50, 52)
    assert resumed.read(folder) == steps
    assert bits(resumed) == bits(straight)
    assert train(resumed, steps, steps + 4) == train(straight, steps, steps + 4)
    assert bits(resumed) == bits(straight)


def test_a_sampler_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Whose law was learned everywhere or nowhere."""

    class Older(LossSecondMomentTimestepSampler):
        def state_dict(self) -> dict[str, Any]:
            state = super().state_dict()
            return state | {"state.learned": state["state.learned"].all()}

    def learner(kind: type[LossSecondMomentTimestepSampler]) -> Any:
        base = kind(DDPMScheduler(), min_observations=1, refresh_every=1)
        return CurriculumTimestepSampler(base, clusters=2, pacing_args={"patience": 1})

    before, after = make_state(0), make_state(1)
    before.sampler, after.sampler = learner(Older), learner(LossSecondMomentTimestepSampler)
    before.sampler.base.observe(torch.arange(1000), torch.linspace(1, 2, 1000), 0)
    after.read(save(tmp_path, before, 0))
    law = after.sampler.base.probabilities(1)
    assert torch.equal(law, before.sampler.base.probabilities(1))
    assert float(law.max() / law.min()) > 1.5


def test_saving_changes_nothing_and_draws_nothing(tmp_path: Path) -> None:
    state = make_state(0)
    train(state, 0, 2)
    before, random_state = bits(state), torch.get_rng_state()
    save(tmp_path, state, 2)
    assert bits(state) == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_second_round_trip_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    state = make_state(1)
    state.read(saved)
    again = verify_checkpoint(save(tmp_path, state, 3))
    assert again["files"] == verify_checkpoint(saved)["files"]


def test_diffusers_loads_both_models(saved: Path) -> None:
    state = make_state(1)
    state.read(saved)
    assert state.ema is not None
    root, name = saved.parent, saved.name
    unet = UNet2DConditionModel.from_pretrained(root, subfolder=f"{name}/unet")
    for key, value in unet.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[key]), key
    average = EMAModel.from_pretrained(saved / "unet_ema", UNet2DConditionModel)
    assert average.optimization_step == 3
    assert average.decay == 0.97
    assert len(average.shadow_params) == len(state.ema.shadow_params) > 50
    assert all(map(torch.equal, average.shadow_params, state.ema.shadow_params))
    assert not torch.equal(average.shadow_params[0], next(iter(unet.parameters())))
    UNet2DConditionModel.from_pretrained(root, subfolder=f"{name}/unet_ema")


def test_the_average_keeps_its_own_dtype_and_its_storage(tmp_path: Path) -> None:
    """EMAModel.save_pretrained would cast it to the model's."""
    state, other = (make_state(seed) for seed in (0, 1))
    assert state.ema is not None
    assert other.ema is not None
    for average in (state.ema, other.ema):
        average.to(dtype=torch.float64)
    train(state, 0, 2)
    held = [shadow.data_ptr() for shadow in other.ema.shadow_params]
    other.read(save(tmp_path, state, 2))
    assert bits(other) == bits(state)
    assert [shadow.data_ptr() for shadow in other.ema.shadow_params] == held


def test_a_scaler_is_restored(tmp_path: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)

    state, other = (make_state(seed, scaler=scaler()) for seed in (0, 1))
    assert state.scaler is not None
    state.scaler.scale(torch.ones(1))
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 37.5, "_growth_tracker": 7})
    other.read(save(tmp_path, state, 0))
    assert bits(other) == bits(state)
    assert other.scaler is not None
    assert other.scaler.get_scale() == 37.5


def test_frozen_parameters_and_several_groups(tmp_path: Path) -> None:
    def grouped(seed: int) -> TrainingState:
        state = make_state(seed)
        state.model.conv_in.requires_grad_(False)
        first, *rest = [p for p in state.model.parameters() if p.requires_grad]
        groups = [{"params": [first], "lr": 0.01}, {"params": rest, "betas": (0.5, 0.9)}]
        state.optimizer = torch.optim.AdamW(groups, lr=1e-3, amsgrad=True)
        state.lr_scheduler = get_scheduler(
            "cosine", state.optimizer, num_warmup_steps=0, num_training_steps=9
        )
        return state

    state, other = grouped(0), grouped(1)
    train(state, 0, 3)
    other.read(save(tmp_path, state, 3))
    assert bits(other) == bits(state)
    assert train(other, 3, 6) == train(state, 3, 6)


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    state, other = make_state(0, ema=False), make_state(1, ema=False)
    whole = state.model.save_pretrained
    state.model.save_pretrained = partial(whole, max_shard_size="20KB")
    folder = save(tmp_path, state, 0)
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    other.read(folder)
    assert bits(other) == bits(state)


def test_nbytes_is_about_the_size_on_disk(saved: Path) -> None:
    state = make_state(1)
    state.read(saved)
    size = sum(entry["size"] for entry in verify_checkpoint(saved)["files"].values())
    assert 0.5 * size < state.nbytes() < size


def test_another_model_name_gives_other_folders(tmp_path: Path) -> None:
    state, other = (make_state(seed, model_name="transformer") for seed in (0, 1))
    folder = save(tmp_path, state, 0)
    assert {"transformer", "transformer_ema"} <= {path.name for path in folder.iterdir()}
    other.read(folder)
    assert bits(other) == bits(state)


def test_numbers_keep_every_bit(tmp_path: Path) -> None:
    state, other = make_state(0), make_state(1)
    odd = {"third": 1 / 3, "tiny": 5e-324, "zero": -0.0, "low": -math.inf, "nan": math.nan}
    for each in (state, other):
        assert isinstance(each.sampler, Sampler)
        each.sampler.state |= odd if each is state else dict.fromkeys(odd, 0.0)
    other.read(save(tmp_path, state, 0))
    restored = other.sampler.state_dict()
    assert {k: restored[k].hex() for k in odd} == {k: v.hex() for k, v in odd.items()}


# -- numbers of this run, positions of the checkpoint --------------------------------------------


@pytest.mark.parametrize("steps", [20, 60])
def test_rates_are_those_of_this_runs_schedule(saved: Path, steps: int) -> None:
    other = make_state(1)
    other.lr_scheduler = get_scheduler(
        "cosine", other.optimizer, num_warmup_steps=2, num_training_steps=steps
    )
    other.read(saved)
    wanted = 3e-3 * 0.5 * (1 + math.cos(math.pi * (3 - 2) / (steps - 2)))
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-12)
    assert other.lr_scheduler.get_last_lr() == [other.optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("there", [{"verbose": False}, {"_is_initial": False}])
def test_a_schedule_goes_on_with_another_torch(tmp_path: Path, there: dict[str, bool]) -> None:
    """Which flags a schedule's state has differs among the versions of torch."""
    state, other = make_state(0), make_state(1)
    train(state, 0, 3)
    told = state.lr_scheduler.state_dict()
    for flag in ("verbose", "_is_initial"):
        told.pop(flag, None)
    with mock.patch.object(state.lr_scheduler, "state_dict", return_value=told | there):
        folder = save(tmp_path, state, 3)
    other.read(folder)
    assert bits(other) == bits(state)
    assert train(other, 3, 6) == train(state, 3, 6)


def test_the_precision_may_change(saved: Path, tmp_path: Path) -> None:
    scaled, plain = make_state(1, scaler=torch.amp.GradScaler("cpu", init_scale=8.0)), make_state(2)
    assert scaled.read(saved) == 3
    assert scaled.scaler is not None
    assert scaled.scaler.get_scale() == 8.0
    assert plain.read(save(tmp_path, scaled, 3)) == 3
    assert bits(plain)["unet"] == bits(scaled)["unet"]


def test_an_average_that_is_new_starts_from_the_weights(tmp_path: Path) -> None:
    without, other = make_state(0, ema=False), make_state(1)
    train(without, 0, 3)
    folder = save(tmp_path, without, 3)
    assert other.read(folder, renew={"ema"}) == 3
    assert other.ema is not None
    pairs = zip(other.ema.shadow_params, without.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert other.ema.optimization_step == 0
    assert without.read(save(tmp_path, other, 4), renew={"ema"}) == 4


def test_the_numbers_of_an_average_are_this_runs(saved: Path) -> None:
    other = make_state(1)
    assert other.ema is not None
    other.ema.inv_gamma, other.ema.power, other.ema.decay = 7.0, 0.25, 0.5
    other.read(saved)
    assert (other.ema.inv_gamma, other.ema.power, other.ema.decay) == (7.0, 0.25, 0.5)
    assert other.ema.optimization_step == 3
