"""--config: what a file may say, what wins over it, and what is refused before models load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusers_curriculum.training.arguments.configuration import written
from diffusers_curriculum.training.errors import UsageError
from tests.training.command_lines import parse_args, parse_class_args

BASE = ("--pretrained_model_name_or_path", "some/model", "--dataset_name", "some/data")
FILE = """
pretrained_model_name_or_path: some/model
dataset_name: some/data
learning_rate: 1e-4        # a number, as it is in YAML 1.2
mixed_precision: no        # a word
bad_samples: off
center_crop: true
resolution: 64
ema_decay: 1
use_ema: true
seed: null
validation_prompts: [a cat, "no"]
timestep_sampler: laplace
timestep_sampler_args: {mu: -1, b: 0.5}
importance_correction: 0.5
"""


def file(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_file_stands_for_flags(tmp_path: Path) -> None:
    args = parse_args(["--config", file(tmp_path, FILE)], machine=False)
    assert (args.learning_rate, args.mixed_precision, args.bad_samples) == (1e-4, "no", "off")
    assert (args.center_crop, args.resolution, args.seed) == (True, 64, None)
    assert args.validation_prompts == ["a cat", "no"]
    assert args.timestep_sampler_args == {"mu": -1, "b": 0.5}
    assert (args.importance_correction, type(args.ema_decay)) == (0.5, float)
    assert {"resolution", "center_crop", "validation_prompts"} <= args.given
    assert not {"seed", "train_batch_size"} & args.given
    words = [*BASE, "--config", file(tmp_path, '{"resolution": 32, "use_ema": true}', "run.json")]
    assert parse_args(words, machine=False).resolution == 32


def test_the_command_line_wins(tmp_path: Path) -> None:
    words = ["--config", file(tmp_path, FILE), "--resol", "128", "--center_crop=false"]
    args = parse_args([*words, "--validation_prompts", "a dog"], machine=False)
    assert (args.resolution, args.center_crop, args.use_ema) == (128, False, True)
    assert args.validation_prompts == ["a dog"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("resolutoin: 64", "has 'resolutoin', which is no flag .*did you mean resolution"),
        ("config: other.yaml", "has 'config', which is no flag"),
        ("resolution: '64'", "has resolution='64': give a whole number"),
        ("resolution: 6.5", "has resolution=6.5: give a whole number"),
        ("resolution: true", "has resolution=True: give a whole number"),
        ("resolution: [64]", r"has resolution=\[64\]: give a whole number"),
        ("resolution: 0", "resolution is 0: it must be at least 1"),
        ("learning_rate: .nan", "learning_rate is nan"),
        ("center_crop: 1", "has center_crop=1: give true or false"),
        ("validation_prompts: a", "has validation_prompts='a': give a list"),
        ("validation_prompts: [1]", "has validation_prompts=1: give a text"),
        ("mixed_precision: fp8", "has mixed_precision='fp8': choose from no, fp16, bf16"),
        ("importance_correction: 2", "has importance_correction=2: '2' is not none, full"),
        ("timestep_sampler_args: [1]", r"has timestep_sampler_args=\[1\]: give names and values"),
        ("{timestep_sampler: laplace, timestep_sampler_args: {mu: .nan}}", "not JSON compliant"),
        ("seed: 1\nresolution: 8\nseed: 1", "'seed' stands there 2 times"),
        ("snr_gamma: [", "which is not YAML"),
        ("- seed", "holds no names and values"),
        ("curriculum_clusters: 5", "--curriculum_clusters is 5, which has no effect without"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, text: str, told: str) -> None:
    name = file(tmp_path, text)
    with pytest.raises(UsageError, match=told):
        parse_args([*BASE, "--config", name], machine=False)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    name = file(tmp_path, '{"seed": 1, "seed": 1}', "run.json")
    for other, told in ((name, "stands there 2"), ("x.yaml", "cannot be read"), ("x", "ends in")):
        with pytest.raises(UsageError, match=told):
            parse_args([*BASE, "--config", other], machine=False)


def test_a_switch_that_is_neither_on_nor_off_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse_args([*BASE, "--center_crop=maybe"], machine=False)
    assert "'maybe' is neither true nor false" in capsys.readouterr().err


def test_what_is_written_tells_every_flag_and_no_secret(tmp_path: Path) -> None:
    address = "https://me:word@host/data"
    secrets = ("--hub_token", "hf_secret", "--dataset_name", address)
    args = parse_args([*BASE, *secrets, "--seed", "3"], machine=False)
    text = written(args.configuration)
    assert "hf_secret" not in text
    assert "word" not in text.replace("words", "")
    told = yaml.safe_load(text)
    names = {flag.name for flag in args.flags} - {"config", "hub_token", "local_rank"}
    names.remove("show_timesteps")  # instead of a run
    assert told.pop("defaults").keys() | told.keys() == names
    assert told.keys() == {"pretrained_model_name_or_path", "dataset_name", "seed"}


def test_a_value_that_was_a_default_stays_one(tmp_path: Path) -> None:
    """It holds, even where it is none any more, and does not count as given."""
    text = "recipe: edm2\ntrain_data_dir: x\nmodel_config: a\ndefaults: {power_ema: [0.2]}"
    with pytest.raises(UsageError, match="--train_data_dir is x"):
        parse_class_args(["--config", file(tmp_path, text)])
    args = parse_args(
        [*BASE, "--config", file(tmp_path, "defaults: {curriculum_clusters: 7}")], machine=False
    )
    assert args.curriculum_clusters == 7
    assert "curriculum_clusters" not in args.given
