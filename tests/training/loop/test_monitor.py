"""What a run reports: every sample counted once, at the right step, and never a NaN passed over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.analysis import plots
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.errors import NonFiniteError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop import tracking
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.loop.monitor import LevelMonitor
from diffusers_curriculum.training.loop.run import LevelLosses
from tests.floors_fixtures import SCHEDULERS
from tests.training.fake_accelerator import TIMED, FakeAccelerator


def density() -> TimestepSampler:
    return DensityTimestepSampler.from_scheduler(SCHEDULERS["sd"](), density="uniform")


def curriculum(**pacing: Any) -> CurriculumTimestepSampler:
    return CurriculumTimestepSampler(density(), clusters=4, pacing="patience", pacing_args=pacing)


def monitor_of(
    sampler: TimestepSampler | None = None,
    *,
    steps: int = 8,
    log_every: int = 4,
    plot_every: int = 100,
    **accelerator: Any,
) -> tuple[LevelMonitor, FakeAccelerator]:
    fake = FakeAccelerator(**accelerator)
    chosen = density() if sampler is None else sampler
    guard = FiniteGuard(fake, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True))
    levels = Levels(
        scheduler=None,
        inference=None,
        sampler=chosen,
        objective=Objective(chosen.levels),
        weighting=("none", {}),
        weights=None,
        learned=None,
    )
    monitor = LevelMonitor(
        levels,
        plot_every,
        accelerator=fake,
        guard=guard,
        max_train_steps=steps,
        log_every=log_every,
        plan=BatchPlan(10, 5, 1, 1, 0, 0),
    )
    return monitor, fake


def outcome(indices: Tensor, losses: Tensor) -> LevelLosses:
    """Of one micro-batch whose losses count alike."""
    return LevelLosses(indices, losses, losses.mean().reshape(1))


def feed(monitor: LevelMonitor, steps: range, rate: float = 0.5, size: int = 5) -> list[float]:
    """Steps with losses step + 1, and the reports that are due."""
    for step in steps:
        losses = torch.full((size,), float(step + 1))
        indices = torch.arange(size) * 200
        monitor.add(step, outcome(indices, losses), torch.tensor(1.0))
        monitor.after_step(step + 1, rate)
    return [float(step + 1) for step in steps]


def test_reports_come_every_log_every_steps_and_at_the_end() -> None:
    monitor, fake = monitor_of(steps=10)
    feed(monitor, range(10))
    assert [step for step, _ in fake.logged] == [4, 8, 10]


def test_train_loss_is_the_mean_since_the_last_report() -> None:
    monitor, fake = monitor_of()
    feed(monitor, range(8), rate=0.25)
    assert [values["train_loss"] for _, values in fake.logged] == [2.5, 6.5]
    assert {values["lr"] for _, values in fake.logged} == {0.25}


def test_pace_and_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, fake = monitor_of()
    now = iter([100.0, 110.0, 114.0])
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(LevelMonitor, "read", lambda *_: ({}, {}))
    monitor.start(0)
    for step in (4, 8):
        monitor.report(step, 0.1)
    told = [values for _, values in fake.logged]
    # 5 samples an update, 10 an epoch
    assert [values["samples_per_second"] for values in told] == [4 * 5 / 10, 4 * 5 / 4]
    assert [values["epoch"] for values in told] == [2.0, 4.0]
    assert all(0.01 < values["memory_gib"] < 1000 for values in told)


def test_memory_is_that_of_the_device_where_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measured(device: Any) -> int:
        asked.append(device)
        return 3 * 2**30

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", measured)
    pace = tracking.Pace(BatchPlan(10, 5, 1, 1, 0, 0), torch.device("cuda", 1))
    assert pace.read(1)["memory_gib"] == 3.0
    assert asked == [torch.device("cuda", 1)]


def test_a_longer_run_has_all_it_saw_in_its_first_half() -> None:
    first, _ = monitor_of(steps=8)
    feed(first, range(8))
    longer, _ = monitor_of(steps=20)
    for name, part in first.stateful.items():
        longer.stateful[name].load_state_dict(part.state_dict())
    longer.start(8)
    seen = [sum(half.summary().counts) for half in longer.halves]
    assert seen == [8 * 5, 0]


@pytest.mark.parametrize("log_every", [3, 4, 8])
def test_every_sample_is_counted_once(log_every: int) -> None:
    # a window that lies across the middle of the run as well
    monitor, fake = monitor_of(log_every=log_every)
    feed(monitor, range(8))
    counts = [
        value
        for _, values in fake.logged
        for name, value in values.items()
        if name.startswith("count_log_snr/")
    ]
    assert sum(counts) == 8 * 5
    assert 0 not in counts


def test_losses_are_told_by_noise_level() -> None:
    monitor, fake = monitor_of(log_every=8)
    feed(monitor, range(8))
    ((_, values),) = fake.logged
    means = {k: v for k, v in values.items() if k.startswith("loss_log_snr/")}
    assert len(means) == len({k for k in values if k.startswith("count_log_snr/")}) > 3
    assert all(mean == pytest.approx(4.5) for mean in means.values())


def test_pictures_tell_what_was_learnt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {}

    def plot(edges: Any, losses: Any, counts: Any) -> Any:
        drawn.update(losses=losses, counts=counts)
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers_curriculum.analysis.plots.plot_loss_by_noise_level", plot)
    monitor, _ = monitor_of()
    feed(monitor, range(8))
    with pytest.raises(KeyboardInterrupt):
        monitor.finish(str(tmp_path))
    told = drawn["losses"].items()
    seen = {name: [v for v in means if not math.isnan(v)] for name, means in told}
    assert seen["first half"] == pytest.approx([2.5] * len(seen["first half"]))
    assert seen["second half"] == pytest.approx([6.5] * len(seen["second half"]))
    assert sum(drawn["counts"]) == 8 * 5


def test_pictures_tell_where_the_law_lies_for_the_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[float] = []
    plot = plots.plot_preview
    monkeypatch.setattr(plots, "plot_preview", lambda one: told.append(one.data_std) or plot(one))
    monitor, _ = monitor_of()
    monitor.levels.data_std = 0.7
    monitor.finish(str(tmp_path))
    assert told == [0.7]


PICTURES = ("timesteps.png", "loss_per_noise_level.png")


def test_finish_leaves_two_pictures(tmp_path: Path) -> None:
    monitor, _ = monitor_of(curriculum())
    monitor.start(0)
    feed(monitor, range(8))
    monitor.finish(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {*PICTURES, "loss_per_noise_level.json"}
    for name in PICTURES:
        path = tmp_path / name
        with Image.open(path) as picture:
            assert picture.size > (400, 300)


def test_only_the_main_process_leaves_pictures(tmp_path: Path) -> None:
    monitor, _ = monitor_of(main=False)
    feed(monitor, range(8))
    monitor.finish(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_sent_to_trackers_now_and_then() -> None:
    monitor, fake = monitor_of(plot_every=4)
    feed(monitor, range(8))
    for step in (4, 8):
        monitor.show_law(step)  # does not change
    sent = [(tag, step) for tag, _, step in fake.tracker.images]
    assert sent == [("timesteps", 4), ("law", 4)]  # at the end it is drawn into the folder, too
    assert fake.tracker.images[0][1][3] == 3


# -- curriculum ------------------------------------------------------------------------------------


def test_stage_range_and_patience_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    sampler = curriculum(patience=2)
    monitor, fake = monitor_of(sampler, log_every=1, steps=100)
    monitor.start(0)
    with caplog.at_level("INFO"):
        for step in range(5):
            losses = torch.full((3,), 1.0)
            indices = sampler.sample(3, step=step).indices
            sampler.observe(indices, losses, step)
            monitor.add(step, outcome(indices, losses), None)
            monitor.after_step(step + 1, 0.1)
    stages = [values["curriculum/stage"] for _, values in fake.logged]
    # the first loss is a record, the next two are not: the stage of the step after the report
    assert stages == [1, 1, 2, 2, 2]
    assert [values["curriculum/patience_counter"] for _, values in fake.logged] == [0, 1, 0, 0, 1]
    low, high = sampler.open_range(2)
    assert fake.logged[-1][1]["curriculum/log_snr_low"] == low
    assert fake.logged[-1][1]["curriculum/log_snr_high"] == high
    (message,) = [r.message for r in caplog.records if "stage" in r.message]
    opened = f"stage 2 of 4 since step 3: log-SNR {low:.2f} to {high:.2f}, new cluster 2"
    assert message == opened
    ((step, text),) = fake.tracker.text
    assert (step, text["curriculum/stages"].splitlines()[1]) == (3, f"* {opened}")
    assert [(tag, step) for tag, _, step in fake.tracker.images] == [("law", 3)]


def test_the_bar_shows_loss_rate_stage_and_range() -> None:
    monitor, _ = monitor_of(curriculum(), log_every=2)
    monitor.start(3)
    assert monitor.bar.n == 3
    shown: dict[str, str] = {}
    monitor.bar.set_postfix = shown.update
    feed(monitor, range(3, 6), rate=0.001)
    assert monitor.bar.n == 6
    monitor.bar.close()
    assert shown.keys() == {"loss", "lr", "stage", "log_snr"}
    assert shown["stage"] == "1/4"
    assert shown["lr"] == "1.00e-03"
    assert shown["loss"] == "5.5000"


def test_no_curriculum_no_stage() -> None:
    monitor, fake = monitor_of()
    feed(monitor, range(4))
    assert not any(name.startswith("curriculum") for name in fake.logged[0][1])


# -- faults ----------------------------------------------------------------------------------------


def test_a_fault_ends_the_run_at_the_next_report() -> None:
    monitor, fake = monitor_of(log_every=4)
    feed(monitor, range(3))
    monitor.guard.step([torch.tensor(math.nan)], None)
    with pytest.raises(NonFiniteError, match=r"by step 4.*--learning_rate"):
        feed(monitor, range(3, 4))
    assert fake.logged == []


def test_left_out_updates_spoil_no_mean_and_are_told() -> None:
    monitor, fake = monitor_of(log_every=4)
    monitor.guard.mode = "skip"
    feed(monitor, range(3))
    monitor.guard.step([torch.tensor(math.nan)], None)
    losses = torch.tensor([4.0, math.nan])
    monitor.add(3, outcome(torch.tensor([0, 200]), losses), torch.tensor(math.inf))
    monitor.after_step(4, 0.5)
    values = fake.logged[0][1]
    assert values["skipped_updates"] == 1
    assert values["train_loss"] == 2.0  # of steps 1 to 3
    assert values["grad_norm"] == 1.0
    assert all(math.isfinite(value) for value in values.values())


def test_adding_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, _ = monitor_of()

    def read(*args: Any) -> Any:
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, read)
    monitor.add(0, outcome(torch.tensor([1, 2, 3]), torch.ones(3)), torch.tensor(1.0))
    with pytest.raises(AssertionError, match="waited"):
        monitor.report(1, 0.1)


# -- state -----------------------------------------------------------------------------------------


def untimed(logged: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """What was logged, without what a clock told."""
    return [(step, {k: v for k, v in told.items() if k not in TIMED}) for step, told in logged]


@pytest.mark.parametrize("stopped", range(1, 8))
def test_reports_go_on_as_if_nothing_had_happened(stopped: int) -> None:
    whole, expected = monitor_of(log_every=3)
    feed(whole, range(8))
    first, early = monitor_of(log_every=3)
    feed(first, range(stopped))
    second, late = monitor_of(log_every=3)
    for name, part in second.stateful.items():
        part.load_state_dict(first.stateful[name].state_dict())
    feed(second, range(stopped, 8))
    assert untimed(early.logged + late.logged) == untimed(expected.logged)
    for one, other in zip(second.halves, whole.halves, strict=True):
        assert one.summary().counts == other.summary().counts
