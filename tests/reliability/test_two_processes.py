"""Two gloo processes: a job that loses a rank ends at once and goes on bit for bit (R7); ranks draw
apart (R5), hold one state (R6) and stop together (R16, R19); the number of processes changes
neither samples, timesteps and noise (R8) nor learning rates (R9).

Shorter forms of R5, R6 and R9 run by default in tests/scripts/test_processes.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.optimization import SchedulerType, get_scheduler
from scipy import stats

from diffusers_curriculum import TimestepSampler
from tests.reliability.harness import ROOT
from tests.reliability.two_processes import DEADLINE, Fault, Kill, Outcome, check_whole, launch
from tests.scripts.small_runs import Bench, hashes, make_bench
from tests.statistics.checks import chi_square

pytestmark = pytest.mark.reliability

STEPS = 12
LATEST = ("--resume_from_checkpoint", "latest")
EVERY_STEP = ("--checkpointing_steps", 1)
DRAWS = (
    *("--max_train_steps", STEPS, "--lr_scheduler", "cosine", "--lr_warmup_steps", 3),
    *("--timestep_sampler", "laplace", "--timestep_draw", "stratified", "--noise_offset", 0.1),
    *("--random_flip", "--caption_dropout", 0.2),
)
CURRICULUM = (
    *("--curriculum", "difficulty", "--curriculum_clusters", 4, "--curriculum_patience", 1),
    *("--curriculum_max_share", 1),
)
EVERYTHING = (
    *(*DRAWS, *CURRICULUM, "--gradient_accumulation_steps", 2, "--use_ema"),
    *("--ema_decay", 0.9, "--log_every", 5, "--importance_correction", 0.5),
)
OFTEN = (*EVERYTHING, *LATEST, "--checkpointing_steps", 3, "--checkpoints_total_limit", 2)


@dataclass(frozen=True)
class Finished:
    """A job that came to its end."""

    output: Path
    outcome: Outcome


def finish(bench: Bench, folder: Path, *more: object, batch: int, processes: int = 2) -> Finished:
    """Run to the end; the output folder may hold a checkpoint to go on from."""
    output = folder / "output"
    outcome = launch(folder, bench.argv(output, *more, batch=batch), processes, script=bench.script)
    assert outcome.statuses == [0] * processes, outcome.said()
    return Finished(output, outcome)


def with_checkpoint(folder: Path, source: Finished, step: int) -> Path:
    """A folder whose output holds one checkpoint of a finished job."""
    name = f"checkpoint-{step}"
    shutil.copytree(source.output / name, folder / "output" / name)
    return folder


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two processes with everything that has a state, never stopped, a checkpoint per step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return finish(bench, folder, *EVERYTHING, *EVERY_STEP, batch=1)


def check_same_bits(job: Finished, undisturbed: Finished, exported: str) -> None:
    """All that both ranks saw, computed and held in every step made, and all that they left."""
    for rank in range(2):
        seen, expected = job.outcome.saw(rank), undisturbed.outcome.saw(rank)
        first = min(seen)
        assert sorted(seen) == list(range(first, STEPS))
        assert seen == {step: expected[step] for step in seen}
    for name in (f"checkpoint-{STEPS}", exported):
        left = hashes(job.output / name)
        assert left
        assert left == hashes(undisturbed.output / name)


# -- R7: stop and resume ---------------------------------------------------------------------------


def test_the_undisturbed_job_has_something_to_lose(undisturbed: Finished) -> None:
    first, second = (undisturbed.outcome.saw(rank) for rank in range(2))
    assert sorted(first) == list(range(STEPS))
    assert len({told["stage"] for told in first.values()}) >= 3
    assert len({told["loss"] for told in first.values()}) == STEPS
    assert len({told["state"] for told in first.values()}) == STEPS
    for told, other in zip(first.values(), second.values(), strict=True):
        assert told["state"] == other["state"]
        assert told["loss"] == other["loss"]
        assert not told["slots"].keys() & other["slots"].keys()
    assert check_whole(undisturbed.output) == [f"checkpoint-{k + 1}" for k in range(STEPS)]


FAST_STOPS = (4, 9)
STOPS = [
    pytest.param(step, marks=() if step in FAST_STOPS else pytest.mark.slow)
    for step in range(1, STEPS)
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("stopped", STOPS)
def test_ddp_resume_bits(bench: Bench, undisturbed: Finished, tmp_path: Path, stopped: int) -> None:
    folder = with_checkpoint(tmp_path, undisturbed, stopped)
    job = finish(bench, folder, *EVERYTHING, *LATEST, "--checkpointing_steps", STEPS, batch=1)
    assert [min(job.outcome.saw(rank)) for rank in range(2)] == [stopped, stopped]
    check_same_bits(job, undisturbed, bench.exported)


# -- R7: a killed rank -----------------------------------------------------------------------------


def random_kill(trial: int, rank: int, number: signal.Signals = signal.SIGKILL) -> Kill:
    """Even trials: within a random step; odd trials: within a random save."""
    draw = np.random.default_rng([trial, rank])
    after = int(draw.integers(1, 4))  # of 12 steps with a save at every third
    if trial % 2:
        return Kill(rank, after, float(draw.uniform(0, 0.05)), save=True, number=number)
    return Kill(rank, 3 * after - 2, float(draw.uniform(0, 0.1)), number=number)


KILLS = [
    pytest.param(trial, rank, marks=() if rank == 1 and trial < 2 else pytest.mark.slow)
    for rank, trials in ((1, 10), (0, 4))
    for trial in range(trials)
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("trial", "rank"), KILLS)
def test_ddp_kill_one_rank(
    bench: Bench, undisturbed: Finished, tmp_path: Path, trial: int, rank: int
) -> None:
    output, kill = tmp_path / "output", random_kill(trial, rank)
    killed = launch(tmp_path, bench.argv(output, *OFTEN, batch=1), kill=kill, script=bench.script)
    check_ended(killed, kill, output)
    saved = max([0, *killed.ranks[0].saved])
    job = finish(bench, tmp_path, *OFTEN, batch=1)
    assert job.outcome.ranks[0].resumed_at in {saved, saved + 3}  # killed after the renaming
    for number in range(2):  # what was computed before the kill too
        seen, expected = killed.saw(number), undisturbed.outcome.saw(number)
        assert seen == {step: expected[step] for step in seen}
    check_same_bits(job, undisturbed, bench.exported)


def check_ended(killed: Outcome, kill: Kill, output: Path) -> None:
    """The other rank noticed by itself, said so, and left whole checkpoints only."""
    survivor = killed.statuses[1 - kill.rank]
    print(
        f"\nR7 rank {kill.rank} killed {'in' if killed.in_save else 'outside'} a save: the other "
        f"ended with {survivor} after {killed.seconds:.2f} s; whole: {check_whole(output)}"
    )
    assert killed.statuses[kill.rank] == -signal.SIGKILL
    assert survivor is not None
    assert survivor > 0, killed.said()
    assert killed.seconds < DEADLINE


# -- R7: under the real launcher -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank in /proc")
@pytest.mark.parametrize("moment", ["checkpoint-6", "start"])
def test_torchrun_ends_when_a_rank_is_killed(
    bench: Bench, undisturbed: Finished, tmp_path: Path, moment: str
) -> None:
    output = tmp_path / "output"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(bench.module.__file__)]
    command += bench.argv(output, *OFTEN, batch=1)
    more = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "said.txt").open("w") as said:
        job = subprocess.Popen(command, env=os.environ | more, stdout=said, stderr=said)
    try:
        victim = wait_for(job, lambda: rank_of(job.pid, "1"))
        if moment == "start":  # before it can have met the other
            time.sleep(1)
        else:
            wait_for(job, lambda: (output / moment).exists())
        other = wait_for(job, lambda: rank_of(job.pid, "0"))
        os.kill(victim, signal.SIGKILL)
        begun = time.monotonic()
        status = job.wait(DEADLINE)
    finally:
        job.kill()
        job.wait()
    seconds = time.monotonic() - begun
    print(f"\nR7 torchrun, rank 1 killed at {moment}: status {status} after {seconds:.2f} s")
    assert status != 0, (tmp_path / "said.txt").read_text()[-3000:]
    assert seconds < DEADLINE
    assert not Path(f"/proc/{other}").exists()
    assert bool(check_whole(output)) == (moment != "start")
    check_same_bits(finish(bench, tmp_path, *OFTEN, batch=1), undisturbed, bench.exported)


def wait_for(job: subprocess.Popen[bytes], look: Any, seconds: float = 120) -> Any:
    """What ``look`` finds, once it finds something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and job.poll() is None:
        if found := look():
            return found
        time.sleep(0.01)
    raise TimeoutError(f"nothing came in {seconds} s, or the job ended with {job.poll()}")


def rank_of(launcher: int, rank: str) -> int | None:
    """The process that a launcher started with this rank; None if there is none yet."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if f"RANK={rank}".encode() in variables:
            return int(child)
    return None


# -- R19 and R16: one rank is told to stop, or meets what is not finite ----------------------------

SIGNALS = [
    pytest.param(trial, rank, marks=() if (trial, rank) == (0, 1) else pytest.mark.slow)
    for trial in range(5)
    for rank in range(2)
]


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("trial", "rank"), SIGNALS)
def test_sigterm_to_one_rank_saves_exact_step(
    bench: Bench, undisturbed: Finished, tmp_path: Path, trial: int, rank: int
) -> None:
    output, term = tmp_path / "output", random_kill(trial, rank, signal.SIGTERM)
    told = launch(tmp_path, bench.argv(output, *OFTEN, batch=1), kill=term, script=bench.script)
    done = [max(told.saw(number)) + 1 for number in range(2)]
    print(f"\nR19 SIGTERM to rank {rank}: {told.statuses} after {told.seconds:.2f} s, step {done}")
    assert told.statuses == [143, 143], told.said()
    assert done[0] == done[1]
    assert done[0] < STEPS
    assert check_whole(output)[-1] == f"checkpoint-{done[0]}"
    job = finish(bench, tmp_path, *OFTEN, batch=1)
    assert job.outcome.ranks[0].resumed_at == done[0]
    check_same_bits(job, undisturbed, bench.exported)


FAULTS = [
    pytest.param(
        Fault(rank, 4, gradients),
        id=f"{'gradients' if gradients else 'losses'}-{rank}",
        marks=() if rank and not gradients else pytest.mark.slow,
    )
    for gradients in (True, False)
    for rank in range(2)
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("fault", FAULTS)
def test_nonfinite_loss_on_one_rank_raises_on_both(
    bench: Bench, undisturbed: Finished, tmp_path: Path, fault: Fault
) -> None:
    output = tmp_path / "output"
    job = launch(tmp_path, bench.argv(output, *OFTEN, batch=1), fault=fault, script=bench.script)
    made = [max(job.saw(number)) for number in range(2)]
    print(f"\nR16 {fault}: statuses {job.statuses}, last steps {made}")
    assert job.statuses == [3, 3], job.said()
    assert made[0] == made[1]
    assert check_whole(output) == ["checkpoint-3"]  # from before the fault
    check_same_bits(finish(bench, tmp_path, *OFTEN, batch=1), undisturbed, bench.exported)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_nonfinite_loss_on_one_rank_skips_on_both(
    bench: Bench, undisturbed: Finished, tmp_path: Path, fault: Fault
) -> None:
    more = (*DRAWS, *EVERY_STEP, "--nonfinite", "skip")
    output = tmp_path / "output"
    job = launch(tmp_path, bench.argv(output, *more), fault=fault, script=bench.script)
    assert job.statuses == [0, 0], job.said()
    assert check_whole(output) == [f"checkpoint-{k + 1}" for k in range(STEPS)]
    held = [hashes(output / f"checkpoint-{k}" / bench.trained) for k in range(1, STEPS + 1)]
    same = [k for k in range(1, STEPS) if held[k] == held[k - 1]]
    print(f"\nR16 {fault}: weights unchanged in steps {same}")
    assert same == [4]
    moments = [hashes(output / f"checkpoint-{k}")["optimizer.safetensors"] for k in (4, 5)]
    assert moments[0] == moments[1]
    states = [[told["state"] for told in job.saw(number).values()] for number in range(2)]
    assert states[0] == states[1]


# -- R8: another number of processes ---------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("sampler", "accumulation"),
    [
        pytest.param((), 1, id="plain"),
        pytest.param(CURRICULUM, 2, id="curriculum-accumulated", marks=pytest.mark.slow),
    ],
)
def test_elastic_1_to_2_to_1(
    bench: Bench, tmp_path: Path, sampler: Sequence[object], accumulation: int
) -> None:
    more = (*DRAWS, *sampler, *EVERY_STEP, *LATEST)
    split = ("--gradient_accumulation_steps", accumulation)
    one = finish(bench, tmp_path / "one", *more, batch=4, processes=1)
    folder = with_checkpoint(tmp_path / "two", one, 4)
    two = finish(bench, folder, *more, *split, batch=2 // accumulation)
    folder = with_checkpoint(tmp_path / "three", two, 8)
    again = finish(bench, folder, *more, *split, batch=4 // accumulation, processes=1)

    expected, told = one.outcome.together(), one.outcome.saw(0)
    assert all(sorted(slots) == list("0123") for slots in expected.values())
    whats = {"image", "condition", "level", *bench.draws}
    assert all(what.keys() == whats for slots in expected.values() for what in slots.values())
    worst = 0.0
    for job, first in ((two, 4), (again, 8)):
        assert job.outcome.together() == {step: expected[step] for step in range(first, STEPS)}
        for step, seen in job.outcome.saw(0).items():
            assert (seen["stage"], seen["lr"]) == (told[step]["stage"], told[step]["lr"])
            losses = [float.fromhex(entry["loss"]) for entry in (seen, told[step])]
            worst = max(worst, abs(losses[0] / losses[1] - 1))
    print(f"\nR8 1 -> 2 -> 1: {4 * STEPS} samples identical; losses differ by {worst:.1e} at most")
    assert worst < 1e-5


def test_class_images_are_the_same_on_one_process_and_two(tmp_path: Path) -> None:
    bench, told = make_bench(tmp_path / "bench"), {}
    for processes in (1, 2):
        own = tmp_path / f"class-{processes}"
        prior = ("--with_prior_preservation", "--class_data_dir", own, "--class_prompt", "a toy")
        more = (*DRAWS, *prior, "--num_class_images", 3, "--max_train_steps", 4)
        folder, batch = tmp_path / str(processes), 4 // processes
        job = finish(bench, folder, *more, batch=batch, processes=processes)
        drawn = {path.name: path.read_bytes() for path in own.iterdir()}
        told[processes] = job.outcome.together(), drawn
    assert told[1] == told[2]
    seen, drawn = told[1]
    assert len(drawn) == 3
    assert all(sorted(slots) == list("01234567") for slots in seen.values())
    of_class = {slots[slot]["image"] for slots in seen.values() for slot in "1357"}
    assert not of_class & {slots[slot]["image"] for slots in seen.values() for slot in "0246"}


# -- R9: learning rates ----------------------------------------------------------------------------


SCHEDULES = sorted({s.value for s in SchedulerType} - {"piecewise_constant"})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lr_same_for_1_and_2_processes(bench: Bench, tmp_path: Path, schedule: str) -> None:
    length, warmup = 6, 2
    more = ("--max_train_steps", length, "--lr_scheduler", schedule, "--lr_warmup_steps", warmup)
    found = {}
    for processes in (1, 2):
        for split in (1, 2):
            job = finish(
                bench,
                tmp_path / f"{processes}-{split}",
                *more,
                "--gradient_accumulation_steps",
                split,
                batch=1,
                processes=processes,
            )
            for rank in range(processes):
                rates = [told["lr"] for told in job.outcome.saw(rank).values()]
                found[processes, split, rank] = rates
    # the oracle knows neither processes nor accumulation
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    oracle: Any = get_scheduler(
        schedule, optimizer, num_warmup_steps=warmup, num_training_steps=length
    )
    expected = []
    for _ in range(length):
        optimizer.step()
        oracle.step()
        expected.append(float(oracle.get_last_lr()[0]).hex())
    print(f"\nR9 {schedule}: {len(found)} lists, {len({*map(tuple, found.values())})} distinct")
    assert list(found.values()) == [expected] * 6


@pytest.mark.slow
def test_scaled_lr_same_at_the_same_global_batch(bench: Bench, tmp_path: Path) -> None:
    more = ("--max_train_steps", 4, "--lr_scheduler", "linear", "--scale_lr")
    more += ("--lr_warmup_steps", 0)
    found = []
    for processes, batch, split in ((1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2)):
        folder = tmp_path / f"{processes}-{batch}-{split}"
        more_ = (*more, "--gradient_accumulation_steps", split)
        job = finish(bench, folder, *more_, batch=batch, processes=processes)
        found.append([float.fromhex(told["lr"]) for told in job.outcome.saw(0).values()])
    assert found[0][0] == pytest.approx(4e-3 * 3 / 4)
    assert found == [found[0]] * 4


# -- R5 and R6: 200 steps --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_draw_different_timesteps_and_noise(bench: Bench, tmp_path: Path) -> None:
    steps, batch = 200, 2
    more = ("--max_train_steps", steps, "--timestep_sampler", "laplace", "--timestep_draw", "iid")
    job = finish(bench, tmp_path, *more, batch=batch)
    sampler = TimestepSampler.from_pretrained(str(tmp_path / "output"))  # what the run left
    told = [job.outcome.saw(rank) for rank in range(2)]
    slots = [[slot for seen in one.values() for slot in seen["slots"].values()] for one in told]
    tensors = [{slot["noise"] for slot in one} for one in slots]
    levels = np.array([[slot["level"] for slot in one] for one in slots])
    noise = np.array([[value for seen in one.values() for value in seen["noise"]] for one in told])
    assert levels.shape == (2, steps * batch)
    assert noise.shape[1] >= 16 * steps

    identical = 2 * steps * batch - len(tensors[0] | tensors[1])
    correlations = {
        "noise": (np.corrcoef(noise)[0, 1], 4 / np.sqrt(noise.shape[1])),
        "timesteps": (np.corrcoef(levels)[0, 1], 4 / np.sqrt(levels.shape[1])),
    }
    counts = np.bincount(levels.ravel(), minlength=len(sampler.levels))
    chances = {
        "timesteps": chi_square(counts, sampler.probabilities(0).numpy()),
        "noise": chi_square(*even_cells(stats.norm.cdf(noise.ravel()))),
    }
    states = [[seen["state"] for seen in one.values()] for one in told]
    print(f"\nR5 {steps} steps: {identical} identical noise tensors")
    for what, (correlation, bound) in correlations.items():
        print(f"R5 {what}: corr {correlation:+.4f}, bound {bound:.4f}")
        print(f"R5 {what}: pooled chi-square p = {chances[what]:.3f}")
    differing = sum(a != b for a, b in zip(*states, strict=True))
    print(f"R6 {steps} steps: {differing} differing states")
    assert identical == 0
    assert all(abs(c) < bound for c, bound in correlations.values())
    assert all(p > 1e-4 for p in chances.values())
    assert differing == 0
    assert len(set(states[0])) == steps


def even_cells(shares: np.ndarray, cells: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Counts of values in [0, 1] in cells of equal mass, and these masses."""
    places = np.minimum((shares * cells).astype(int), cells - 1)
    return np.bincount(places, minlength=cells), np.full(cells, 1 / cells)
