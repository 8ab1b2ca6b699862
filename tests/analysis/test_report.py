"""The report on difficulty: whole by itself, and readable in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_curriculum.analysis.convergence import Curves
from diffusers_curriculum.analysis.difficulty import Difficulty, analyse_data
from diffusers_curriculum.analysis.gradients import gradient_statistics
from diffusers_curriculum.analysis.page import Section, Table, page, section
from diffusers_curriculum.analysis.probes import probe
from diffusers_curriculum.analysis.report import render
from diffusers_curriculum.analysis.score_rate import score_rate
from tests.analysis import browser as browsers
from tests.analysis.known_denoisers import best, drawn, objective_of, two_dimensional
from tests.analysis.pages import check_self_contained
from tests.analysis.test_probes import Scale
from tests.floors_fixtures import SCHEDULERS

FOUND = browsers.found()


@pytest.fixture(scope="module")
def difficulty() -> Difficulty:
    """Everything that a report can tell, of a mixture in two dimensions."""
    objective, mixture = objective_of("v_prediction"), two_dimensional()
    samples = drawn(mixture, 120)
    data = analyse_data(samples, objective.levels, 10)
    look = partial(probe, objective=objective, samples=samples[:60], grid=data.grid)
    early, late = (best(mixture, objective, shift) for shift in (0.4, 0.05))
    scale = Scale(0.3)
    few = samples[:20]
    curves = Curves(("-6 to 0", "0 to 6"), (0, 5, 10), torch.tensor([[3.0, 2], [1, 1.5], [0.5, 1]]))
    return Difficulty(
        SCHEDULERS["linear"](),
        data,
        probes={"checkpoint-1": look(early), "pipeline": look(late)},
        network_rate=score_rate(late, objective, few, data.grid),
        gradients=gradient_statistics(scale, scale.parameters(), objective, few, data.grid),
        convergence={"one network for all": curves},
    )


@pytest.fixture(scope="module")
def report(difficulty: Difficulty, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    files = {each.name: f"suggested/{each.name}.json" for each in difficulty.suggestions}
    file.write_text(render(difficulty, {"command": "a <b> & c"}, files, ["A note."]), "utf-8")
    return file


def test_a_report_is_whole_by_itself(report: Path, difficulty: Difficulty) -> None:
    found = check_self_contained(report)
    text = report.read_text("utf-8")
    # progress, ratio, error, information; gradients, affinity; convergence; J, K; laws
    assert len(found.pictures) == 10
    assert found.tags.count("figcaption") == 10
    assert "a &lt;b&gt; &amp; c" in text
    for each in difficulty.suggestions:
        assert each.name in text
    assert "Compare J, which is for equal steps" in text
    assert "Raw losses do not rank difficulty" in text


def test_the_check_itself_sees_what_is_not(report: Path, tmp_path: Path) -> None:
    whole = report.read_text("utf-8")
    changes: list[Callable[[str], str]] = [
        lambda text: text.replace("<h2>", '<script src="x.js"></script><h2>', 1),
        lambda text: text.replace("data:image/svg+xml;base64", "https://example.org/a.svg?", 1),
        lambda text: text.replace("<section>", '<section id="a"><p id="a"></p>', 1),
        lambda text: text.replace("</section>", "", 1),
        lambda text: text.replace("* {", "@import 'x.css'; * {", 1),
    ]
    for number, change in enumerate(changes):
        file = tmp_path / f"{number}.html"
        file.write_text(change(whole), "utf-8")
        with pytest.raises(AssertionError):
            check_self_contained(file)


def test_data_alone_makes_a_report(difficulty: Difficulty, tmp_path: Path) -> None:
    alone = Difficulty(difficulty.scheduler, difficulty.data)
    files = {each.name: each.name for each in alone.suggestions}
    (tmp_path / "report.html").write_text(render(alone, {}, files, []), "utf-8")
    assert len(check_self_contained(tmp_path / "report.html").pictures) == 3


def test_words_of_a_table_are_escaped() -> None:
    text = "\n".join(section(Section("<a>", table=Table(("<b>",), [("<c> d",)]))))
    assert "<a>" not in text + page("<t>", [text]).replace("<a", "")
    assert "&lt;b&gt;" in text
    assert "&lt;c&gt; d" in text


def test_numbers_are_plain(difficulty: Difficulty) -> None:
    found = difficulty.to_json()
    assert set(found) >= {"levels", "data", "networks", "gradients", "convergence", "suggestions"}
    assert found["networks"]["pipeline"]["samples"] == 60
    lost = replace(difficulty, gradients=None, network_rate=None, probes={}, convergence={})
    assert lost.to_json()["gradients"] is None


# -- in a real browser -----------------------------------------------------------------------------


@pytest.mark.skipif(FOUND is None, reason=browsers.NONE)
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (360, True)], ids=["desk", "telephone"])
def test_a_browser_shows_a_report_and_asks_for_nothing(
    report: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    with browsers.browser(str(FOUND), tmp_path / "profile") as tab:
        tab.open(report.as_uri(), width=width, dark=dark)
        outside = [url for url in tab.requests if not url.startswith("data:")]
        assert outside == [report.as_uri()]
        assert tab.messages == []
        shown = "[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
        pictures = tab.evaluate(shown)
        assert len(pictures) == 10
        assert all(complete and natural > 0 for complete, natural, _ in pictures)
        assert all(200 < across <= width for *_, across in pictures)
        # the page itself does not scroll sideways; wide tables do, inside themselves
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
        tab.picture(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.height > 1500
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 100


@pytest.mark.skipif(FOUND is None, reason=browsers.NONE)
def test_the_browser_itself_tells_requests_and_messages(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(
        '<img src="http://example.org/a.png"><script>console.log("hello"); lost()</script>', "utf-8"
    )
    with browsers.browser(str(FOUND), tmp_path / "profile") as tab:
        tab.open(file.as_uri())
        assert "http://example.org/a.png" in tab.requests
        told = " ".join(tab.messages)
    assert "hello" in told
    assert "lost is not defined" in told
