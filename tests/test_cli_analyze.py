"""`diffusers-curriculum analyze`: from a run, a pipeline or a scheduler to report and configs."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_curriculum import TimestepSampler
from diffusers_curriculum.cli import main
from diffusers_curriculum.models import networks
from tests.analysis import browser as browsers
from tests.analysis.pages import check_self_contained
from tests.scripts.small_runs import BENCHES, Bench, train, write_images

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[1]
# what is told of them: see below
REFUSED = ("text_to_image_lora", "text_to_image_sdxl", "text_to_image_lora_sdxl", "flow")
REFUSED += ("image_tokens",)
PIPELINES = {name: make for name, make in BENCHES.items() if name not in REFUSED}
QUICK = ("--samples", 8, "--bins", 5, "--gradient_samples", 4)


def analyze(*argv: object) -> int:
    return main(["analyze", *map(str, argv)])


def numbers(output: Path) -> dict[str, Any]:
    return json.loads((output / "difficulty.json").read_text("utf-8"))


def refused(capsys: Capture, *argv: object) -> str:
    """The one line of a command that is refused."""
    assert analyze(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("diffusers-curriculum analyze")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Bench, Path]]:
    """A finished run of each script, with two checkpoints."""
    found = {}
    for name, make in PIPELINES.items():
        folder = tmp_path_factory.mktemp(name)
        bench, output = make(folder), folder / "run"
        average = ("--use_ema",) if name == "class_conditional" else ()
        steps = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--learning_rate", 1e-3)
        bench.train(output, *steps, *average)
        found[name] = bench, output
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 24)


@pytest.fixture
def scheduler(tmp_path: Path) -> Path:
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    return tmp_path / "scheduler"


# -- what is measured ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_run_of_each_script_is_analysed(
    name: str, runs: dict[str, tuple[Bench, Path]], tmp_path: Path, capsys: Capture
) -> None:
    bench, run = runs[name]
    output = tmp_path / "report"
    argv = (run, "--train_data_dir", bench.images, "--cache_dir", tmp_path / "cache", *QUICK)
    assert analyze(*argv, "--output_dir", output) == 0
    found = numbers(output)
    # the last checkpoint, its average where there is one, is the pipeline, and told once
    assert [*found["networks"]] == ["checkpoint-2", "pipeline"]
    last = found["networks"]["pipeline"]
    assert last["samples"] == 8
    assert last["error"] != found["networks"]["checkpoint-2"]["error"]
    for unit, values in last["error"].items():
        assert all(math.isfinite(x) and x > 0 for x in values["value"]), unit
    assert found["network_rate"]["rate"]["value"][0] is not None
    assert len(found["gradients"]["variance"]) == 5
    check_self_contained(output / "report.html")
    told = capsys.readouterr().out
    assert str(output / "report.html") in told
    assert "--timestep_sampler_config" in told


def test_averages_or_what_was_trained(
    runs: dict[str, tuple[Bench, Path]], tmp_path: Path, capsys: Capture
) -> None:
    bench, run = runs["class_conditional"]  # its checkpoints have both
    argv = (run, "--train_data_dir", bench.images, "--cache_dir", tmp_path / "cache", *QUICK)
    assert analyze(*argv, "--raw_weights", "--output_dir", tmp_path / "raw") == 0
    assert analyze(*argv, "--output_dir", tmp_path / "averages") == 0
    raw, averages = (numbers(tmp_path / name)["networks"] for name in ("raw", "averages"))
    assert [*raw] == ["checkpoint-2", "checkpoint-4"]
    assert [*averages] == ["checkpoint-2", "pipeline"]
    assert raw["checkpoint-2"]["error"] != averages["checkpoint-2"]["error"]
    capsys.readouterr()
    bench, run = runs["unconditional"]
    argv = (run, "--train_data_dir", bench.images, "--cache_dir", tmp_path / "cache", *QUICK)
    told = refused(capsys, *argv, "--raw_weights", "--output_dir", tmp_path / "none")
    assert "--raw_weights has no effect" in told


def test_what_is_suggested_trains(
    runs: dict[str, tuple[Bench, Path]], tmp_path: Path, capsys: Capture
) -> None:
    bench, run = runs["unconditional"]
    output = tmp_path / "report"
    argv = (run, "--train_data_dir", bench.images, "--cache_dir", tmp_path / "cache", *QUICK)
    assert analyze(*argv, "--output_dir", output) == 0
    found = numbers(output)["suggestions"]
    assert {
        "half_known_table",
        "emergence_laplace",
        "least_variance_table",
        "emergence_curriculum",
    } <= {*found}
    for name in found:
        file = output / "suggested" / name / "timestep_sampler_config.json"
        sampler = TimestepSampler.from_config(json.loads(file.read_text("utf-8")))
        assert float(sampler.probabilities(0).sum()) == pytest.approx(1)
        assert main(["preview", str(file)]) == 0
    file = output / "suggested" / "emergence_laplace" / "timestep_sampler_config.json"
    bench.train(tmp_path / "again", "--max_train_steps", 2, "--timestep_sampler_config", file)
    used = json.loads(
        (tmp_path / "again" / "timestep_sampler" / "timestep_sampler_config.json").read_text(
            "utf-8"
        )
    )
    assert used["density_args"] == found["emergence_laplace"]["config"]["density_args"]


def test_a_scheduler_alone_is_analysed_by_its_data(
    scheduler: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "report"
    argv = ("--train_data_dir", images, "--resolution", 4, "--cache_dir", tmp_path / "cache")
    assert analyze(scheduler, *argv, "--bins", 6, "--output_dir", output) == 0
    found = numbers(output)
    assert found["networks"] == {}
    assert (found["data"]["samples"], found["data"]["dimension"]) == (24, 48)
    rate = found["data"]["rate"]
    # a finite set at the clean end: half the dimension
    assert rate["finite"]["value"][-1] == pytest.approx(24, rel=0.02)
    assert all(
        f <= b * 1.001 for f, b in zip(rate["finite"]["value"], rate["bound"]["value"], strict=True)
    )
    assert [*found["suggestions"]] == [
        f"{name}_{kind}"
        for name in ("half_known", "emergence")
        for kind in ("laplace", "table", "moving", "curriculum")
    ]
    check_self_contained(output / "report.html")


def test_clusters_converge_in_a_report(
    runs: dict[str, tuple[Bench, Path]], tmp_path: Path, capsys: Capture
) -> None:
    bench, run = runs["class_conditional"]
    output = tmp_path / "report"
    argv = (run, "--train_data_dir", bench.images, "--cache_dir", tmp_path / "cache", *QUICK)
    more = ("--clusters", 2, "--convergence_steps", 4, "--batch_size", 4)
    assert analyze(*argv, *more, "--output_dir", output) == 0
    found = numbers(output)["convergence"]
    assert [*found] == ["one network each", "one network for all"]
    for curves in found.values():
        assert curves["steps"] == [0, 1, 2, 3, 4]
        assert len(curves["clusters"]) == 2


def test_the_same_command_says_the_same(
    scheduler: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = ("--train_data_dir", images, "--resolution", 4, "--cache_dir", tmp_path / "cache")
    pages = []
    for name in ("one", "two"):
        assert analyze(scheduler, *argv, "--bins", 4, "--output_dir", tmp_path / name) == 0
        text = (tmp_path / name / "report.html").read_text("utf-8")
        pages.append(text.replace(str(tmp_path / name), ""))
    assert pages[0] == pages[1]


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a network is loaded."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(networks, "load_model", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--samples", 1), "--samples is 1: it must be at least 2"),
        (("--samples", 30), "--samples is 30, and there are 18 samples of data: give at most 16"),
        (("--bins", 1), "--bins is 1: it must be at least 2"),
        (("--gradient_samples", 5), "an even number of at least 4, or 0"),
        (("--samples", 8, "--gradient_samples", 12), "--samples 8: give at most 8"),
        (("--convergence_steps", -1), "--convergence_steps is -1"),
        (("--convergence_rate", 0.1), "no effect without --convergence_steps"),
        (("--device", "nonsense"), "--device is 'nonsense'"),
        (("--image_column", "picture"), "--image_column"),
        (("--resolution", 0), "--resolution is 0"),
    ],
)
def test_bad_input_is_refused_before_a_network_is_loaded(
    more: tuple, message: str, runs: dict[str, tuple[Bench, Path]], tmp_path: Path, capsys: Capture
) -> None:
    bench, run = runs["unconditional"]
    argv = (run, "--train_data_dir", bench.images, "--cache_dir", tmp_path / "cache")
    assert message in refused(capsys, *argv, "--output_dir", tmp_path / "report", *more)
    assert not (tmp_path / "report").exists()


def test_sources_that_are_none_are_refused(
    scheduler: Path,
    images: Path,
    runs: dict[str, tuple[Bench, Path]],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    data = ("--train_data_dir", images, "--output_dir", tmp_path / "report")
    assert "there is no such file" in refused(capsys, tmp_path / "nothing", *data)
    _, run = runs["unconditional"]
    sampler = run / "timestep_sampler" / "timestep_sampler_config.json"
    assert "has a sampler's config and no scheduler" in refused(capsys, sampler, *data)
    (tmp_path / "unfinished" / "checkpoint-5").mkdir(parents=True)
    assert "has not finished" in refused(capsys, tmp_path / "unfinished", *data)
    (tmp_path / "unfinished" / "pytorch_lora_weights.safetensors").touch()
    assert "holds an adapter" in refused(capsys, tmp_path / "unfinished", *data)
    assert "neither --dataset_name nor" in refused(capsys, scheduler, *data[2:])
    assert "no effect on a scheduler alone" in refused(capsys, scheduler, *data, "--samples", 8)
    shutil.copytree(run, tmp_path / "broken")
    (weights,) = (tmp_path / "broken" / "unet").glob("*.safetensors")
    weights.unlink()
    assert "SOURCE" in refused(capsys, tmp_path / "broken", *data, *QUICK)


def test_a_folder_with_something_in_it_is_left_alone(
    scheduler: Path, images: Path, capsys: Capture
) -> None:
    data = ("--train_data_dir", images, "--output_dir", scheduler)
    assert "exists already" in refused(capsys, scheduler, *data)
    assert [file.name for file in scheduler.iterdir()] == ["scheduler_config.json"]


def test_codes_have_no_scheduler(tmp_path: Path, capsys: Capture) -> None:
    bench = BENCHES["image_tokens"](tmp_path)
    bench.train(tmp_path / "run", "--max_train_steps", 1)
    argv = (tmp_path / "run", "--train_data_dir", bench.images, *QUICK)
    argv += ("--output_dir", tmp_path / "report")
    assert "has a sampler's config and no scheduler" in refused(capsys, *argv)


@pytest.mark.parametrize(
    "config", [{"addition_embed_type": "text_time"}, {"_class_name": "FluxTransformer2DModel"}]
)
def test_a_network_that_is_told_more_is_refused(
    config: dict[str, str], runs: dict[str, tuple[Bench, Path]], tmp_path: Path, capsys: Capture
) -> None:
    bench, run = runs["text_to_image"]
    shutil.copytree(run, tmp_path / "more")
    file = tmp_path / "more" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    argv = (tmp_path / "more", "--train_data_dir", bench.images, *QUICK)
    assert "is told more than an analysis can give" in refused(
        capsys, *argv, "--output_dir", tmp_path / "report"
    )


def test_data_of_more_classes_is_refused(
    runs: dict[str, tuple[Bench, Path]], tmp_path: Path, capsys: Capture
) -> None:
    bench, run = runs["class_conditional"]
    small = tmp_path / "small"
    shutil.copytree(run, small)
    file = small / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"num_embeds_ada_norm": 2}
    file.write_text(json.dumps(config))
    argv = (small, "--train_data_dir", bench.images, "--cache_dir", tmp_path / "cache", *QUICK)
    message = refused(capsys, *argv, "--output_dir", tmp_path / "report")
    assert "knows 2 classes, and the data has 3" in message


def test_a_flow_matching_scheduler_suggests_continuous_draws(
    images: Path, tmp_path: Path, capsys: Capture
) -> None:
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow")
    argv = ("--train_data_dir", images, "--resolution", 4, "--cache_dir", tmp_path / "cache")
    assert analyze(tmp_path / "flow", *argv, "--bins", 6, "--output_dir", tmp_path / "report") == 0
    file = tmp_path / "report" / "suggested" / "emergence_laplace" / "timestep_sampler_config.json"
    sampler = TimestepSampler.from_config(json.loads(file.read_text()))
    assert sampler.sample(4, step=0).log_snr is not None
    assert torch.isfinite(sampler.probabilities()).all()


# -- the demo --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(browsers.found() is None, reason=browsers.NONE)
def test_the_report_of_the_demo_opens_in_a_browser(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    """The demo's own commands, with fewer steps, and what they trained in a real browser."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "text_to_image")
    monkeypatch.chdir(ROOT)
    demo = importlib.import_module("demo")
    export, make_tiny, training, _ = demo.commands(tmp_path / "demo", 12, 20)
    assert importlib.import_module("digits").main(export[2:]) == 0
    assert main(make_tiny[1:]) == 0
    words = training[training.index(demo.SCRIPT.name) + 1 :]
    short = (
        "--checkpointing_steps",
        "6",
        "--curriculum_clusters",
        "2",
        "--curriculum_patience",
        "1",
    )
    train([*words, *short, "--cache_dir", str(tmp_path / "cache")])
    run, output = words[words.index("--output_dir") + 1], tmp_path / "report"
    argv = (
        run,
        "--train_data_dir",
        tmp_path / "demo" / "digits",
        "--cache_dir",
        tmp_path / "cache",
    )
    few = ("--samples", 16, "--bins", 8, "--max_train_samples", 300)
    assert analyze(*argv, *few, "--output_dir", output) == 0
    assert [*numbers(output)["networks"]] == ["checkpoint-6", "pipeline"]
    found = check_self_contained(output / "report.html")
    with browsers.browser(str(browsers.found()), tmp_path / "profile") as tab:
        tab.open((output / "report.html").as_uri())
        assert [url for url in tab.requests if not url.startswith("data:")] == [tab.address]
        assert tab.messages == []
        shown = "[...document.images].filter(i => i.complete && i.naturalWidth).length"
        assert tab.evaluate(shown) == len(found.pictures)
