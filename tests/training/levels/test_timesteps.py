"""From the command line to a sampler, an objective and weights; wrong ones name their flag."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusers_curriculum import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    MovingTimestepSampler,
)
from diffusers_curriculum.pacing import make_pacing
from diffusers_curriculum.samplers import SequenceTimestepSampler, learning_samplers
from diffusers_curriculum.samplers.description import plain_config
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError, usage_errors
from diffusers_curriculum.training.levels import timesteps
from diffusers_curriculum.training.levels.guards import learning_warnings
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.parts.families.base import ModelFamily
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.weighting import loss_weights
from tests.floors_fixtures import SCHEDULERS
from tests.training.command_lines import parse_args

CURRICULUM = ("--curriculum", "difficulty")


@pytest.fixture
def parse(tmp_path: Path) -> Any:
    (tmp_path / "a.png").touch()
    argv = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path)]
    argv += ["--output_dir", str(tmp_path / "out")]
    return lambda *more: parse_args([*argv, *map(str, more)])


def build(args: Any, scheduler: str = "sd", seed: int = 3) -> Any:
    return timesteps.build_sampler(args, SCHEDULERS[scheduler](), seed)


def check(args: Any, steps: int | None) -> None:
    timesteps.check_length(args, build(args), steps)


def test_no_new_flag_draws_timesteps_uniformly_and_independently(parse: Any) -> None:
    sampler = build(parse())
    assert type(sampler) is DensityTimestepSampler
    assert sampler.draw == "iid"
    assert torch.equal(sampler.probabilities(), torch.full((1000,), 1e-3, dtype=torch.float64))
    assert bool((sampler.importance() == 1).all())
    assert sampler.seed == 3


def test_every_flag_reaches_the_sampler(parse: Any) -> None:
    more = ("--timestep_sampler", "cauchy", "--timestep_sampler_args", "mu=1", "gamma=2")
    more += ("--timestep_draw", "sobol", "--timestep_floor", 0.3)
    sampler = build(parse(*more, "--importance_correction", 0.5))
    expected = DensityTimestepSampler.from_scheduler(
        SCHEDULERS["sd"](),
        density="cauchy",
        density_args={"mu": 1, "gamma": 2},
        draw="sobol",
        floor=0.3,
        importance_correction=0.5,
        seed=3,
    )
    assert sampler.config == expected.config
    assert torch.equal(sampler.probabilities(), expected.probabilities())
    assert torch.equal(sampler.importance(), expected.importance())


def test_the_weights_are_those_of_the_target_that_is_trained(parse: Any) -> None:
    sneaky = ("--loss_weighting", "min_snr", "--loss_weighting_args", "prediction_type=sample")
    args = parse(*sneaky)
    with pytest.raises(UsageError, match=r"--loss_weighting: .*prediction_type"):
        timesteps.build_loss_weights(args, timesteps.build_objective(args, build(args)))


def test_learned_weights(parse: Any) -> None:
    args = parse("--loss_weighting", "uncertainty", "--loss_weighting_args", "warm_up=3")
    objective = timesteps.build_objective(args, build(args))
    assert timesteps.build_loss_weights(args, objective) is None
    learned = timesteps.build_learned_weights(args, objective, seed=1)
    assert learned is not None
    assert learned.warm_up == 3
    assert timesteps.build_learned_weights(parse(), objective, seed=1) is None
    wrong = parse("--loss_weighting", "uncertainty", "--loss_weighting_args", "floor=2")
    with pytest.raises(UsageError, match="--loss_weighting: floor=2"):
        timesteps.build_learned_weights(wrong, objective, seed=1)
    both = parse("--loss_weighting", "uncertainty", "--timestep_sampler", "loss_proportional")
    with pytest.raises(UsageError, match="drop one of the two"):
        build(both)


@pytest.mark.parametrize("name", learning_samplers())
def test_samplers_that_learn(parse: Any, name: str) -> None:
    """They keep their own draw, floor and correction unless told otherwise, and know the loss."""
    own = build(parse("--timestep_sampler", name, "--loss_weighting", "min_snr"))
    kind = learning_samplers()[name]
    plain = kind(SCHEDULERS["sd"](), seed=3)
    assert type(own) is kind
    assert (own.draw, own.floor, own.exponent) == (plain.draw, plain.floor, plain.exponent)
    assert own.config["loss_weighting"] == "min_snr"
    assert own.config.get("mode", "loss") == "loss"  # a script passes losses, no gradient norms
    more = ("--timestep_draw", "iid", "--timestep_floor", 0.25, "--importance_correction", "none")
    more += ("--timestep_sampler_args", "bins=10", "--prediction_type", "v_prediction")
    told = build(parse("--timestep_sampler", name, *more))
    assert (told.draw, told.floor, told.exponent) == ("iid", 0.25, 0)
    assert told.config["bins"] == 10
    assert told.config["prediction_type"] == "v_prediction"
    for step in range(3):
        told.observe(torch.arange(1000), torch.rand(1000, generator=torch.Generator()), step)


def test_two_phases(parse: Any) -> None:
    more = ("--timestep_sampler_args", "switch_step=5", "mix=linear", "mix_steps=2")
    sampler = build(parse("--timestep_sampler", "two_phase", *more))
    assert type(sampler) is SequenceTimestepSampler
    assert sampler.starts == (0, 5)
    uniform = torch.full((1000,), 1e-3, dtype=torch.float64)
    assert not torch.allclose(sampler.probabilities(4), uniform, atol=1e-6)
    torch.testing.assert_close(sampler.probabilities(7), uniform)


def test_a_law_of_many_parts(parse: Any) -> None:
    parts = '[{"density": "laplace", "weight": 3}, {"density": "uniform", "weight": 1}]'
    flags = ("--timestep_sampler", "mixture", "--timestep_sampler_args", f"components={parts}")
    laplace = build(parse("--timestep_sampler", "laplace", "--timestep_floor", 0)).probabilities()
    mixed = build(parse(*flags, "--timestep_floor", 0)).probabilities()
    torch.testing.assert_close(mixed, 0.75 * laplace + 0.25 / 1000, rtol=1e-3, atol=1e-9)


def test_a_sampler_from_a_file(parse: Any, tmp_path: Path) -> None:
    saved = SequenceTimestepSampler.two_phase(SCHEDULERS["sd"](), 7, floor=0.3, seed=11)
    saved.save_pretrained(str(tmp_path))
    flag = ("--timestep_sampler", tmp_path / saved.config_name)
    sampler = build(parse(*flag))
    assert plain_config(sampler) == plain_config(saved)
    assert torch.equal(sampler.probabilities(9), saved.probabilities(9))
    curriculum = build(parse(*flag, *CURRICULUM))
    assert isinstance(curriculum, CurriculumTimestepSampler)
    assert plain_config(curriculum.base) == plain_config(saved)
    with pytest.raises(UsageError, match="is for a schedule of 1000 levels"):
        build(parse(*flag), scheduler="linear")
    with pytest.raises(UsageError, match=r"--timestep_floor is 0\.1, which has no effect"):
        parse(*flag, "--timestep_floor", 0.1)


def test_a_sampler_from_a_file_by_hand(parse: Any, tmp_path: Path) -> None:
    """It is of the run's schedule and seed, and named as in the catalogue."""
    moving = {"type": "moving", "move_steps": 40, "positions": 5}
    own = {"type": "density", "density": "cauchy", "draw": "stratified", "seed": 8}
    phases = [{"until": 5, "sampler": own | {"seed": 3}}, {"sampler": moving}]
    for content in (moving, own, {"type": "sequence", "phases": phases}):
        (file := tmp_path / "by hand.json").write_text(json.dumps(content))
        sampler = build(parse("--timestep_sampler_config", file), "cosine")
        assert plain_config(sampler) == plain_config(
            build(parse("--timestep_sampler", file), "cosine")
        )
        assert sampler.name() == content["type"]
        assert sampler.seed == content.get("seed", 3)
        assert len(sampler.levels) == len(build(parse(), "cosine").levels)
    nested = {"type": "curriculum", "clusters": 4, "base": moving}
    file.write_text(json.dumps(nested))
    sampler = build(parse("--timestep_sampler_config", file))
    assert sampler.base.config["move_steps"] == 40


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1]", "by.json names no sampler: .*_class_name"),
        ("{}", "by.json names no sampler"),
        ("{", "by.json is no JSON file"),
        ('{"type": "movin"}', "sampler 'movin' is unknown: .*is 'moving' meant"),
        ('{"_class_name": "Nothing"}', "_class_name='Nothing' is no"),
        ('{"type": "moving", "mu": 3}', "has no setting 'mu'"),
        ('{"type": "curriculum"}', "CurriculumTimestepSampler lacks 'base'"),
        ('{"type": "curriculum", "base": 3}', "base=3 is no sampler: give one"),
        ('{"type": "sequence", "phases": [3]}', "phase 1=3 is no sampler: give one"),
        ('{"type": "sequence", "phases": [{"sampler": 3}]}', "sampler of phase 1=3 is no"),
        ('{"type": "sequence", "phases": 3}', "--timestep_sampler: "),
        (None, "by.json cannot be read: No such file"),
    ],
)
def test_a_wrong_file_is_told(parse: Any, tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "by.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=told):
        build(parse("--timestep_sampler_config", file))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--timestep_sampler", "laplace"), "and --timestep_sampler laplace both say what is"),
        (("--timestep_sampler_args", "mu=1"), "--timestep_sampler_args is mu=1, which has no"),
        (("--timestep_draw", "iid"), "--timestep_draw is iid, which has no effect"),
        (("--timestep_floor", 0.1), r"--timestep_floor is 0\.1, which has no effect"),
        (("--importance_correction", "full"), "--importance_correction is 1.0|is full, which"),
        (("--data_scale", 2), "--data_scale is 2.0, which moves"),
        (("--timestep_shift_preset", "sd3"), "--timestep_shift_preset sd3 moves a density"),
        (("--timestep_bias_strategy", "later"), "both say what is drawn"),
    ],
)
def test_flags_beside_a_file_are_refused(parse: Any, more: tuple[Any, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse("--timestep_sampler_config", "a.json", *more)
    with pytest.raises(UsageError, match="--timestep_sampler_config is laplace: give a JSON file"):
        parse("--timestep_sampler_config", "laplace")


def test_a_moving_law(parse: Any) -> None:
    flags = ("--timestep_sampler", "moving", "--timestep_sampler_args")
    shares = ("move_share=0.1", "widen_share=0.5", "pacing=linear")
    sampler = build(parse(*flags, *shares, "--max_train_steps", 2000))
    assert type(sampler) is MovingTimestepSampler
    steps = {name: sampler.config[name] for name in ("move_steps", "widen_steps", "pacing")}
    assert steps == {"move_steps": 200, "widen_steps": 1000, "pacing": "linear"}
    assert (sampler.draw, sampler.floor, sampler.exponent) == ("stratified", 0.1, 0)
    own = ("--timestep_draw", "sobol", "--timestep_floor", 0.3, "--importance_correction", "full")
    told = build(parse(*flags, "move_steps=5", "density=cauchy", *own))
    assert (told.draw, told.floor, told.exponent) == ("sobol", 0.3, 1)
    paced = build(parse(*flags, "pacing=patience", 'pacing_args={"patience": 3}', *CURRICULUM))
    assert paced.base.learns
    for wrong, message in {
        (*flags[:2],): "moving needs the steps in which its location moves: move_steps=N",
        (*flags, "move_share=0.5"): "move_share=0.5 needs the length of the run",
        (*flags, "move_steps=5", "density=mode"): "'mode' has no location to move",
        (*flags, "move_steps=5", "x=1"): "--timestep_sampler: .*'x'",
    }.items():
        with pytest.raises(UsageError, match=message):
            build(parse(*wrong))
    with pytest.raises(UsageError, match=r"choose from .*moving, two_phase"):
        build(parse("--timestep_sampler", "movin"))


def test_a_law_that_would_not_arrive_is_told(parse: Any) -> None:
    args = parse("--timestep_sampler", "moving", "--timestep_sampler_args", "move_steps=50")
    (told,) = learning_warnings(args, build(args), 50)
    assert told.startswith("moving moves over 50 updates, and the run has 50: it does not arrive")
    assert [*learning_warnings(args, build(args), 51)] == []


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (("later", "--timestep_bias_portion", 0.3), slice(700, 1000)),
        (("earlier",), slice(0, 250)),
        (("range", "--timestep_bias_begin", 100, "--timestep_bias_end", 200), slice(100, 200)),
    ],
)
def test_diffusers_bias_flags_have_their_exact_shares(
    parse: Any, flags: tuple[object, ...], chosen: slice
) -> None:
    more = ("--timestep_bias_strategy", *flags, "--timestep_bias_multiplier", 4)
    expected = torch.ones(1000, dtype=torch.float64)
    expected[chosen] = 4
    mass = build(parse(*more)).probabilities()
    torch.testing.assert_close(mass, expected / expected.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--timestep_bias_multiplier", 2), "--timestep_bias_multiplier is 2.0, which has no"),
        (("--timestep_bias_strategy", "later", "--timestep_bias_begin", 5), "begin is 5, which"),
        (("--timestep_bias_strategy", "later", "--timestep_sampler", "laplace"), "drop one of"),
        (("--timestep_bias_strategy", "range", "--timestep_bias_portion", 0.1), "portion is 0.1"),
    ],
)
def test_bias_flags_without_effect(parse: Any, more: tuple[object, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse(*more)


def test_every_curriculum_flag_reaches_the_sampler(parse: Any) -> None:
    more = ("--curriculum_clusters", 5, "--curriculum_clustering", "snr", "--curriculum_min_size")
    more += (7, "--curriculum_order", "hard_to_easy", "--curriculum_within", "balanced")
    more += ("--curriculum_patience", 11, "--curriculum_min_delta", 0.5)
    more += ("--curriculum_smoothing", 0.25, "--curriculum_min_stage_steps", 4)
    sampler = build(parse(*CURRICULUM, *more, "--curriculum_max_stage_steps", 40))
    assert isinstance(sampler, CurriculumTimestepSampler)
    assert sampler.stages == 5
    assert sampler.config["clustering"] == "snr"
    assert sampler.config["clustering_args"] == {"min_size": 7}
    assert (sampler.order, sampler.within) == ("hard_to_easy", "balanced")
    assert sampler.config["pacing_args"] == {
        "patience": 11,
        "min_delta": 0.5,
        "smoothing": 0.25,
        "min_stage_steps": 4,
        "max_stage_steps": 40,
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("fixed", "--curriculum_stage_steps", 9), {"stage_steps": 9}),
        (("linear", "--curriculum_total_steps", 90), {"total_steps": 90}),
        (("cosine", "--curriculum_total_steps", 91), {"total_steps": 91}),
        (("root", "--curriculum_total_steps", 92), {"total_steps": 92}),
    ],
)
def test_each_pacing_gets_its_own_numbers(
    parse: Any, more: tuple[object, ...], expected: dict[str, int]
) -> None:
    sampler = build(parse(*CURRICULUM, "--curriculum_pacing", *more))
    assert sampler.pacing.name == more[0]
    assert sampler.config["pacing_args"] == expected


def test_explicit_boundaries(parse: Any) -> None:
    more = ("--curriculum_clustering", "explicit", "--curriculum_boundaries", 0, 100, 700)
    assert build(parse(*CURRICULUM, *more)).starts == (0, 100, 700)


@pytest.mark.parametrize(("scheduler", "method"), [("sd", "log_snr"), ("flow", "quantile")])
def test_auto_clustering_follows_the_schedule(parse: Any, scheduler: str, method: str) -> None:
    auto = build(parse(*CURRICULUM), scheduler)
    named = build(parse(*CURRICULUM, "--curriculum_clustering", method), scheduler)
    assert auto.starts == named.starts


def test_auto_clustering_follows_the_law(parse: Any) -> None:
    line = (*CURRICULUM, "--timestep_sampler", "laplace")
    auto = build(parse(*line), "sd")
    named = build(parse(*line, "--curriculum_clustering", "quantile"), "sd")
    assert auto.starts == named.starts


def test_the_curriculum_keeps_the_base_of_the_sampler_flags(parse: Any) -> None:
    sampler = build(parse(*CURRICULUM, "--timestep_sampler", "laplace", "--timestep_draw", "iid"))
    assert sampler.base.config["density"] == "laplace"
    assert sampler.draw == "iid"
    assert sampler.seed == 3


# -- too long a curriculum -------------------------------------------------------------------------


def test_a_curriculum_that_fits_is_taken(parse: Any) -> None:
    check(parse(*CURRICULUM, "--curriculum_patience", 8), 1000)  # 19 * 8 * 1.781 = 271 of 300
    check(parse(*CURRICULUM), None)  # a run of unknown length


def test_the_remedy_for_too_long_a_curriculum_fits(parse: Any) -> None:
    with pytest.raises(UsageError, match=r"take 6768 of 1000 .*--curriculum_patience 8,") as told:
        check(parse(*CURRICULUM), 1000)
    assert "--curriculum_max_share 0.3" in str(told.value)
    with pytest.raises(UsageError, match="use --curriculum_patience 8"):
        check(parse(*CURRICULUM, "--curriculum_patience", 9), 1000)
    check(parse(*CURRICULUM, "--curriculum_patience", 8), 1000)


def test_the_remedy_where_no_patience_is_short_enough(parse: Any) -> None:
    with pytest.raises(UsageError, match="fewer --curriculum_clusters or a faster pacing"):
        check(parse(*CURRICULUM), 100)


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("fixed", {"stage_steps": 10}, 90),
        ("linear", {"total_steps": 90}, 90),
        ("patience", {"patience": 10, "max_stage_steps": 10}, 90),
    ],
)
def test_the_bound_is_exact(name: str, numbers: dict[str, int], expected: int) -> None:
    sampler: Any = SimpleNamespace(pacing=make_pacing(name, **numbers), stages=10)
    sampler.laws = {"": sampler}
    args = Arguments(curriculum_max_share=0.5)
    timesteps.check_length(args, sampler, 2 * expected)
    with pytest.raises(UsageError, match=f"take {expected} of {2 * expected - 1}"):
        timesteps.check_length(args, sampler, 2 * expected - 1)


# -- objective and weights -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_of_the_flag_wins(parse: Any, kind: str) -> None:
    args = parse("--prediction_type", kind, "--snr_gamma", 3)
    objective = timesteps.build_objective(args, build(args))
    assert objective.prediction_type == kind
    weights = timesteps.build_loss_weights(args, objective)
    expected = loss_weights("min_snr", objective.levels, kind, gamma=3)
    assert weights is not None
    assert expected is not None
    assert torch.equal(weights, expected)


def test_the_schedulers_own_prediction_type_is_the_default(parse: Any) -> None:
    scheduler = SCHEDULERS["sd"](prediction_type="v_prediction")
    args = parse()
    sampler = timesteps.build_sampler(args, scheduler, 0)
    assert timesteps.build_objective(args, sampler).prediction_type == "v_prediction"
    assert timesteps.build_loss_weights(args, timesteps.build_objective(args, sampler)) is None


@pytest.mark.parametrize(
    ("more", "scheduler", "told"),
    [
        (("--prediction_type", "v_prediction"), "flow", "--prediction_type: .*'flow'"),
        (("--dream_training", "--prediction_type", "sample"), "sd", "--dream_training .*'sample'"),
        (("--dream_training",), "flow", "--dream_training .*'flow'"),
    ],
)
def test_impossible_objectives(
    parse: Any, more: tuple[str, ...], scheduler: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, own = parse(*more), SCHEDULERS[scheduler]()
    monkeypatch.setattr(ModelFamily, "load_schedulers", lambda family, args: (own, own))
    with pytest.raises(UsageError, match=told):
        TextToImage().choose_levels(args, 3)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--timestep_sampler", "lapalce"), "'lapalce' is unknown.*is 'laplace' meant"),
        (("--timestep_sampler", "two_phase"), "--timestep_sampler: .*switch_step"),
        (("--timestep_sampler", "loss_proportional", "--timestep_sampler_args", "x=1"), "'x'"),
        (("--timestep_sampler", "absent.json"), "absent.json cannot be read: No such"),
        (("--timestep_sampler", "laplace", "--timestep_sampler_args", "x=1"), "sampler: .*'x'"),
        (("--timestep_sampler", "normal", "--timestep_sampler_args", "mean=words"), "sampler: "),
        ((*CURRICULUM, "--curriculum_clusters", 2000), "--curriculum: clusters=2000"),
    ],
)
def test_wrong_arguments_name_their_flag(parse: Any, more: tuple[object, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        build(parse(*more))


UNTRAINED = ("--untrained_timestep", 999)


@pytest.mark.parametrize(
    ("scheduler", "more", "told"),
    [
        ("sd_zero_terminal", (), "at timestep 999.*v_prediction.*--untrained_timestep 999"),
        ("sd_zero_terminal", ("--untrained_timestep", 998), "_timestep is 998.*_timestep 999"),
        ("sd", UNTRAINED, "is 999, but .*'epsilon' trains every timestep of this schedule"),
        ("flow", UNTRAINED, "is 999, but .*'flow' trains every timestep"),
        ("sd_zero_terminal", (*UNTRAINED, "--prediction_type", "sample"), "'sample' trains every"),
    ],
)
def test_epsilon_at_zero_terminal_snr_is_refused_unless_it_is_named(
    parse: Any, scheduler: str, more: tuple[object, ...], told: str
) -> None:
    own = SCHEDULERS[scheduler]()
    args = parse(*more)
    levels = Levels.of(args, own, own, seed=3)  # of a preview: that is drawn
    with pytest.raises(UsageError, match=told):
        levels.check_terminal_snr(args.untrained_timestep)


def test_infinite_weights_name_their_flag(parse: Any) -> None:
    args = parse("--loss_weighting", "debiased", *UNTRAINED)
    objective = timesteps.build_objective(args, build(args, "sd_zero_terminal"))
    with pytest.raises(UsageError, match=r"--loss_weighting: .*'debiased'.*min_snr"):
        timesteps.build_loss_weights(args, objective)


def test_usage_errors_are_not_wrapped_twice() -> None:
    with pytest.raises(UsageError, match=r"^mine$"), usage_errors("--flag"):
        raise UsageError("mine")
    with pytest.raises(KeyError), usage_errors("--flag"):
        raise KeyError("a bug of ours")


@pytest.mark.parametrize(
    ("scheduler", "more", "told"),
    [
        ("sd", (), []),
        ("sd_zero_terminal", UNTRAINED, ["timestep 999 stays untrained"]),
        ("sd_zero_terminal", ("--prediction_type", "v_prediction"), []),
        (
            "sd_zero_terminal",
            ("--prediction_type", "v_prediction", "--snr_gamma", 5),
            ["never trained"],
        ),
        ("sd_zero_terminal", (*UNTRAINED, "--snr_gamma", 5), ["timestep 999 stays untrained"]),
    ],
)
def test_zero_terminal_snr_is_told(
    parse: Any,
    scheduler: str,
    more: tuple[object, ...],
    told: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = SCHEDULERS[scheduler]()
    Levels.of(parse(*more), own, own, seed=3).warn_of_terminal_snr()
    assert len(caplog.records) == len(told)
    assert all(part in r.message for part, r in zip(told, caplog.records, strict=True))
