"""The table of the docs is what the command prints, and says what the text says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import inference_spacing as benchmark

DOCS = Path(__file__).parents[2] / "docs" / "differences.md"


def test_the_docs_hold_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main()
    printed = capsys.readouterr().out
    assert printed.count("| exact |") == len(benchmark.STEPS)
    assert printed in DOCS.read_text("utf-8")


def test_the_denoiser_is_the_posterior_mean() -> None:
    """By quadrature of x0 p(x0 | x), at a level in the middle."""
    training, _ = benchmark.schedulers()
    levels = benchmark.NoiseLevels.from_scheduler(training)
    level, x = 600, torch.tensor([-1.0, 0.2, 1.4], dtype=torch.float64)
    a, b = float(levels.alpha[level]), float(levels.sigma[level])
    x0 = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    parts = (x0[:, None] - benchmark.MEANS) / benchmark.STDS
    prior = (benchmark.WEIGHTS * torch.exp(-parts.square() / 2)).sum(1)  # of equal widths
    joint = prior * torch.exp(-((x[:, None] - a * x0) / b).square() / 2)
    mean = (joint * x0).sum(1) / joint.sum(1)
    found = a * x - b * benchmark.exact(levels)(x, level)
    torch.testing.assert_close(found, mean, atol=1e-6, rtol=0)


def test_the_distance_of_the_data_to_itself_is_nothing() -> None:
    quantiles = benchmark.data_quantiles()
    normal = torch.special.ndtr((quantiles[:, None] - benchmark.MEANS) / benchmark.STDS)
    cdf = (benchmark.WEIGHTS * normal).sum(1)
    torch.testing.assert_close(cdf, benchmark.QUANTILES, atol=1e-7, rtol=0)
