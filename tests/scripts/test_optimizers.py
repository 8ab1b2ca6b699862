"""Every optimizer that --optimizer names: built by the flags that it takes, guarded, resumed."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_curriculum.training.arguments import optimizer as flags
from diffusers_curriculum.training.arguments.environment import satisfied
from diffusers_curriculum.training.arguments.optimizer import OPTIMIZERS, chosen_optimizer
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.parts.optimizers import build_optimizer, check_rates
from tests.scripts.every_script import faults
from tests.scripts.small_runs import Bench, hashes, make_class_bench
from tests.training.command_lines import parse_args
from tests.training.fake_accelerator import FakeAccelerator
from tests.training.tiny_state import value_bits


def needs_package(name: str) -> None:
    package = OPTIMIZERS[name].package
    if package is not None and not satisfied(package):
        pytest.skip(f"{package} is not installed")


def arguments(tmp_path: Path, *more: object) -> Any:
    (tmp_path / "a.png").touch()
    argv = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path)]
    return parse_args([*argv, "--output_dir", str(tmp_path / "out"), *map(str, more)])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(3, 4)
        self.matrix = nn.Linear(4, 5)
        self.image = nn.Conv2d(2, 2, 3)
        for index, parameter in enumerate(self.parameters()):
            numbers = torch.arange(parameter.numel()).reshape(parameter.shape)
            parameter.data = torch.sin(numbers + index)

    def given(self, gradient: float) -> Network:
        """With gradients of that size."""
        for parameter in self.parameters():
            parameter.grad = gradient * torch.cos(parameter.detach())
        return self


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_class_bench(tmp_path_factory.mktemp("classes"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_left_an_update_out_is_resumed(
    classes: Bench, tmp_path: Path, name: str
) -> None:
    needs_package(name)
    run = ("--optimizer", name, "--lr_scheduler", "cosine", "--lr_warmup_steps", 1, "--use_ema")
    run += ("--max_train_steps", 4, "--checkpointing_steps", 2, "--nonfinite", "skip")
    with faults(lambda number: number == 1):
        whole = classes.train(tmp_path / "whole", *run)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    rest = classes.train(tmp_path / "parts", *run, "--resume_from_checkpoint", "latest")
    assert rest.steps == whole.steps[2:]
    last = [hashes(tmp_path / folder / "checkpoint-4") for folder in ("whole", "parts")]
    assert last[0] == last[1]
    before = hashes(tmp_path / "whole" / "checkpoint-2")
    assert all(last[0][f] != before[f] for f in before if f.endswith("model.safetensors"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_is_left_out_leaves_no_trace(tmp_path: Path, name: str) -> None:
    needs_package(name)
    network = Network()
    args = arguments(tmp_path, "--optimizer", name, "--learning_rate", 0.1)
    optimizer = build_optimizer(args, [*network.parameters()], 1, network)
    guard = FiniteGuard(FakeAccelerator(), optimizer, "skip")
    seen = [value_bits([*network.parameters()])]
    for loss in (1.0, torch.nan, 1.0):
        network.given(0.5)
        guard.step([torch.tensor(loss)], torch.tensor(1.0))
        seen.append(value_bits([[*network.parameters()], optimizer.state_dict()["state"]]))
    assert seen[0] != seen[1] == seen[2] != seen[3]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_class_and_its_numbers_are_those_of_the_flags(tmp_path: Path, name: str) -> None:
    needs_package(name)
    more = ("--optimizer", name, "--learning_rate", 0.5, "--adam_weight_decay", 0.25, "--scale_lr")
    args = arguments(tmp_path, *more, "--train_batch_size", 2)
    built = build_optimizer(args, [nn.Parameter(torch.ones(2, 2))], 3)
    module, _, kind = OPTIMIZERS[name].kind.rpartition(".")
    made = built.members[0] if OPTIMIZERS[name].beside else built
    assert type(made) is getattr(import_module(module), kind)
    (group,) = built.param_groups
    assert (group["lr"], group["weight_decay"]) == (3.0, 0.25)


def test_muon_takes_the_matrices_and_adamw_the_rest(tmp_path: Path) -> None:
    needs_package("muon")
    together, apart = Network(), Network()
    rates: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}
    args = arguments(tmp_path, "--optimizer", "muon", "--learning_rate", 0.1)
    whole = build_optimizer(args, [*together.parameters()], 1, together)
    others = [p for p in apart.parameters() if p is not apart.matrix.weight]
    parts = [
        torch.optim.Muon([apart.matrix.weight], **rates, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, **rates, fused=True),
    ]
    for size in (1.0, -0.3, 0.2):
        together.given(size)
        apart.given(size)
        for optimizer in (whole, *parts):
            optimizer.step()
    assert value_bits([*together.parameters()]) == value_bits([*apart.parameters()])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("adafactor", "--adam_beta1", 0.5), "no effect without --optimizer AdamW, prodigy, "),
        (("adafactor", "--adam_beta2", 0.5), "no effect without --optimizer AdamW, prodigy, "),
        (("lion", "--adam_epsilon", 1e-6), "without --optimizer AdamW, prodigy, adamw8bit, muon:"),
        (("lion", "--use_8bit_adam"), "no effect without --optimizer AdamW"),
        (("lion", "--prodigy_beta3", 0.5), "no effect without --optimizer prodigy"),
    ],
)
def test_a_flag_that_an_optimizer_does_not_take_is_refused(
    tmp_path: Path, more: tuple[object, ...], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        arguments(tmp_path, "--optimizer", *more)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("adamw8bit",), "--optimizer adamw8bit needs bitsandbytes.*curriculum\\[quantization]'"),
        (("AdamW", "--use_8bit_adam"), "--use_8bit_adam needs .*curriculum\\[quantization]', or"),
        (("Lion",), "--optimizer lion needs lion-pytorch: pip install '.*\\[lion]', or drop"),
        (("prodigy",), "--optimizer prodigy needs prodigyopt: pip install '.*\\[prodigy]', or"),
        (("muon",), "--optimizer muon needs torch>=2.9: pip install 'torch>=2.9', or drop"),
    ],
)
def test_a_missing_package_is_told_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...], told: str
) -> None:
    monkeypatch.setattr(flags, "satisfied", lambda package: False)
    with pytest.raises(UsageError, match=told):
        arguments(tmp_path, "--optimizer", *more)


def test_a_package_that_is_too_old_is_none() -> None:
    assert satisfied("torch>=2.6")
    assert not satisfied("torch>=1000")
    assert not satisfied("no-such-package-here")


def test_lion_has_its_own_decay_and_takes_no_rate_of_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flags, "satisfied", lambda package: True)
    lion = ("--optimizer", "lion")
    assert arguments(tmp_path).adam_beta2 == 0.999
    assert arguments(tmp_path, *lion).of_setting("optimizer")["adam_beta2"] == 0.99
    assert arguments(tmp_path, *lion, "--adam_beta2", 0.999).adam_beta2 == 0.999
    with pytest.raises(UsageError, match="--learning_rate is 0, which --optimizer lion refuses"):
        check_rates(arguments(tmp_path, *lion, "--learning_rate", 0), 1, 10)


def test_adamw_in_8_bits_has_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "satisfied", lambda package: True)
    by_name, by_flag = (
        arguments(tmp_path, *more) for more in (("--optimizer", "adamw8bit"), ("--use_8bit_adam",))
    )
    assert by_name.of_setting("optimizer") == by_flag.of_setting("optimizer")
    assert chosen_optimizer(by_name) is chosen_optimizer(by_flag) is OPTIMIZERS["adamw8bit"]
