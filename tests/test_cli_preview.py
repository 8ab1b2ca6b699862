"""`diffusers-curriculum preview`: from SOURCE and flags to text, picture or numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from huggingface_hub import errors
from PIL import Image

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.cli import build_parser, main
from diffusers_curriculum.weighting import loss_weights
from tests.floors_fixtures import SD
from tests.training import command_lines as arguments

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline's folder with nothing in it but the scheduler."""
    folder = tmp_path / "pipeline"
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)  # type: ignore[arg-type]
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def numbers(source: object, *flags: object, folder: Path) -> dict[str, Any]:
    """The JSON that a command writes."""
    file = folder / "numbers.json"
    assert main(["preview", str(source), *map(str, flags), "--output", str(file)]) == 0
    return json.loads(file.read_text())


def error(capsys: Capture, *argv: object) -> str:
    """The one line of a command that is refused."""
    assert main(["preview", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("diffusers-curriculum preview: error: ")
    return err


def training(**config: Any) -> DensityTimestepSampler:
    scheduler = diffusers.DDPMScheduler(**SD)  # type: ignore[arg-type]
    sampler = DensityTimestepSampler.from_scheduler(scheduler, draw="iid", **config)
    assert isinstance(sampler, DensityTimestepSampler)
    return sampler


# -- sources ---------------------------------------------------------------------------------------


def test_every_kind_of_source_shows_the_same(pipeline: Path, tmp_path: Path) -> None:
    sources = [pipeline, pipeline / "scheduler", pipeline / "scheduler" / "scheduler_config.json"]
    flags = ("--timestep_sampler", "normal", "--timestep_floor", 0.2)
    expected = training(density="normal", floor=0.2).probabilities().tolist()
    for source in sources:
        assert numbers(source, *flags, folder=tmp_path)["mass"] == expected


def test_a_samplers_config_stands_for_the_flags(tmp_path: Path) -> None:
    sampler = CurriculumTimestepSampler(training(density="cauchy"), clusters=5, pacing="fixed")
    sampler.save_pretrained(str(tmp_path))
    for source in (tmp_path, tmp_path / "timestep_sampler_config.json"):
        told = numbers(source, "--loss_weighting", "p2", folder=tmp_path)
        assert "5 clusters" in told["title"]
        weights = loss_weights("p2", sampler.levels)
        assert weights is not None
        np.testing.assert_allclose(told["weights"], weights.tolist())


def test_a_trained_pipeline_shows_its_own_sampler_unless_told(
    pipeline: Path, tmp_path: Path
) -> None:
    training(density="cauchy").save_pretrained(str(pipeline))
    assert numbers(pipeline, folder=tmp_path)["title"].startswith("cauchy")
    told = numbers(pipeline, "--timestep_sampler", "normal", folder=tmp_path)
    assert told["title"].startswith("normal")


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscrete", "EDMEuler", "EulerDiscrete"])
def test_every_family_is_a_source(kind: str, tmp_path: Path, capsys: Capture) -> None:
    getattr(diffusers, f"{kind}Scheduler")().save_pretrained(tmp_path)
    assert main(["preview", str(tmp_path), "--timestep_sampler", "normal"]) == 0
    assert "quantiles" in capsys.readouterr().out


def test_noise_is_that_of_the_training_script(tmp_path: Path) -> None:
    # Euler writes 2^-24 where DDPM, which adds the noise in training, has no signal at all
    config: dict[str, Any] = SD | {"rescale_betas_zero_snr": True}
    diffusers.EulerDiscreteScheduler(**config).save_pretrained(tmp_path)
    told = numbers(tmp_path, folder=tmp_path)
    assert told["log_snr"][-1] is None
    assert told["log_snr"][-2] < -15


class Hub:
    """A Hub that holds one file, or answers with an error."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, repo_id: str, filename: str, **where: Any) -> str:
        self.asked.append((repo_id, filename, where))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_a_hub_id_costs_one_file(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(pipeline / "scheduler" / "scheduler_config.json")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    monkeypatch.chdir(tmp_path)
    told = numbers("owner/name", folder=tmp_path)
    assert hub.asked == [("owner/name", "scheduler_config.json", {"subfolder": "scheduler"})]
    assert told["schedule"].startswith("variance preserving, 1000 noise levels")


def answer_of(kind: type[Exception], text: str) -> Exception:
    """An error of the Hub without the response, whose class differs among its versions."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (errors.LocalEntryNotFoundError, "not cached", "the Hub cannot be reached"),
        (errors.RepositoryNotFoundError, "gone", "hf auth login"),
        (errors.EntryNotFoundError, "no such file", "no scheduler"),
        (errors.HfHubHTTPError, "503 busy\nand more", "503 busy"),
    ],
)
def test_what_the_hub_answers_is_one_line(
    kind: type[Exception], text: str, message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Hub(answer_of(kind, text)))
    assert message in error(capsys, "owner/name")


def test_no_network_is_one_line(capsys: Capture) -> None:
    assert "the Hub cannot be reached" in error(capsys, "owner/a-name-that-is-not-cached")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "no JSON file"),
        ("[1, 2]", "holds no config"),
        ("{}", "no _class_name"),
        ('{"_class_name": "os"}', "not one of diffusers"),
        ('{"_class_name": "UNet2DConditionModel"}', "not one of diffusers"),
    ],
)
def test_files_that_are_no_source(
    content: str, message: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "x.json").write_text(content)
    assert message in error(capsys, tmp_path / "x.json")


def test_places_that_are_no_source(tmp_path: Path, capsys: Capture) -> None:
    assert "neither a scheduler nor a sampler" in error(capsys, tmp_path)
    assert "no such file or folder" in error(capsys, tmp_path / "none" / "such")


# -- flags -----------------------------------------------------------------------------------------


def test_flags_mean_what_they_mean_in_training(pipeline: Path, tmp_path: Path) -> None:
    told = numbers(
        pipeline,
        "--timestep_sampler",
        "laplace",
        "--timestep_sampler_args",
        "mu=1",
        "b=0.75",
        "--importance_correction",
        "0.5",
        "--curriculum",
        "difficulty",
        "--curriculum_clusters",
        6,
        "--curriculum_pacing",
        "fixed",
        "--curriculum_stage_steps",
        10,
        "--max_train_steps",
        400,
        "--snr_gamma",
        4,
        "--prediction_type",
        "v_prediction",
        folder=tmp_path,
    )
    base = training(
        density="laplace", density_args={"mu": 1, "b": 0.75}, floor=0.1, importance_correction=0.5
    )
    sampler = CurriculumTimestepSampler(
        base, clusters=6, pacing="fixed", pacing_args={"stage_steps": 10}
    )
    weights = loss_weights("min_snr", sampler.levels, "v_prediction", gamma=4.0)
    assert weights is not None
    assert told["mass"] == base.probabilities().tolist()
    np.testing.assert_allclose(told["weights"], weights.tolist())
    assert told["training"]["steps"] == [0, 10, 20, 30, 40, 50, 400]
    assert [share["first"] for share in told["shares"]] == list(sampler.starts)


def test_every_flag_of_the_groups_is_there() -> None:
    commands = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    known = set(commands["preview"]._option_string_actions)  # type: ignore[index]
    titles = ("timesteps", "curriculum", "curriculum pacing")
    groups = [g for g in arguments.build_parser()._action_groups if g.title in titles]
    wanted = {a.option_strings[0] for group in groups for a in group._group_actions}
    assert {"--recipe", "--data_scale", "--curriculum_patience"} <= wanted
    assert wanted - known == {"--show_timesteps", "--timestep_plot_steps"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--timestep_sampler nope", "'nope' is unknown"),
        ("--timestep_sampler laplace --timestep_sampler_args c=1", "no parameter 'c'"),
        ("--timestep_floor 2", "must be in [0, 1]"),
        ("--timestep_floor 0.5", "no effect"),
        ("--curriculum_clusters 5", "no effect without --curriculum difficulty"),
        ("--loss_weighting nope", "'nope' is unknown"),
        ("--prediction_type flow_prediction", "--prediction_type"),
        ("--output x.gif", "must end in .png, .svg, .json"),
        ("--output none/such/x.png", "Create it first"),
        ("--inference_steps 0", "at least 1"),
        ("--inference_steps 1000000000000", "at most 1,000,000"),
        ("--max_train_steps 9223372036854775808", "at most 9,007,199,254,740,992"),
        ("--compare laplace normal --timestep_sampler cauchy", "drop one of the two"),
        ("--compare laplace", "compare from 2"),
        ("--compare laplace nope", "'nope' is unknown"),
        ("--compare laplace normal:b=2", "no parameter 'b'"),
    ],
)
def test_flags_that_cannot_be(flags: str, message: str, pipeline: Path, capsys: Capture) -> None:
    assert message in error(capsys, pipeline, *flags.split())


@pytest.mark.parametrize(
    "flags",
    ["--curriculum nope", "--timestep_draw nope", "--no_such_flag", "--show_timesteps x.png"],
)
def test_what_argparse_refuses(flags: str, pipeline: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["preview", str(pipeline), *flags.split()])
    assert caught.value.code == 2
    assert flags.split()[-1] in capsys.readouterr().err
    assert not Path("x.png").exists()


def test_a_samplers_config_leaves_no_room_for_flags(tmp_path: Path, capsys: Capture) -> None:
    training(density="cauchy").save_pretrained(str(tmp_path))
    said = error(capsys, tmp_path, "--timestep_sampler", "normal")
    assert "--timestep_sampler has no effect" in said
    assert "needs a schedule" in error(capsys, tmp_path, "--compare", "laplace", "normal")


# -- answers ---------------------------------------------------------------------------------------


def test_text_by_default(pipeline: Path, capsys: Capture, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["preview", str(pipeline), "--timestep_sampler", "laplace"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 100
    assert out.startswith("laplace, draw=iid, floor=0.1\n")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("steps", [1, 19, 15000])
def test_too_long_a_curriculum_is_drawn_with_a_warning(
    steps: int, pipeline: Path, tmp_path: Path, capsys: Capture
) -> None:
    flags = ("--curriculum", "difficulty", "--max_train_steps", steps)
    picture = tmp_path / "what.png"
    assert main(["preview", str(pipeline), *map(str, flags), "--output", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "warning: training would be refused: the curriculum of 20 clusters" in told
    assert f"take 6768 of {steps} steps" in told
    assert picture.exists()
    document = numbers(pipeline, *flags, folder=tmp_path)
    assert "--curriculum_max_share 0.3" in document["warnings"][0]
    assert document["shares"][0]["opens"] is None or steps == 15000
    fits = numbers(pipeline, *flags, "--curriculum_max_share", 7000, folder=tmp_path)
    assert not [warning for warning in fits["warnings"] if "refused" in warning]


def test_a_saved_curriculum_is_compared_with_the_length_of_the_run(tmp_path: Path) -> None:
    CurriculumTimestepSampler(training(density="cauchy"), clusters=5).save_pretrained(str(tmp_path))
    short = numbers(tmp_path, "--max_train_steps", 1000, folder=tmp_path)["warnings"]
    assert "training would be refused" in short[0]
    assert numbers(tmp_path, "--max_train_steps", 10000, folder=tmp_path)["warnings"] == []


def test_inference_is_looked_at(pipeline: Path, tmp_path: Path) -> None:
    flags = ("--timestep_sampler", "laplace", "--timestep_floor", 0)
    (told,) = numbers(pipeline, *flags, "--inference_steps", 20, folder=tmp_path)["warnings"]
    assert "of the 20 levels that DDIMScheduler visits in 20 steps" in told
    assert numbers(pipeline, "--timestep_sampler", "laplace", folder=tmp_path)["warnings"] == []


def test_pictures(pipeline: Path, tmp_path: Path, capsys: Capture) -> None:
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    for file in (png, svg):
        assert main(["preview", str(pipeline), "--output", str(file)]) == 0
        assert capsys.readouterr().out.startswith(f"{file}: uniform")
    with Image.open(png) as picture:
        assert picture.size == (1210, 825)
        assert len(np.unique(np.asarray(picture))) > 50
    root = ElementTree.parse(svg).getroot()
    assert root.tag.endswith("svg")
    assert len(list(root.iter())) > 200


def test_comparing(pipeline: Path, tmp_path: Path, capsys: Capture) -> None:
    training(density="cauchy").save_pretrained(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "timestep_sampler_config.json"
    names = ["laplace", "normal:mean=1,std=1.5", "uniform", str(file)]
    told = numbers(
        pipeline,
        "--timestep_floor",
        0.3,
        "--loss_weighting",
        "p2",
        "--compare",
        *names,
        folder=tmp_path,
    )
    assert list(told) == names
    assert (
        told["laplace"]["mass"] == training(density="laplace", floor=0.3).probabilities().tolist()
    )
    normal = training(density="normal", density_args={"mean": 1, "std": 1.5}, floor=0.3)
    assert told[names[1]]["mass"] == normal.probabilities().tolist()
    assert told[str(file)]["mass"] == training(density="cauchy").probabilities().tolist()
    assert all(one["weights"] is not None for one in told.values())
    capsys.readouterr()
    assert main(["preview", str(pipeline), "--compare", "laplace", "uniform"]) == 0
    out = capsys.readouterr().out
    assert out.count("laplace") == 2  # one row for log-SNR, one for timesteps
    picture = tmp_path / "compared.png"
    argv = ["preview", str(pipeline), "--compare", "laplace", "uniform", "--output", str(picture)]
    assert main(argv) == 0
    with Image.open(picture) as image:
        assert image.size == (1210, 462)


def test_a_folder_named_like_a_density_is_no_matter(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laplace").mkdir()
    assert len(numbers(pipeline, "--compare", "laplace", "normal", folder=tmp_path)) == 2


def test_a_terminal_without_blocks(pipeline: Path) -> None:
    command = [sys.executable, "-m", "diffusers_curriculum.cli", "preview", str(pipeline)]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").startswith("uniform")


def test_no_model_is_looked_at(pipeline: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(pipeline / "scheduler", bare)
    for name in ("unet", "vae"):
        (pipeline / name).mkdir()
        (pipeline / name / "config.json").write_text("damaged")
    assert numbers(pipeline, folder=tmp_path) == numbers(bare, folder=tmp_path)


def test_a_sampler_of_the_user_is_shown(tmp_path: Path) -> None:
    class Upper(DensityTimestepSampler):
        """A class of one's own, known once it is defined."""

    scheduler = diffusers.DDPMScheduler(**SD)  # type: ignore[arg-type]
    Upper.from_scheduler(scheduler, density="normal").save_pretrained(str(tmp_path))
    told = numbers(tmp_path / TimestepSampler.config_name, folder=tmp_path)
    assert told["title"].startswith("normal")
