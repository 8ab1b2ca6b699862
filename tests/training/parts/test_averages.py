"""The averages of the weights: when they are made, from what, how they move, and when they show."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusers_curriculum.training.parts.averages import Averages, ema_weights
from diffusers_curriculum.training.parts.power_ema import PowerEMA
from diffusers_curriculum.training.parts.reconstruction import list_snapshots
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.images import ImageTask
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from tests.scripts.small_runs import TINY_DIT, TINY_UNET, write_json
from tests.training.command_lines import parse_args
from tests.training.fake_accelerator import FakeAccelerator
from tests.training.tiny_state import make_unet

CPU = torch.device("cpu")


def arguments(*more: object) -> Any:
    line = ["--pretrained_model_name_or_path", "a/b", *map(str, more)]
    return parse_args(line, machine=False)


# -- made from a command line ----------------------------------------------------------------------


def loaded(task: ImageTask, *line: object) -> Averages:
    """The averages that a task loads beside its network, of three classes if any."""
    words = ["--dataset_name", "some/data", "--resolution", "8", *map(str, line)]
    args = task.parse(words)
    task.choose(args, 0)
    task.published, task.classes = SimpleNamespace(), 3 if task.text_columns else None  # type: ignore[assignment]
    accelerator = FakeAccelerator()
    job: Any = SimpleNamespace(args=args, accelerator=accelerator, seed=0, rows=[])
    return task.load(job).averages


def test_the_warm_up_is_that_of_the_unconditional_script_only(tmp_path: Path) -> None:
    line = ("--use_ema", "--ema_inv_gamma", 2, "--ema_power", 0.5, "--ema_max_decay", 0.9)
    network = ("--model_config_name_or_path", write_json(tmp_path / "unet.json", TINY_UNET))
    ema = loaded(Unconditional(), *network, *line).ema
    expected = [min(1 - (1 + step / 2) ** -0.5, 0.9) for step in range(1, 400)]
    assert ema is not None
    assert [ema.get_decay(step + 1) for step in range(1, 400)] == pytest.approx(expected)
    assert expected[0] < expected[100] < expected[-1] == 0.9
    network = ("--model_config", write_json(tmp_path / "dit.json", TINY_DIT))
    ema = loaded(ClassConditional(), *network, "--use_ema", "--ema_decay", 0.9).ema
    assert ema is not None
    assert ema.get_decay(10**6) == 0.9
    assert not ema.use_ema_warmup


def test_only_the_averages_asked_for_are_made(tmp_path: Path) -> None:
    network = ("--model_config", write_json(tmp_path / "dit.json", TINY_DIT))
    none = loaded(ClassConditional(), *network)
    assert (none.ema, none.power, none.trackers) == (None, None, {})
    line = ("--power_ema", 0.1, 0.05, "--output_dir", tmp_path, "--power_ema_snapshot_steps", 7)
    power = loaded(ClassConditional(), *network, *line)
    assert power.ema is None
    assert power.power is not None
    assert list(power.power.averages) == [0.1, 0.05]
    assert power.trackers == {"power_ema": power.power}
    assert (power.folder, power.every) == (tmp_path / "power_ema", 7)
    both = loaded(ClassConditional(), *network, "--use_ema", *line)
    assert None not in (both.ema, both.power)


# -- updated ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True])
def test_the_average_moves_towards_the_weights(offload: bool) -> None:
    network = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(3))])
    (weight,) = network.parameters()
    ema = EMAModel(network.parameters(), decay=0.5)
    moved: list[torch.device] = []
    ema.to = lambda device, **kwargs: moved.append(torch.device(device))  # type: ignore[method-assign]
    averages = Averages(network, ema, offload=offload)
    with torch.no_grad():
        weight += 8
    expected, average = [], 0.0
    for n in range(1, 5):
        averages.update(n - 1)
        # the first update takes the weights over; then decay min(0.5, (1 + n) / (10 + n))
        decay = 0 if n == 1 else min(0.5, n / (9 + n))
        average = decay * average + (1 - decay) * 8
        expected.append(average)
        assert ema.shadow_params[0].tolist() == pytest.approx([average] * 3)
    assert ema.optimization_step == 4
    assert len(moved) == (8 if offload else 0)
    assert weight.tolist() == [8, 8, 8]


def test_an_interval_counts_finished_steps() -> None:
    averages = Averages(make_unet(0)).with_ema(arguments("--use_ema", "--ema_interval", 3), CPU)
    assert averages.ema is not None
    updates = []
    for step in range(7):
        averages.update(step)
        updates.append(averages.ema.optimization_step)
    assert updates == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("every", "last", "expected"),
    [(4, 10, [4, 8, 10]), (None, 10, [*range(1, 11)]), (None, 130, [*range(2, 131, 2)])],
)
def test_snapshots_come_regularly_and_at_the_end(
    tmp_path: Path, every: int | None, last: int, expected: list[int]
) -> None:
    network = torch.nn.Linear(1, 1)
    averages = Averages(network, power=PowerEMA(network.named_parameters(), (0.1,)))
    averages.folder, averages.every = tmp_path, every
    for done in range(1, last + 1):
        averages.update(done - 1)
        averages.snapshot(done, last, main=True)
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == expected
    averages.start(expected[1])
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == expected[:2]


# -- shown -----------------------------------------------------------------------------------------


def test_the_moving_average_is_shown_before_the_power_function_one() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 2.0)
    power = PowerEMA(network.named_parameters(), (0.1,))
    torch.nn.init.constant_(network.weight, 3.0)
    ema = EMAModel(network.parameters())
    torch.nn.init.constant_(network.weight, 1.0)
    for averages, expected in (
        (Averages(network, ema, power=power), 3.0),
        (Averages(network, power=power), 2.0),
        (Averages(network), 1.0),
    ):
        with averages.shown():
            assert network.weight.item() == expected
        assert network.weight.item() == 1.0


@pytest.mark.parametrize("foreach", [False, True])
def test_ema_weights_are_swapped_in_and_out(foreach: bool) -> None:
    model = torch.nn.Linear(3, 2)
    ema = EMAModel(model.parameters(), foreach=foreach)
    averages = [p.clone() for p in ema.shadow_params]
    with torch.no_grad():
        model.weight.add_(1.0)
    own = [p.detach().clone() for p in model.parameters()]
    with ema_weights(ema, [*model.parameters()]):
        assert all(map(torch.equal, model.parameters(), averages))
    assert all(map(torch.equal, model.parameters(), own))
    with pytest.raises(KeyError), ema_weights(ema, [*model.parameters()]):
        raise KeyError
    assert all(map(torch.equal, model.parameters(), own))
    assert all(map(torch.equal, ema.shadow_params, averages))


def test_ema_that_fails_to_copy_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 2)
    ema = EMAModel(model.parameters())
    own = [p.detach().clone() for p in model.parameters()]

    def half(parameters: Any) -> None:
        next(iter(parameters)).data.zero_()
        raise MemoryError

    monkeypatch.setattr(ema, "copy_to", half)
    with pytest.raises(MemoryError), ema_weights(ema, [*model.parameters()]):
        pass
    assert all(map(torch.equal, model.parameters(), own))


def test_nested_ema_weights_are_refused_and_nothing_is_lost() -> None:
    model = torch.nn.Linear(3, 2)
    ema = EMAModel(model.parameters())
    with torch.no_grad():
        model.weight.add_(1.0)
    own = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="do not nest"), ema_weights(ema, [*model.parameters()]):  # noqa: SIM117
        with ema_weights(ema, [*model.parameters()]):
            pass
    assert torch.equal(model.weight, own)
