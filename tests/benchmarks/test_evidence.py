"""benchmarks/evidence: seeds are independent, measures exact, ratios and verdicts those of the
curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import data, images, running
from benchmarks.evidence.cells import SETTINGS, Cell, cells_of, config, names
from benchmarks.evidence.claims import (
    CLAIMS,
    NOT_MEASURED,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    REPRODUCED,
    STATISTICS,
    verdict_on,
)
from benchmarks.evidence.curves import (
    Interval,
    mean_interval,
    ratio_interval,
    steps_ratio,
    steps_to,
)
from benchmarks.evidence.entropy import entropy_ratios
from benchmarks.evidence.judge import Judge, distances
from benchmarks.evidence.measuring import measure, prepare
from benchmarks.evidence.mixtures import MixtureTask
from benchmarks.evidence.network import StackedMlp, parameters_of
from benchmarks.evidence.report import _pair_table, _summary_table, in_words, summary
from benchmarks.evidence.results import Result, Results, over_tasks, step_ratios, time_ratios
from benchmarks.evidence.target import Target, for_run, seeded

TINY = {"width": 16, "blocks": 2, "batch": 32, "steps": 6, "samples": 40, "sampling_steps": [3]}


def cell(
    task: str = "digits", target: str = "linear_v", method: str = "uniform", **told: Any
) -> Cell:
    return Cell(task, target, method, SETTINGS | TINY | told)


# -- the command -----------------------------------------------------------------------------------


def test_the_quick_tier_runs_goes_on_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.evidence.judge.STEPS", 40)
    told = ["--processes", "1", "--output_dir", str(tmp_path)]
    assert command.main(["quick", *told, "--only", "mixture_2/*"]) == 0
    first = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(first) == 2
    assert "2 cells, 0 of them done" in capsys.readouterr().out
    assert command.main(["quick", *told]) == 0
    assert "5 cells, 2 of them done" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == time for file, time in first.items())
    text = tmp_path / "RESULTS.md"
    report = ["report", "--tier", "quick", "--output_dir", str(tmp_path), "--results", str(text)]
    assert command.main(report) == 0
    assert "### digits_lora, linear_v" in text.read_text("utf-8")
    assert (tmp_path / "digits-edm.png").is_file()
    assert command.main([*report, "--check"]) == 0
    text.write_text(text.read_text("utf-8") + "\nIt is 123.456 times as good.\n", "utf-8")
    assert command.main([*report, "--check"]) == 1
    assert "123.456 is no figure" in capsys.readouterr().out
    last = max(tmp_path.glob("digits-edm-uniform-*.json"))
    (final,) = json.loads(last.read_text("utf-8"))["checkpoints"][-1:]
    assert len(final["metrics"]["frechet"]) == 2
    assert "frechet, guidance 1.5" in final["metrics"]
    assert "precision, 2 sampling steps" in final["metrics"]


def test_a_run_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it writes: no half file counts, and the next run measures the cell again."""
    one = cell("mixture_2", steps=2, first_checkpoint=2, seeds=1)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            running.run([one], tmp_path, 1)
    assert running.missing([one], tmp_path) == [one]
    running.run([one], tmp_path, 1)
    assert running.missing([one], tmp_path) == []


def test_a_cell_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    faulty = cell("mixture_2", method="uniform", seeds=1, learning_rate=-1.0)
    sound = cell("mixture_2", steps=2, first_checkpoint=2, seeds=1)
    with pytest.raises(running.Failed, match=r"1 of 2 cells failed: mixture_2.*learning rate: -1"):
        running.run([faulty, sound], tmp_path, 1)
    assert running.missing([sound], tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quick", "--only", "nothing/*"], "--only 'nothing/*' fits no cell: they are called"),
        (["report", "--tier", "quick"], "has no result of quick"),
    ],
)
def test_what_cannot_be_is_told(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*argv, "--output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_every_config_file_can_be_built_and_every_tier_read() -> None:
    for name in names("targets"):
        target = Target(config("targets", name))
        for method in names("methods"):
            told = config("methods", method)
            assert target.sampler(told["sampler"], 3, 2000).seed == 3
            target.weights(told, 2000)
    for tier in names("tiers"):
        cells = cells_of(tier)
        assert len({one.name for one in cells}) == len(cells)


def test_tasks_that_are_kept_aside_are_measured_only_where_they_are_asked_for() -> None:
    cells = cells_of("small")
    assert {one.task for one in cells if one.held_out} == {"mixture_16", "glyphs"}
    kept = command.chosen(cells, None, False)
    assert not [one for one in kept if one.held_out]


def test_shares_of_a_run_and_seeds_reach_nested_samplers() -> None:
    told = for_run({"phases": [{"until": "60%", "sampler": {"base": {"density": "x"}}}]}, 50)
    assert told["phases"][0]["until"] == 30
    assert seeded(told, 7)["phases"][0]["sampler"]["base"]["seed"] == 7


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["curriculum", "loss_second_moment"])
def test_a_seed_does_not_depend_on_those_beside_it(method: str, tmp_path: Path) -> None:
    many = prepare(cell(method=method, first_seed=0, seeds=5), tmp_path)
    alone = prepare(cell(method=method, first_seed=3, seeds=1), tmp_path)
    for step in range(TINY["steps"]):
        both = many.step(step)[3], alone.step(step)[0]
        torch.testing.assert_close(*both)
    for one, other in zip(many.average, alone.average, strict=True):
        torch.testing.assert_close(one[3:4], other, rtol=1e-4, atol=1e-6)
        assert not torch.equal(one[0], one[3])


def test_a_seed_that_becomes_infinite_is_told_and_leaves_the_others(tmp_path: Path) -> None:
    sound = prepare(cell(seeds=2), tmp_path)
    broken = prepare(cell(seeds=2), tmp_path)
    assert isinstance(broken.network, StackedMlp)
    assert isinstance(broken.network, StackedMlp)
    with torch.no_grad():
        broken.network.entry.weight[1].fill_(float("nan"))
    for step in range(3):
        losses = sound.step(step), broken.step(step)
        torch.testing.assert_close(losses[0][0], losses[1][0])
    assert bool(losses[1][1].isnan().all())
    nothing = Judge(data.Pictures(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), 2))
    rows = torch.full((3, 2), float("nan"))
    assert all(math.isnan(v) for v in distances(nothing, data.digits(), rows, rows[:, 0]).values())


def test_the_losses_are_those_of_the_library_for_one_seed(tmp_path: Path) -> None:
    """The first step's gradient is that of the mean over the seed's own batch."""
    trainer = prepare(cell(seeds=2, class_dropout=0.0, method="min_snr"), tmp_path)
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.step(0)
    pairs = zip(before, trainer.parameters, strict=True)
    assert all(bool((a != b.detach()).flatten(1).any(1).all()) for a, b in pairs)
    assert trainer.overhead.seconds < trainer.total.seconds


def test_an_adapter_starts_as_the_network_and_is_all_that_is_trained() -> None:
    network = StackedMlp(range(2), size=4, width=8, blocks=1, classes=3)
    x, level, labels = torch.ones(2, 5, 4), torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.long)
    before = network(x, level, labels)
    network.adapt(2, range(2))
    torch.testing.assert_close(network(x, level, labels), before)
    shapes = [tuple(p.shape[1:]) for p in parameters_of(network)]
    assert len(shapes) == 2 * len(network.linears()) + 1
    assert all(2 in shape or shape == (4, 8) for shape in shapes)


# -- measures --------------------------------------------------------------------------------------


def test_the_frechet_distance_is_that_of_the_formula() -> None:
    real = data.digits()
    judge, generator = Judge(real), torch.Generator().manual_seed(1)
    made = real.rows + 0.5 * torch.randn(real.rows.shape, generator=generator)
    found = distances(judge, real, made, real.labels)["frechet"]
    a, b = (judge.look(rows)[0].double().numpy() for rows in (real.rows, made))
    root: Any = sqrtm(np.cov(a.T) @ np.cov(b.T))
    exact = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        np.cov(a.T) + np.cov(b.T) - 2 * root.real
    )
    assert found == pytest.approx(exact, rel=1e-3)
    same = distances(judge, real, real.rows, real.labels)
    assert same["frechet"] < 1e-4 * found
    assert same["agreement"] > 0.99
    assert same["precision"] == 1


@pytest.mark.parametrize("target", ["linear_v", "linear_epsilon", "linear_sample", "flow", "edm"])
def test_the_excess_of_the_exact_denoiser_is_zero(target: str, tmp_path: Path) -> None:
    task = MixtureTask(config("tasks", "mixture_2"), SETTINGS, tmp_path)
    at = Target(config("targets", target))
    levels, excess = task.excess(_Exact(task, at), at)
    assert len(levels) > 25
    assert float(excess.max()) < 1e-4
    _, worse = task.excess(_Exact(task, at, wrong=0.1), at)
    assert float(worse.min()) > 1e-5


def test_a_checkpoint_tells_the_excess_at_each_level(tmp_path: Path) -> None:
    """Its integral is the measure that decides; results without it are results as before."""
    one = cell("mixture_2", seeds=2, steps=2, first_checkpoint=1)
    for point in measure(one, tmp_path)["checkpoints"][1:]:
        told, metrics = point["excess"], point["metrics"]
        assert len(told["log_snr"]) > 25
        integral = np.trapezoid(told["of_seeds"], told["log_snr"])
        assert integral == pytest.approx(metrics["excess"], rel=1e-4)
        assert len(metrics["sliced"]) == 2
    before = [c for c in cells_of("small") if c.method == "uniform" and c.task == "mixture_64"]
    (old,) = Results.of(before, command.OUTPUT_DIR).all
    assert old.steps[-1] == 2000
    assert "excess" not in old.checkpoints[-1]


class _Exact:
    """A network that predicts what the exact denoiser amounts to, or that much more."""

    seeds, device = 1, torch.device("cpu")

    def __init__(self, task: MixtureTask, target: Target, wrong: float = 0.0) -> None:
        self.task, self.target, self.wrong = task, target, wrong

    def __call__(self, given: torch.Tensor, log_snr: torch.Tensor, labels: None) -> torch.Tensor:
        levels, objective = self.target.levels, self.target.objective
        index = int((levels.log_snr - log_snr[0, 0]).abs().argmin())
        at, alpha, sigma = torch.tensor([index]), levels.alpha[index], levels.sigma[index]
        ones = torch.ones(1, 1, dtype=torch.float64)
        x = given[0].double() / objective.scale_input(ones, at)
        x0 = self.task.mixture.denoised(x, alpha.expand(len(x)), sigma.expand(len(x)))
        noise = (x - alpha * x0) / sigma
        return (objective.target(x0, noise, at.expand(len(x))) + self.wrong)[None]


def test_the_exact_denoiser_is_the_mean_of_the_posterior(tmp_path: Path) -> None:
    task = MixtureTask(config("tasks", "mixture_2"), SETTINGS, tmp_path)
    points = task.mixture.draw(400_000, torch.Generator().manual_seed(0)).double()
    x, alpha, sigma = torch.tensor([[0.4, -0.3]]), torch.tensor([0.6]), torch.tensor([0.8])
    shares = (-(x - alpha * points).square().sum(1) / (2 * sigma**2)).softmax(0)
    exact = task.mixture.denoised(x, alpha, sigma)[0]
    torch.testing.assert_close((shares[:, None] * points).sum(0), exact, atol=0.01, rtol=0)
    assert float(points.var()) == pytest.approx(1, abs=0.02)


# -- ratios and verdicts ---------------------------------------------------------------------------

STEPS = [250, 500, 1000, 2000, 4000]


def power(scale: float, slope: float = 1.0) -> list[tuple[float, float]]:
    """Quality scale / steps^slope."""
    return [(step, scale / step**slope) for step in STEPS]


def test_steps_are_interpolated_in_the_logarithms_of_both() -> None:
    assert steps_to(power(4000.0), 3.0) == pytest.approx(4000 / 3)
    assert steps_to(power(4000.0), 100.0) == 250
    assert steps_to(power(4000.0), 0.5) == math.inf


@pytest.mark.parametrize("faster", [1.0, 1.3, 2.7, 1 / 1.3, 1 / 2.7])
def test_the_ratio_of_steps_is_the_known_one_from_both_sides(faster: float) -> None:
    """Below 1 the method never reaches the reference's quality."""
    assert steps_ratio(power(1000.0), power(1000.0 / faster)) == pytest.approx(faster)


def test_a_curve_that_is_not_finite_has_no_ratio() -> None:
    broken = [*power(1000.0)[:-1], (4000, math.nan)]
    assert math.isnan(steps_ratio(power(1000.0), broken))
    assert math.isnan(ratio_interval([[1.0, math.nan, 1.0]]).value)


def test_intervals_cover_what_they_should() -> None:
    random, covered, covered_mean = np.random.default_rng(0), 0, 0
    for _ in range(200):
        logs = random.normal(0.3, 0.2, 5)
        low, high = ratio_interval([np.exp(logs).tolist()])[1:]
        covered += low <= math.exp(0.3) <= high
        covered_mean += mean_interval(logs.tolist()).low <= 0.3 <= mean_interval(logs.tolist()).high
    assert 0.89 <= covered / 200 <= 0.98  # plain percentiles: 0.83
    assert 0.92 <= covered_mean / 200 <= 0.98


def result(method: str, scale: float, *, spread: float = 0.02, seeds: int = 5) -> Result:
    random = np.random.default_rng(sum(map(ord, method)))
    factors = np.exp(random.normal(0, spread, seeds))
    rows = [
        {"step": n, "metrics": {"frechet": [scale * f / n for f in factors]}, "seconds": 100.0}
        | {"law_seconds": 1.0, "loss": [[n**-0.5, n**-2.0]] * seeds}
        for n in STEPS
    ]
    start = {"step": 0, "loss": [[1.0, 1.0]] * seeds}
    told = {"task": "t", "target": "v", "method": method, "name": f"t/v/{method}", "group": ""}
    rest = {"held_out": False, "quality": "frechet", "log_snr": [4.0, -4.0]}
    return Result.of({"cell": told, "checkpoints": [start, *rows]} | rest)


def test_a_law_that_costs_time_saves_less_of_it() -> None:
    costly = result("fast", 500.0)
    for point in costly.checkpoints:
        point["law_seconds"] = 50.5
    (steps, *_), (seconds, *_) = (f(SLOW, costly) for f in (step_ratios, time_ratios))
    assert seconds == pytest.approx(steps / 2)


FAST, SLOW, EVEN = result("fast", 500.0), result("slow", 1000.0), result("even", 1000.0, spread=0.4)


def claim(*compared: tuple[str, str, str]) -> dict[str, Any]:
    rows = [{"better": a, "worse": b, "statistic": s, "on": [["t", "v"]]} for a, b, s in compared]
    return {"claim": "c", "source": "s", "comparisons": rows}


@pytest.mark.parametrize(
    ("compared", "verdict"),
    [
        ([("fast", "slow", "steps")], REPRODUCED),
        ([("fast", "slow", "quality")], REPRODUCED),
        ([("slow", "fast", "steps")], NOT_REPRODUCED),
        ([("even", "slow", "quality")], NOT_REPRODUCED),
        ([("fast", "slow", "steps"), ("slow", "fast", "steps")], NOT_REPRODUCED),
        ([("fast", "gone", "steps")], NOT_MEASURED),
        ([("fast", "slow", "steps"), ("fast", "gone", "steps")], NOT_MEASURED),
        ([("fast", "slow", "quality at guidance 3")], NOT_MEASURED),
        ([("slow", "slow", "slower at clean levels")], REPRODUCED),
        ([], NOT_TESTABLE),
    ],
)
def test_verdicts_follow_from_the_intervals(
    compared: list[tuple[str, str, str]], verdict: str
) -> None:
    assert verdict_on(claim(*compared), Results([FAST, SLOW, EVEN])).verdict == verdict


def test_the_schedules_own_steps_are_told_from_the_data() -> None:
    """The first timesteps of linear betas are far apart in log-SNR, whatever the data."""
    told = {"task": config("tasks", "mixture_2"), "target": config("targets", "linear_v")}
    settings = {"settings": SETTINGS | {"seeds": 3}}
    steps, rates = (entropy_ratios(told | settings, between) for between in (True, False))
    assert len(steps) == len(rates) == 3
    assert min(steps) > 2 * max(rates) > 2


def test_the_ratio_of_a_claim_is_the_known_one() -> None:
    (compared,) = verdict_on(claim(("fast", "slow", "steps")), Results([FAST, SLOW])).comparisons
    assert compared.ratio is not None
    assert compared.ratio.value == pytest.approx(2, rel=0.05)
    assert compared.ratio.low < compared.ratio.value < compared.ratio.high


def test_a_seed_that_was_not_finite_is_told_in_words() -> None:
    broken = result("broken", 500.0)
    broken.checkpoints[-1]["metrics"]["frechet"][2] = None
    measured, tasks = {"broken": broken, "quick": result("quick", 500.0)}, Interval(3, 0, 0)
    found = {
        name: {"steps": over_tasks([step_ratios(SLOW, each)]), "steps tasks": tasks}
        for name, each in measured.items()
    }
    told = "\n".join(in_words(found))
    assert "a seed's samples were not finite: broken." in told
    assert f"Saved steps: quick {found['quick']['steps']} on 3." in told


def of_mixture(method: str, excess: float, sliced: float) -> Result:
    """A method whose loss and whose samples tell different things."""
    told, name = result(method, excess).document, f"mixture_2/v/{method}"
    points = zip(told["checkpoints"][1:], result(method, sliced).checkpoints, strict=True)
    for point, other in points:
        point["metrics"] = {
            "excess": point["metrics"]["frechet"],
            "sliced": other["metrics"]["frechet"],
        }
    cell = told["cell"] | {"task": "mixture_2", "name": name}
    return Result.of(told | {"cell": cell, "quality": "excess"} | {"config": {"method": {"a": 1}}})


def test_samples_alone_are_told_beside_the_loss_that_decides() -> None:
    """A law that costs steps by the loss of all levels and saves them by what is drawn."""
    mixture = [of_mixture("uniform", 1000.0, 1000.0), of_mixture("fast", 2000.0, 500.0)]
    found = summary(Results(mixture))["fast"]
    assert found["steps"].value == pytest.approx(0.5, rel=0.05)
    assert found["samples"].value == pytest.approx(2, rel=0.05)
    heads, _, _, row = _pair_table(mixture)
    told = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
    assert told["steps saved"] == str(found["steps"])
    assert told["steps saved, by sliced"] == str(found["samples"])
    overall = _summary_table({"fast": found})
    told = dict(zip(overall[2].split(" | "), overall[4].split(" | "), strict=True))
    assert told["steps saved, by samples alone"] == str(found["samples"])
    assert told["steps saved, by samples alone, tasks kept aside"] == "-"


def test_images_are_judged_by_samples_already() -> None:
    assert FAST.by_samples == FAST.quality == "frechet"
    assert "steps saved, by" not in "".join(_pair_table([SLOW, FAST]))


def test_claims_name_methods_tasks_and_statistics_that_there_are() -> None:
    for told in json.loads(CLAIMS.read_text("utf-8")):
        for each in told.get("comparisons", []):
            assert {each["better"], each["worse"]} <= set(names("methods"))
            assert each["statistic"] in STATISTICS
            for task, target in each["on"]:
                assert config("tasks", task)
                assert config("targets", target)


def test_the_base_of_a_fine_tuning_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(config("tasks", "digits_tuned"), "steps_before", 3)
    first = prepare(cell("digits_tuned", seeds=1), tmp_path)
    monkeypatch.setattr(images, "Trainer", None)  # a second training would fail
    again = prepare(cell("digits_tuned", method="laplace_0_1", seeds=1), tmp_path)
    for one, other in zip(first.parameters, again.parameters, strict=True):
        assert torch.equal(one, other)
    _, labels = first.task.batch(50, torch.Generator().manual_seed(0))
    assert labels is not None
    assert set(labels.tolist()) == {5, 6, 7, 8, 9}


def test_the_guide_and_the_report_quote_what_was_measured() -> None:
    guide = Path(__file__).parents[2] / "docs" / "choosing.md"
    assert command.main(["report", "--check", str(guide)]) == 0
