"""When pictures are drawn, with which weights, and what is left after a run."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from markdown_it import MarkdownIt
from PIL import Image

from diffusers_curriculum import DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.errors import HubError, UsageError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.parts.components import Base, Components
from diffusers_curriculum.training.parts.families.base import ModelFamily, families
from diffusers_curriculum.training.publish import publisher as publishing
from diffusers_curriculum.training.publish import text_to_image as export
from diffusers_curriculum.training.publish.hub import files_to_upload
from tests.floors_fixtures import SCHEDULERS
from tests.training.command_lines import parse_args
from tests.training.fake_accelerator import FakeAccelerator

PLAN = BatchPlan(num_samples=10, batch_size=4, accumulation=1, world_size=1, rank=0, seed=0)


def arguments(tmp_path: Path, *more: object) -> Arguments:
    line = ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--seed", "5"]
    line += ["--output_dir", str(tmp_path / "sd-test"), "--resolution", "8"]
    line += ["--max_train_steps", "100", "--snr_gamma", "5", *map(str, more)]
    return parse_args(line, machine=False)


def sampler_of(scheduler: str = "sd") -> TimestepSampler:
    return DensityTimestepSampler.from_scheduler(
        SCHEDULERS[scheduler](), density="laplace", density_args={"mu": 1, "b": 2}, draw="sobol"
    )


def publisher(
    args: Arguments,
    *,
    main: bool = True,
    scheduler: Any = None,
    kind: str = "epsilon",
    plan: BatchPlan = PLAN,
) -> export.TextToImagePublisher:
    Path(args.output_dir).mkdir(exist_ok=True)
    inference = DDPMScheduler() if scheduler is None else scheduler
    sampler = sampler_of("flow" if kind == "flow" else "sd")
    objective = Objective(sampler.levels.with_prediction_type(kind))
    levels = Levels(None, inference, sampler, objective, ("none", {}), None, None)
    accelerator: Any = FakeAccelerator(main)
    return export.TextToImagePublisher(args, accelerator, levels, plan, families()["sd"])


def due(args: Arguments, plan: BatchPlan, steps: int) -> list[int]:
    """Steps after which pictures are due, counted from 1."""
    made = publisher(args, plan=plan)
    return [done for done in range(1, steps + 1) if made.is_due(done)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--validation_epochs 2", []),
        ("--validation_prompts a --validation_steps 4", [4, 8, 12]),
        # the end has its own pictures
        ("--validation_prompts a --validation_steps 4 --max_train_steps 12", [4, 8]),
        # 2.5 steps an epoch: epochs 0, 1, 2, ... end in steps 3, 5, 8, 10, 13
        ("--validation_prompts a --validation_epochs 1", [3, 5, 8, 10, 13]),
        ("--validation_prompts a --validation_epochs 2", [3, 8, 13]),
        ("--validation_prompts a --validation_epochs 5", [3]),
    ],
)
def test_when_pictures_are_due(tmp_path: Path, line: str, expected: list[int]) -> None:
    assert due(arguments(tmp_path, *line.split()), PLAN, 14) == expected


def test_a_step_of_many_epochs_is_due_once(tmp_path: Path) -> None:
    args = arguments(tmp_path, "--validation_prompts", "a", "--validation_epochs", 3)
    large = BatchPlan(num_samples=4, batch_size=16, accumulation=1, world_size=1, rank=0, seed=0)
    # 4 epochs a step: 0-3, 4-7, 8-11 hold a multiple of 3 each
    assert due(args, large, 3) == [1, 2, 3]


# -- pictures --------------------------------------------------------------------------------------


class Noted:
    """Stands for the drawing of pictures, and notes the weights that it would draw with."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.calls: list[dict[str, Any]] = []

    def __call__(self, build: Any, prompts: Any, **options: Any) -> list[Image.Image]:
        self.weights.append(build().unet.weight[0, 0].item())
        self.calls.append({"prompts": list(prompts)} | options)
        return [Image.new("RGB", (8, 8), "red") for _ in prompts]


class FakePipeline:
    """What is saved at the end."""

    def __init__(self, **parts: Any) -> None:
        self.unet = parts["unet"]
        self.parts = parts

    def save_pretrained(self, folder: Path) -> None:
        (folder / "model_index.json").write_text("{}")
        (folder / "weight.txt").write_text(str(self.unet.weight[0, 0].item()))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    noted = Noted()
    monkeypatch.setattr(export, "validation_images", noted)

    def pipeline_of(family: ModelFamily, models: Components, unet: Any, scheduler: Any) -> Any:
        return FakePipeline(unet=unet)

    def save(family: ModelFamily, base: Base, unet: Any, scheduler: Any, folder: Path) -> Any:
        pipeline = FakePipeline(unet=unet)
        pipeline.save_pretrained(folder)
        return lambda: pipeline

    monkeypatch.setattr(ModelFamily, "pipeline_of", pipeline_of)
    monkeypatch.setattr(ModelFamily, "save_pipeline", save)
    return noted


class Autoencoder(torch.nn.Linear):
    """Stands for one: it knows where it is."""

    device = torch.device("cpu")


def put_models(made: export.TextToImagePublisher, averaged: bool) -> torch.nn.Linear:
    """Give a publisher a model of ones, whose average, if any, is twos."""
    unet = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(unet.weight, 2.0)
    ema = EMAModel(unet.parameters()) if averaged else None
    torch.nn.init.constant_(unet.weight, 1.0)
    vae, encoders = Autoencoder(1, 1), {"text_encoder": torch.nn.Linear(1, 1)}
    made.models = Components(unet, vae, encoders, base=Base(None, {}, {}))
    made.averages = Averages(unet, ema)
    return unet


@pytest.mark.parametrize("averaged", [True, False])
def test_validation_draws_with_the_average(tmp_path: Path, noted: Noted, averaged: bool) -> None:
    made = publisher(arguments(tmp_path, "--validation_prompts", "a", "b"))
    unet = put_models(made, averaged)
    made.validate(7)
    assert noted.weights == [2.0 if averaged else 1.0]
    assert unet.weight[0, 0].item() == 1.0  # training goes on with its own
    assert noted.calls[0]["prompts"] == ["a", "b"]
    assert noted.calls[0]["seed"] == PLAN.seed
    assert made.accelerator.tracker.images == [("validation", (2, 8, 8, 3), 7)]


@pytest.mark.parametrize("averaged", [True, False])
def test_the_average_is_what_is_kept(tmp_path: Path, noted: Noted, averaged: bool) -> None:
    args = arguments(tmp_path, "--validation_prompts", "a", "b")
    made = publisher(args)
    unet = put_models(made, averaged)
    folder = Path(args.output_dir)
    Image.new("RGB", (8, 8)).save(folder / "timesteps.png")  # as the monitor leaves it
    made.finish()
    assert (folder / "weight.txt").read_text() == ("2.0" if averaged else "1.0")
    assert noted.weights == [2.0 if averaged else 1.0]
    assert unet.weight[0, 0].item() == 1.0
    with Image.open(folder / "val_imgs_grid.png") as grid:
        assert grid.size == (8, 16)
    assert made.accelerator.tracker.images == [("test", (2, 8, 8, 3), 100)]
    card = (folder / "README.md").read_text()
    assert {f"(./{name})" for name in files_to_upload(folder) if name.endswith(".png")} == {
        "(./val_imgs_grid.png)",
        "(./timesteps.png)",
    }
    assert "(./val_imgs_grid.png)" in card
    assert "(./timesteps.png)" in card
    assert f"* torch: {version('torch')}" in card
    loaded = TimestepSampler.from_pretrained(str(folder))
    assert torch.equal(loaded.probabilities(), sampler_of().probabilities())


def test_the_card_tells_everything_that_the_publisher_gives(tmp_path: Path, noted: Noted) -> None:
    args = arguments(tmp_path, "--gradient_accumulation_steps", "3")
    made = publisher(args)
    put_models(made, averaged=False)
    made.finish()
    told = MarkdownIt("gfm-like").render((Path(args.output_dir) / "README.md").read_text())
    given = made._facts()
    shown = [f"{name}: {value}" for name, value in {**given.training, **given.sampler}.items()]
    assert [line for line in shown if f"<li>{line}</li>" not in told] == []
    labels = {*given.training, *given.sampler}
    assert labels >= {
        *("Optimizer steps", "Learning rate", "Batch size per process", "Processes", "Resolution"),
        *("Gradient accumulation steps", "Mixed precision", "Prediction type"),
        *("Timestep density", "Timestep draw", "Loss weighting"),
    }
    for line in (
        "Gradient accumulation steps: 3",
        "Loss weighting: min_snr",
        "Optimizer steps: 100",
    ):
        assert line in shown


def test_without_prompts_there_is_a_card_and_no_grid(tmp_path: Path, noted: Noted) -> None:
    args = arguments(tmp_path)
    made = publisher(args)
    put_models(made, averaged=False)
    made.finish()
    assert noted.calls == []
    names = {path.name for path in Path(args.output_dir).iterdir()}
    assert names == {"model_index.json", "weight.txt", "README.md", "timestep_sampler"}


def test_other_processes_wait_and_write_nothing(tmp_path: Path, noted: Noted) -> None:
    args = arguments(tmp_path, "--validation_prompts", "a")
    made = publisher(args, main=False)
    put_models(made, averaged=True)
    waits = made.accelerator.waits
    made.validate(3)
    made.finish()
    assert made.accelerator.waits > waits + 1
    assert list(Path(args.output_dir).iterdir()) == []
    assert noted.calls == []


# -- told before training --------------------------------------------------------------------------


def test_a_push_prepares_the_repository_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def prepare(facts: Any, *, token: str, private: bool) -> str:
        asked.append((facts.repo_id, token, private))
        return "somebody/sd-test"

    monkeypatch.setattr(publishing, "prepare_repository", prepare)
    args = arguments(tmp_path, "--push_to_hub", "--hub_token", "hf_x")
    assert publisher(args).repository == "somebody/sd-test"
    assert asked == [("sd-test", "hf_x", False)]
    publisher(args, main=False)
    assert len(asked) == 1  # by one process


def test_a_card_that_cannot_be_made_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="All Rights"):
        publisher(arguments(tmp_path, "--license", "All Rights!"))


def test_a_scheduler_that_cannot_draw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UsageError, match=r"FlowMatch.*'flow'.*leave out --validation_prompts"):
        publisher(arguments(tmp_path, "--validation_prompts", "a"), scheduler=flow, kind="flow")
    publisher(arguments(tmp_path), scheduler=flow, kind="flow")
    assert "will need another one" in caplog.text
    with pytest.raises(UsageError, match=r"--prediction_type: FlowMatch.*'epsilon'"):
        publisher(arguments(tmp_path), scheduler=flow)


# -- description -----------------------------------------------------------------------------------


def test_the_card_describes_the_run(tmp_path: Path, noted: Noted) -> None:
    args = arguments(tmp_path)
    made = publisher(args, kind="v_prediction")
    put_models(made, averaged=False)
    made.finish()
    card = (Path(args.output_dir) / "README.md").read_text().replace("\\", "")
    for part in ("laplace(mu=1, b=2)", "sobol", "min_snr", "v_prediction", "100"):
        assert part in card
    config = json.loads(
        (Path(args.output_dir) / "timestep_sampler" / "timestep_sampler_config.json").read_text()
    )
    assert config["_class_name"] == "DensityTimestepSampler"
