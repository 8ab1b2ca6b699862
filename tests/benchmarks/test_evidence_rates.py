"""The table of learning rates: each method, uniform draws among them, at its own best rate."""

from __future__ import annotations

from benchmarks.evidence.rates import rates_table
from benchmarks.evidence.results import Result, Results

STEPS = (250, 500, 1000, 2000)


def at_rate(method: str, rate: float, scale: float) -> Result:
    """A quality of ``scale / step``; 1e-3 is the usual rate."""
    group = "" if rate == 1e-3 else f"learning_rate={rate:g}"
    name = "/".join(filter(None, ["digits", "flow", method, group]))
    points = [{"step": s, "metrics": {"frechet": [scale / s] * 3}} for s in STEPS]
    document = {
        "quality": "frechet",
        "checkpoints": points,
        "config": {"settings": {"learning_rate": rate}},
    }
    return Result("digits", "flow", method, name, group, document)


def test_both_methods_are_taken_at_the_rate_that_is_best_for_them() -> None:
    """auto is twice as fast at 1e-3, and no faster than uniform draws at their own best rate."""
    found = [at_rate("uniform", 1e-3, 2e3), at_rate("uniform", 2e-3, 1e3)]
    found += [at_rate("auto", 1e-3, 1e3), at_rate("auto", 2e-3, 4e3)]
    uniform, auto = rates_table(Results(found))[-3:-1]
    assert uniform == "| uniform | 1.000 ± 0.000 | 0.500 ± 0.000 | 0.002 | - |"
    assert auto.endswith("| 0.001 | 1.00 (1.00 to 1.00) |")


def test_a_method_of_one_rate_is_left_out() -> None:
    found = [at_rate("uniform", 1e-3, 2e3), at_rate("uniform", 2e-3, 1e3)]
    assert "auto" not in "".join(rates_table(Results([*found, at_rate("auto", 1e-3, 1e3)])))
    assert rates_table(Results(found[:1])) == []
