"""Signals and the clock end a run after a whole step, with the right exit status."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable

import pytest

from diffusers_curriculum.training.process.stopping import REASONS, Stopped, StopRequest

SIGNALS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
HOUR = 3600.0


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def timed(max_hours: float) -> tuple[StopRequest, Clock]:
    clock = Clock()
    return StopRequest(max_hours, clock), clock


@pytest.mark.parametrize(("number", "status"), SIGNALS.items())
def test_a_signal_stops_after_the_step(number: signal.Signals, status: int) -> None:
    with StopRequest() as stop:
        assert not stop.requested(6)
        signal.raise_signal(number)
        assert stop.requested(7)
        stopped = stop.stopped()
    assert stopped.status == status
    assert isinstance(stopped, Stopped)
    assert str(stopped) == (
        f"stopped by {number.name} after step 7, which is saved; go on with "
        "--resume_from_checkpoint latest"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_same_signal_twice_is_one_request(number: signal.Signals) -> None:
    with StopRequest() as stop:
        for _ in range(3):
            signal.raise_signal(number)
        assert stop.requested(1)
        assert stop.stopped().status == 143


@pytest.mark.parametrize("between", [(), (signal.SIGTERM,), (signal.SIGUSR1,)])
def test_the_second_ctrl_c_stops_at_once(between: Iterable[signal.Signals]) -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        for number in between:
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_says_what_will_happen(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
    assert "Saving at the end of this step" in capfd.readouterr().err


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGINT), tuple(SIGNALS)])
def test_a_termination_counts_more_than_ctrl_c(signals: tuple[signal.Signals, ...]) -> None:
    with StopRequest() as stop:
        for number in signals:
            signal.raise_signal(number)
        assert stop.requested(1)
        assert stop.stopped().status == 143


def raise_after(number: signal.Signals) -> None:
    signal.raise_signal(number)
    raise ZeroDivisionError


def test_the_handlers_of_before_come_back() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        mine = signal.getsignal(signal.SIGUSR1)
        others = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(ZeroDivisionError), StopRequest():
            raise_after(signal.SIGUSR1)
        assert heard == []
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == others
        signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_another_thread_only_the_clock_counts() -> None:
    seen: list[bool] = []

    def run() -> None:
        stop, clock = timed(1.0)
        with stop:
            seen.append(stop.requested(1))
            clock.now += 2 * HOUR
            seen.append(stop.requested(2))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False, True]


# One hour, steps of 300 seconds: stop as soon as a step and a save would end after it.
@pytest.mark.parametrize(("save_seconds", "last"), [(0, 12), (299, 11), (300, 11), (301, 10)])
def test_the_time_leaves_room_for_a_step_and_a_save(save_seconds: float, last: int) -> None:
    stop, clock = timed(1.0)
    stop.save_seconds = save_seconds
    with stop:
        step = 0
        while not step or not stop.requested(step):
            clock.now += 300
            step += 1
    assert step == last
    assert stop.stopped().status == 0
    assert str(stop.stopped()).startswith(f"stopped by --max_hours after step {last}, ")


def test_it_is_the_longest_step_that_must_fit() -> None:
    stop, clock = timed(1.0)
    with stop:
        for step, seconds in enumerate((100, 1700, 100, 1), 1):
            clock.now += seconds
            assert stop.requested(step) == (step == 4)  # 1900 + 1700 would just do


def test_a_save_is_timed() -> None:
    stop, clock = timed(1.0)
    with stop.saving():
        clock.now += 200
    assert stop.save_seconds == 200


def test_the_first_step_is_measured_from_the_start_of_training_not_of_loading() -> None:
    stop, clock = timed(1.0)
    clock.now += 0.6 * HOUR  # loading
    with stop:
        clock.now += 60
        assert not stop.requested(1)
        clock.now += 0.4 * HOUR - 100
        assert stop.requested(2)  # but loading took of the time that there is


@pytest.mark.parametrize("save_seconds", [0.0, 700.0])
def test_what_is_left_is_never_overrun(save_seconds: float) -> None:
    stop, clock = timed(2.0)
    with stop:
        for step in range(1, 1000):
            clock.now += 40 + 25 * (step % 3)
            if stop.requested(step):
                break
            if step % 20 == 0:
                with stop.saving():
                    clock.now += save_seconds
        clock.now += save_seconds
    left = 1e6 + 2 * HOUR - clock.now
    assert 0 <= left <= 2 * (90 + save_seconds)


def test_no_limit_and_no_signal_never_stop() -> None:
    clock = Clock()
    with StopRequest(None, clock) as stop:
        for step in range(3):
            clock.now += 1000 * HOUR
            assert not stop.requested(step)


def test_the_clock_is_one_that_nobody_can_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest(1.0) as stop:
        monkeypatch.setattr(time, "time", lambda: 1e12)
        assert not stop.requested(1)


def test_exit_statuses_are_those_of_the_shell() -> None:
    by_name = {reason.name: reason.status for reason in REASONS[2:]}
    assert by_name == {"SIGINT": 130, "SIGUSR1": 143, "SIGTERM": 143}
    assert by_name["SIGTERM"] == 128 + signal.SIGTERM
    assert by_name["SIGINT"] == 128 + signal.SIGINT
