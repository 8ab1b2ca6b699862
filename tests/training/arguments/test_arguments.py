"""The command line: a strict superset of the official one, and wrong input told at once."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora
from tests.training import command_lines as arguments

FIXTURE = Path(__file__).parents[2] / "fixtures" / "official_flags.json"
Facts = list[dict[str, Any]]
FACTS: dict[str, Facts] = json.loads(FIXTURE.read_text())
SCRIPTS = {
    "train_text_to_image.py": TextToImage.command_line,
    "train_text_to_image_lora.py": TextToImageLora.command_line,
}
OFFICIAL = FACTS["train_text_to_image.py"]
TYPES = {"int": int, "float": float, "str": str, None: None}
BASE = ("--pretrained_model_name_or_path", "some/model", "--dataset_name", "some/data")
CURRICULUM = (*BASE, "--curriculum", "difficulty")


def actions(script: str = "train_text_to_image.py") -> dict[str, argparse.Action]:
    return {action.option_strings[-1]: action for action in SCRIPTS[script].parser()._actions}


def official_parser(facts: Facts) -> argparse.ArgumentParser:
    """The official command line, built from its recorded facts by argparse alone."""
    parser = argparse.ArgumentParser()
    for fact in facts:
        if fact["action"] == "store_true":
            parser.add_argument(fact["flag"], action="store_true")
        else:
            parser.add_argument(
                fact["flag"],
                type=TYPES[fact["type"]],
                default=fact["default"],
                nargs=fact["nargs"],
                choices=fact["choices"],
                required=fact["required"],
            )
    return parser


@pytest.mark.parametrize(
    ("script", "count"), [("train_text_to_image.py", 57), ("train_text_to_image_lora.py", 51)]
)
def test_the_fixture_holds_the_official_flags(script: str, count: int):
    assert len({fact["flag"] for fact in FACTS[script]}) == count


@pytest.mark.parametrize(
    ("script", "fact"),
    [(script, fact) for script in SCRIPTS for fact in FACTS[script]],
    ids=lambda value: value if isinstance(value, str) else value["flag"],
)
def test_official_flag_is_kept(script: str, fact: dict[str, Any]):
    action = actions(script)[fact["flag"]]
    is_switch = isinstance(action, argparse._StoreTrueAction)
    assert is_switch == (fact["action"] == "store_true")
    assert action.default == fact["default"]
    assert type(action.default) is type(fact["default"])
    assert action.required == fact["required"]
    assert action.dest == fact["flag"].removeprefix("--")
    if not is_switch:
        assert action.type is TYPES[fact["type"]]
        assert action.nargs == fact["nargs"]
        assert (list(action.choices) if action.choices else None) == fact["choices"]


def words(fact: dict[str, Any]) -> list[str]:
    """Words that may follow the flag on a command line."""
    if fact["action"] == "store_true":
        return []
    if fact["choices"]:
        return [fact["choices"][-1]]
    return {"int": ["7"], "float": ["0.25"], "str": ["a word"]}[fact["type"]]


def official_abbreviations(facts: Facts) -> list[tuple[str, list[str]]]:
    flags = [fact["flag"] for fact in facts] + ["--help"]
    return [
        (fact["flag"][:length], words(fact))
        for fact in facts
        for length in range(3, len(fact["flag"]) + 1)
        if fact["flag"][:length] in flags
        or sum(flag.startswith(fact["flag"][:length]) for flag in flags) == 1
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_official_abbreviation_means_what_it_meant(script: str):
    ours, theirs = SCRIPTS[script].parser(), official_parser(FACTS[script])
    abbreviations = official_abbreviations(FACTS[script])
    assert len(abbreviations) > 500
    for prefix, values in abbreviations:
        base = [] if "pretrained".startswith(prefix[2:6]) else list(BASE[:2])
        for argv in ([*base, prefix, *values], [*base, "=".join([prefix, *values])]):
            expected = vars(theirs.parse_args(argv))
            got = vars(ours.parse_args(argv))
            assert {name: got[name] for name in expected} == expected, argv


def test_a_list_flag_takes_several_words_after_its_abbreviation():
    args = arguments.parse_args([*BASE, "--validation_prompt", "a cat", "a dog"])
    assert args.validation_prompts == ["a cat", "a dog"]


def test_prefixes_that_were_ambiguous_stay_errors(capsys: pytest.CaptureFixture[str]):
    flags = [fact["flag"] for fact in OFFICIAL] + ["--help"]
    prefixes = {flag[:length] for flag in flags for length in range(3, len(flag))} - set(flags)
    ambiguous = [p for p in sorted(prefixes) if sum(flag.startswith(p) for flag in flags) > 1]
    assert len(ambiguous) > 20
    parser = arguments.build_parser()
    for prefix in ambiguous:
        with pytest.raises(SystemExit) as stop:
            parser.resolve(prefix)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert all(flag in message for flag in flags if flag.startswith(prefix))


def test_every_new_flag_is_reachable_by_its_full_name():
    parser = arguments.build_parser()
    new = set(actions()) - {fact["flag"] for fact in OFFICIAL} - {"--help"}
    assert {flag.removeprefix("--") for flag in new} == set(NEW_DEFAULTS)
    for flag in new:
        assert parser.resolve(flag) == flag


NEW_DEFAULTS = {
    "config": None,
    "hub_strategy": "end",
    "hub_private_repo": False,
    "attention": None,
    "untrained_timestep": None,
    "timestep_sampler": "uniform",
    "timestep_sampler_args": {},
    "timestep_sampler_config": None,
    "timestep_draw": None,  # put in where the sampler is built
    "timestep_floor": None,
    "importance_correction": None,
    "timestep_bias_strategy": "none",
    "timestep_bias_multiplier": 1.0,
    "timestep_bias_begin": 0,
    "timestep_bias_end": 1000,
    "timestep_bias_portion": 0.25,
    "recipe": None,
    "data_scale": 1.0,
    "timestep_shift_preset": None,
    "timestep_shift_tokens": None,
    "mixflow_gamma": None,
    "curriculum": "none",
    "curriculum_order": "easy_to_hard",
    "curriculum_clusters": 20,
    "curriculum_clustering": "auto",
    "curriculum_boundaries": None,
    "curriculum_min_size": None,
    "curriculum_within": "base",
    "curriculum_pacing": "patience",
    "curriculum_patience": 200,
    "curriculum_min_delta": 0.0,
    "curriculum_smoothing": 0.0,
    "curriculum_min_stage_steps": 0,
    "curriculum_max_stage_steps": None,
    "curriculum_stage_steps": None,
    "curriculum_total_steps": None,
    "curriculum_max_share": 0.3,
    "loss_weighting": "none",
    "loss_weighting_args": {},
    "cache_latents": False,
    "latent_cache_dir": None,
    "latent_cache_dtype": "float32",
    "latent_crops": 1,
    "validation_steps": None,
    "validation_split": None,
    "validation_data_dir": None,
    "validation_loss_steps": None,
    "validation_loss_samples": 128,
    "validation_loss_quantiles": 8,
    "validation_clip_score": None,
    "log_every": 10,
    "timestep_plot_steps": 1000,
    "show_timesteps": None,
    "ema_decay": 0.9999,
    "ema_interval": 1,
    "caption_dropout": 0.0,
    "nonfinite": "raise",
    "max_hours": None,
    "profile_steps": None,
    "train_split": None,
    "streaming": False,
    "shuffle_buffer": 1000,
    "background": None,
    "compile": "none",
    "compile_mode": None,
    "optimizer": "AdamW",
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "cache_text_embeddings": False,
    "text_cache_dir": None,
    "offload_models": False,
    "data_config": None,
    "instance_data_dir": None,
    "instance_prompt": None,
    "with_prior_preservation": False,
    "class_data_dir": None,
    "class_prompt": None,
    "num_class_images": 100,
    "prior_loss_weight": 1.0,
    "prior_generation_precision": None,
    "sample_batch_size": 4,
    "mask_column": None,
    "mask_from_alpha": False,
    "unmasked_weight": 0.0,
    "use_aspect_ratio_buckets": False,
    "aspect_ratio_buckets": None,
    "bad_samples": "raise",
    "bad_samples_limit": 0.01,
    "allow_config_change": (),
    "overwrite_output_dir": False,
    "lr_num_cycles": None,
    "lr_power": None,
    "lr_end": None,
    "license": None,
    "import": [],
}


def test_without_new_flags_the_new_arguments_are_neutral():
    args = arguments.parse_args(BASE)
    new = {flag.name for flag in args.flags} - {fact["flag"][2:] for fact in OFFICIAL}
    assert new == set(NEW_DEFAULTS)
    values = {flag.name: args[flag.dest] for flag in args.flags}
    assert {name: values[name] for name in NEW_DEFAULTS} == NEW_DEFAULTS
    assert args.given == {"pretrained_model_name_or_path", "dataset_name"}


def test_a_full_curriculum_command_line():
    line = (
        "--timestep_sampler laplace --timestep_sampler_args mu=-1 b=0.5 --timestep_draw stratified "
        "--timestep_floor 0 --importance_correction 0.5 --curriculum difficulty "
        "--curriculum_clustering explicit --curriculum_boundaries 0 250 500 --curriculum_pacing "
        "fixed --curriculum_stage_steps 9 --loss_weighting p2 --loss_weighting_args k=1 gamma=0.5 "
        "--use_ema --ema_decay 0.99"
    )
    args = arguments.parse_args([*BASE, *line.split()])
    assert args.timestep_sampler_args == {"mu": -1, "b": 0.5}
    assert args.loss_weighting_args == {"k": 1, "gamma": 0.5}
    assert args.importance_correction == 0.5
    assert args.curriculum_boundaries == [0, 250, 500]
    assert (args.timestep_floor, args.ema_decay) == (0, 0.99)


@pytest.mark.parametrize("pacing", ["linear", "cosine", "root"])
def test_pacing_by_total_steps(pacing: str):
    argv = (*CURRICULUM, "--curriculum_pacing", pacing, "--curriculum_total_steps", "50")
    assert arguments.parse_args(argv).curriculum_total_steps == 50


@pytest.mark.parametrize("word", ["none", "full"])
def test_importance_correction_by_name(word: str):
    argv = (*BASE, "--timestep_sampler", "laplace", "--importance_correction", word)
    assert arguments.parse_args(argv).importance_correction == word


@pytest.mark.parametrize("more", ["", "--loss_weighting min_snr", "--loss_weighting_args gamma=5"])
def test_snr_gamma_is_min_snr_weighting(more: str):
    args = arguments.parse_args([*BASE, "--snr_gamma", "5", *more.split()])
    assert args.loss_weighting == "min_snr"
    assert args.loss_weighting_args == {"gamma": 5.0}


def test_launcher_sets_the_local_rank(monkeypatch: pytest.MonkeyPatch):
    assert arguments.parse_args([*BASE, "--local_rank", "1"]).local_rank == 1
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert arguments.parse_args([*BASE, "--local_rank", "1"]).local_rank == 3
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(UsageError, match=r"LOCAL_RANK is 'first'.*integer"):
        arguments.parse_args(BASE)


def test_non_ema_revision_follows_the_revision(caplog: pytest.LogCaptureFixture):
    assert arguments.parse_args([*BASE, "--revision", "r1"]).non_ema_revision == "r1"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert arguments.parse_args([*BASE, "--non_ema_revision", "r2"]).non_ema_revision == "r2"
    assert "deprecated" in caplog.text


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        arguments.parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "steps without a new best loss (default 200)" in text
    assert "(default None)" not in text
    assert "(default False)" not in text
