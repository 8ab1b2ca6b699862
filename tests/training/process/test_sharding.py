"""What may be asked for beside FSDP2, and tensors that lie in shards; runs in shards are in
tests/reliability/test_sharded.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.checkpoint.optimizer import optimizer_state
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process import sharding
from diffusers_curriculum.training.process.launcher import check_environment
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from tests.fsdp2 import needs_fsdp2

ROOT = Path(__file__).parents[3]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
WORDS = ("--pretrained_model_name_or_path", "x", "--train_data_dir", "y", "--use_ema")


def check(*more: str, **environment: str) -> None:
    args = TextToImage().parse([*WORDS, *more], machine=False)
    check_environment(args, FSDP2 | environment)


def test_fsdp2_is_accepted() -> None:
    check(FSDP_RESHARD_AFTER_FORWARD="false", FSDP_CPU_RAM_EFFICIENT_LOADING="true")


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "True", "--gradient_checkpointing"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--use_fsdp --fsdp_version 2"),
    ],
)
def test_what_cannot_be_had_beside_it_is_refused(name: str, value: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}.*not supported.*{remedy}"):
        check(**{name: value})


@pytest.mark.parametrize(
    "words", ["--compile full", "--optimizer muon", "--offload_ema", "--foreach_ema"]
)
def test_flags_that_need_whole_tensors_are_refused(words: str) -> None:
    flag = words.split()[0]
    with pytest.raises(UsageError, match=f"{flag} is .* does not go with the shards of FSDP2"):
        check(*words.split())


@needs_fsdp2
def test_the_launcher_decides_neither_precision_nor_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers would leave the models of all processes but one empty."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    plugin = sharding.sharding_plugin(FSDP2)
    assert not plugin.cpu_ram_efficient_loading
    assert plugin.mixed_precision_policy.param_dtype is None
    assert sharding.sharding_plugin({}) is None


class Shard:
    """Half of a tensor, which a collective makes whole."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def full_tensor(self) -> torch.Tensor:
        return self.tensor


@pytest.mark.parametrize("keep", [True, False])
def test_shards_are_put_back(keep: bool) -> None:
    shard, plain = Shard(torch.ones(2)), torch.zeros(2)
    holders: list[Any] = [{"moment": shard, "step": plain}, [shard, plain]]
    expected = torch.Tensor if keep else Shard
    with sharding.gathered(holders, keep):
        assert isinstance(holders[0]["moment"], expected)
        assert isinstance(holders[1][0], expected)
        assert holders[0]["step"] is holders[1][1] is plain
    assert [holders[0]["moment"], holders[1][0]] == [shard, shard]


def test_an_autoencoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "autoencoder"))
    task = importlib.import_module("vqgan_task").VQGAN()
    task.check_engine(sharded=False)
    with pytest.raises(UsageError, match="autoencoder cannot lie in the shards of FSDP2"):
        task.check_engine(sharded=True)


def test_moments_that_were_gathered_go_back_to_the_device() -> None:
    weight = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {"step": torch.ones(()), "exp_avg": torch.ones(2)}
    assert optimizer_state(optimizer)[1]["on_host"] == ["state.0.step"]
