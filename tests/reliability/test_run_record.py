"""run.json, the facts in a checkpoint, and what a resumed run may change."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_curriculum import NoiseLevels
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.flag import SETTINGS
from diffusers_curriculum.training.checkpoint import record as run_record
from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint
from diffusers_curriculum.training.checkpoint.record import RunRecord
from diffusers_curriculum.training.checkpoint.same_run import (
    Difference,
    check_same_run,
    conflicts,
    renewed_parts,
    run_facts,
)
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.errors import CheckpointError, UsageError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.storage.fingerprints import (
    dataset_digest,
    model_identity,
    schedule_identity,
)
from diffusers_curriculum.training.storage.manifest import read_manifest
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora
from tests.scripts.small_runs import Bench, make_bench, status, write_images
from tests.scripts.small_runs import train as run_script
from tests.training.command_lines import parse_args
from tests.training.tiny_state import bits, make_state, train

pytestmark = pytest.mark.reliability
TOKEN = "hf_OnlyTheHubMaySeeThis"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 6)


def load(folder: Path, cache: Path, **more: Any) -> Any:
    return load_images(
        caption_column="text", train_data_dir=str(folder), cache_dir=str(cache), **more
    )


def arguments(folder: Path, *more: object) -> Arguments:
    line = ["--pretrained_model_name_or_path", "some/model", "--train_data_dir", folder, *more]
    return parse_args(list(map(str, line)))


@pytest.fixture(scope="module")
def facts_of(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The facts of a command line, with the data set loaded once."""
    cache = tmp_path_factory.mktemp("cache")
    rows = load(images, cache)

    def build(*more: object, rows: Any = rows, betas: float = 0.02, batch: int = 4) -> Any:
        args, task = arguments(images, *more), TextToImage()
        scheduler = DDPMScheduler(beta_end=betas)
        plan = BatchPlan(len(rows), batch, 1, 1, 0, seed=args.seed or 0)
        task.args, task.levels = args, Levels.of(args, scheduler, scheduler, plan.seed)
        args.max_train_steps = args.max_train_steps or 10**6
        job: Any = SimpleNamespace(args=args, plan=plan, rows=rows)
        return task.facts(job)

    return build


# -- the fingerprints ------------------------------------------------------------------------------


def digest(folder: Path, cache: Path) -> str:
    return dataset_digest(load(folder, cache), "image", "text", str(folder))


def test_a_data_set_is_known_again_elsewhere(images: Path, tmp_path: Path) -> None:
    first = digest(images, tmp_path / "cache")
    moved = Path(shutil.copytree(images, tmp_path / "elsewhere"))
    assert digest(images, tmp_path / "another cache") == first
    assert digest(moved, tmp_path / "cache") == first
    assert len(first) == 64


def _other_caption(folder: Path) -> None:
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace("number 3", "number 9"))


def _other_size(folder: Path) -> None:
    with open(folder / "02.png", "ab") as file:
        file.write(b"0")


def _renamed(folder: Path) -> None:
    os.replace(folder / "02.png", folder / "x2.png")
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace("02.png", "x2.png"))


def _swapped(folder: Path) -> None:
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line) for line in lines]
    captions[0]["text"], captions[1]["text"] = captions[1]["text"], captions[0]["text"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))


@pytest.mark.parametrize("change", [_other_caption, _other_size, _renamed, _swapped])
def test_another_data_set_is_noticed(
    images: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    changed = Path(shutil.copytree(images, tmp_path / "images"))
    change(changed)
    assert digest(changed, tmp_path / "cache") != digest(images, tmp_path / "cache")


def test_images_inside_the_table_count_by_size(images: Path, tmp_path: Path) -> None:
    """As from a Parquet data set on the Hub: bytes in the rows, no folder."""
    from datasets import Dataset, Image

    def rows(last: bytes) -> Any:
        cells = [{"path": f"hf://d@1/{i}.png", "bytes": b"12"} for i in range(2)]
        cells.append({"path": "hf://d@1/2.png", "bytes": last})
        table = Dataset.from_dict({"image": cells, "text": [["a", "b"], ["c"], ["d"]]})
        return table.cast_column("image", Image(decode=False))

    digests = [dataset_digest(rows(last), "image", "text", None) for last in (b"1", b"1", b"123")]
    assert digests[0] == digests[1] != digests[2]


def test_a_digest_is_that_of_older_checkpoints(tmp_path: Path) -> None:
    from datasets import Dataset, Image

    (tmp_path / "a#1.png").write_bytes(b"123")
    cells = [{"path": str(tmp_path / "a#1.png"), "bytes": None}]
    cells += [{"path": p, "bytes": None} for p in ("d/x.tar#512+3/b.png", "x.parquet#0/7.image")]
    captions = [["a \u00fc", 'a "b"'], ["c\n"], None]
    rows = Dataset.from_dict({"image": cells, "text": captions})
    rows = rows.cast_column("image", Image(decode=False))
    entries = [["a#1.png", 3, captions[0]], ["b.png", None, ["c\n"]], ["7.image", None, None]]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert dataset_digest(rows, "image", "text", None) == expected


def test_the_base_model_is_known_by_files_or_by_name(tmp_path: Path) -> None:
    for part in ("vae", "unet"):
        (tmp_path / "a" / part).mkdir(parents=True)
        (tmp_path / "a" / part / "model.safetensors").write_bytes(b"1234")
    first = model_identity(str(tmp_path / "a"), None, None)
    assert model_identity(str(shutil.copytree(tmp_path / "a", tmp_path / "b")), None, None) == first
    (tmp_path / "b" / "unet" / "model.safetensors").write_bytes(b"12345")
    assert model_identity(str(tmp_path / "b"), None, None) == first  # trained, not frozen
    (tmp_path / "b" / "vae" / "model.safetensors").write_bytes(b"12345")
    assert model_identity(str(tmp_path / "b"), None, None) != first
    named = model_identity("some/model", "abc123", "fp16")
    assert named == {"name": "some/model", "revision": "abc123", "variant": "fp16"}


def test_the_schedule_is_known_by_its_levels_not_by_last_bits() -> None:
    levels = NoiseLevels.from_scheduler(DDPMScheduler())
    again = NoiseLevels.from_scheduler(DDPMScheduler())
    again.log_snr.mul_(1 + 1e-15)
    other = NoiseLevels.from_scheduler(DDPMScheduler(beta_end=0.0201))
    assert not torch.equal(levels.log_snr, again.log_snr)
    assert schedule_identity(levels) == schedule_identity(again)
    assert schedule_identity(levels)["sha256"] != schedule_identity(other)["sha256"]
    zero = NoiseLevels.from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True))
    assert json.loads(json.dumps(schedule_identity(zero), allow_nan=False))["levels"] == 1000


# -- conflicts -------------------------------------------------------------------------------------

CHANGES: list[tuple[str, tuple[object, ...], str]] = [
    ("seed", ("--seed", 3), "seed is 3, was 0"),
    ("model", ("--revision", "v2"), "model.revision is v2, was unset"),
    ("prediction_type", ("--prediction_type", "v_prediction"), "is v_prediction, was epsilon"),
    ("sampler", ("--timestep_sampler", "laplace"), "sampler.density is laplace, was uniform"),
    (
        "sampler",
        ("--timestep_sampler", "two_phase", "--timestep_sampler_args", "switch_step=5"),
        "sampler.phases.1.until is 5, was unset",
    ),
    ("sampler", ("--timestep_draw", "sobol"), "sampler.draw is sobol, was iid"),
    ("sampler", ("--curriculum", "difficulty"), "sampler.curriculum.clusters is 20, was unset"),
    ("loss_weighting", ("--snr_gamma", 5), "loss_weighting.gamma is 5.0, was unset"),
    ("objective", ("--noise_offset", 0.1), "objective.noise_offset is 0.1, was 0"),
    ("images", ("--random_flip",), "images.random_flip is True, was False"),
    ("optimizer", ("--learning_rate", 0.01), "optimizer.learning_rate is 0.01, was 0.0001"),
    ("compile", ("--compile", "full"), "compile.compile is full, was unset"),
    ("imports", ("--import", "csv"), "imports.csv is "),
    ("ema", ("--use_ema",), "ema.decay is 0.9999, was unset"),
]


@pytest.mark.parametrize(("setting", "more", "told"), CHANGES)
def test_a_change_is_refused_by_name_and_allowed_by_name(
    facts_of: Any, setting: str, more: tuple[object, ...], told: str, caplog: Any
) -> None:
    saved, facts = facts_of(), facts_of(*more)
    with pytest.raises(UsageError) as refusal:
        check_same_run(facts, saved, [name for name in SETTINGS if name != setting])
    assert told in str(refusal.value)
    assert f"--allow_config_change {setting}," in str(refusal.value)
    with caplog.at_level(logging.WARNING):
        changed = check_same_run(facts, saved, [setting])
    assert {difference.setting for difference in changed} == {setting}
    assert told in caplog.text
    assert SETTINGS[setting] in caplog.text


def test_every_setting_can_conflict(facts_of: Any, images: Path, tmp_path: Path) -> None:
    fewer = load(images, tmp_path / "cache", max_train_samples=5)
    others = {
        "schedule": facts_of(betas=0.03),
        "global_batch": facts_of(batch=8),
        "dataset": facts_of(rows=fewer),
    }
    for setting, facts in others.items():
        assert {d.setting for d in conflicts(facts_of(), facts)} == {setting}
    settings = {setting for setting, *_ in CHANGES} | others.keys()
    assert settings | {"adapter"} == SETTINGS.keys()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--rank", 8), "adapter.rank is 8, was 4"),
        (("--lora_alpha", 2), "adapter.lora_alpha is 2.0, was 4.0"),
        (("--lora_target_modules", "to_q"), "adapter.lora_target_modules is "),
        (("--use_dora",), "adapter.use_dora is True, was False"),
    ],
)
def test_another_adapter_is_another_run(
    images: Path, more: tuple[object, ...], told: str, caplog: Any
) -> None:
    def facts(*more: object) -> dict[str, Any]:
        line = ["--pretrained_model_name_or_path", "m", "--train_data_dir", images, *more]
        args = TextToImageLora().parse(list(map(str, line)), machine=False)
        return run_facts(args, BatchPlan(6, 4, 1, 1, 0, seed=0), {}, {})

    with pytest.raises(UsageError) as refusal:
        check_same_run(facts(*more), facts())
    assert told in str(refusal.value)
    assert "--allow_config_change adapter," in str(refusal.value)
    changed = check_same_run(facts(*more), facts(), ["adapter"])
    assert {difference.setting for difference in changed} >= {"adapter"}
    assert SETTINGS["adapter"] in caplog.text


def test_all_differences_are_named_together(facts_of: Any) -> None:
    saved = facts_of()
    facts = facts_of("--seed", 3, "--timestep_sampler", "laplace", batch=8)
    with pytest.raises(UsageError, match="--allow_config_change seed global_batch sampler,") as e:
        check_same_run(facts, saved)
    for told in ("seed is 3, was 0", "processes is 8, was 4", "density is laplace, was uniform"):
        assert told in str(e.value)


def test_a_data_set_that_shrank_is_told_in_numbers(
    facts_of: Any, images: Path, tmp_path: Path
) -> None:
    shrunk = Path(shutil.copytree(images, tmp_path / "images"))
    kept = (shrunk / "metadata.jsonl").read_text().splitlines()[:4]
    (shrunk / "metadata.jsonl").write_text("\n".join(kept))
    for extra in ("04.png", "05.png"):
        (shrunk / extra).unlink()
    facts = facts_of(rows=load(shrunk, tmp_path / "cache"))
    with pytest.raises(UsageError, match="number of training samples is 4, was 6"):
        check_same_run(facts, facts_of())


def test_what_does_not_matter_may_change(facts_of: Any) -> None:
    more = ("--max_train_steps", 9, "--mixed_precision", "bf16", "--output_dir", "elsewhere")
    assert check_same_run(facts_of(*more), facts_of()) == []
    assert check_same_run(facts_of(), None) == []
    assert check_same_run(facts_of(), facts_of(), ["sampler"]) == []  # a restart keeps its flags


def test_checkpoints_of_older_versions_are_compared_where_they_tell(facts_of: Any) -> None:
    facts = facts_of()
    old = {name: facts[name] for name in ("seed", "global_batch", "num_samples", "sampler")}
    assert conflicts(old, facts) == []
    named = [d.name for d in conflicts({**old, "num_samples": 7, "seed": 1}, facts)]
    assert named == ["seed", "dataset.rows"]


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d"]
    with pytest.raises(SystemExit):
        TextToImage().parse([*given, "--allow_config_change", "sampler", "everything"])
    assert "--allow_config_change: invalid choice: 'everything' (choose from" in (
        capsys.readouterr().err
    )


def test_facts_fit_into_a_manifest_and_come_back(facts_of: Any, tmp_path: Path) -> None:
    facts = facts_of("--curriculum", "difficulty", "--snr_gamma", 5)
    saved = save_checkpoint(tmp_path, 1, lambda f: (f / "x").write_text("x"), facts)
    assert read_manifest(saved)["facts"] == facts


# -- what an allowed change does to the state ------------------------------------------------------


def difference(setting: str) -> Difference:
    return Difference(setting, setting, 1, 2)


def test_only_what_changed_starts_afresh() -> None:
    assert renewed_parts([]) == frozenset()
    assert renewed_parts([difference("seed"), difference("dataset")]) == frozenset()
    assert renewed_parts([difference("schedule")]) == {"sampler", "trackers"}
    assert renewed_parts([difference("loss_weighting")]) == {"tracker_loss_weights"}
    everything = {"sampler", "trackers", "tracker_loss_weights", "ema"}
    assert renewed_parts([*map(difference, SETTINGS)]) == everything


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = make_state()
    train(state, 0, 3)
    folder = tmp_path_factory.mktemp("run")
    return save_checkpoint(folder, 3, partial(state.write, step=3), {})


def test_a_fresh_sampler_takes_the_place_of_one_that_does_not_fit(saved: Path, caplog: Any) -> None:
    reference, fresh, other = make_state(), make_state(9), make_state(9)
    reference.read(saved)
    other.sampler = type(other.sampler)(clusters=7)  # type: ignore[call-arg]
    with pytest.raises(CheckpointError):
        other.read(saved)
    assert bits(other)["unet"] == bits(fresh)["unet"]  # nothing was changed by the refusal
    with caplog.at_level(logging.WARNING):
        assert other.read(saved, renew={"sampler"}) == 3
    assert "sampler" in caplog.text
    found, expected = bits(other), bits(reference)
    assert {name for name in found if found[name] != expected[name]} == {"sampler"}
    assert other.sampler.state_dict()["calls"] == 0


def test_trackers_start_afresh_alone(saved: Path) -> None:
    reference, other = make_state(), make_state(9)
    reference.read(saved)
    other.read(saved, renew={"trackers"})
    found, expected = bits(other), bits(reference)
    assert {name for name in found if found[name] != expected[name]} == {"trackers"}


def test_new_optimizer_numbers_hold_with_old_moments(saved: Path) -> None:
    reference, other = make_state(), make_state(9)
    other.optimizer.param_groups[0].update(lr=0.5, initial_lr=0.5, weight_decay=0.25)
    other.lr_scheduler.base_lrs = [0.5]
    reference.read(saved)
    other.read(saved)
    group = other.optimizer.param_groups[0]
    factor = reference.lr_scheduler.get_last_lr()[0] / 3e-3
    assert group["weight_decay"] == 0.25
    assert group["lr"] == other.lr_scheduler.get_last_lr()[0] == pytest.approx(0.5 * factor)
    ours, theirs = (s.optimizer.state_dict()["state"] for s in (other, reference))
    assert all(torch.equal(ours[i]["exp_avg"], theirs[i]["exp_avg"]) for i in theirs)
    for state in (reference, other):
        state.lr_scheduler.step()
    factor = reference.lr_scheduler.get_last_lr()[0] / 3e-3
    assert group["lr"] == pytest.approx(0.5 * factor)


def test_a_new_decay_holds_with_the_old_average(saved: Path) -> None:
    reference, other = make_state(), make_state(9)
    ours, theirs = other.ema, reference.ema
    assert ours is not None
    assert theirs is not None
    ours.decay = 0.5
    reference.read(saved)
    other.read(saved)
    assert (ours.decay, theirs.decay) == (0.5, 0.97)
    pairs = zip(ours.shadow_params, theirs.shadow_params, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# -- run.json --------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_sessions_are_kept_across_resumes(images: Path, tmp_path: Path) -> None:
    args = arguments(images, "--learning_rate", 0.01, "--hub_token", TOKEN)
    facts = {"seed": 7, "world_size": 2}
    first = RunRecord(tmp_path, args.tracked(), facts)
    first.start()
    assert read(tmp_path)["sessions"][0]["outcome"] == "running"
    assert read(tmp_path)["sessions"][0]["ended"] is None  # and stays so if it is killed
    changed = [Difference("sampler", "sampler.density", "uniform", "laplace")]
    checkpoint = tmp_path / "checkpoint-5"
    second = RunRecord(tmp_path, args.tracked(), facts, 5, checkpoint, changed)
    second.start()
    second.finish(9, "stopped by SIGTERM")
    document = read(tmp_path)
    old, new = document["sessions"]
    assert document["facts"] == facts
    assert (old["first_step"], old["resumed_from"], old["outcome"]) == (0, None, "running")
    assert (new["first_step"], new["last_step"], new["outcome"]) == (5, 9, "stopped by SIGTERM")
    assert new["resumed_from"] == str(checkpoint)
    assert new["changed"] == ["sampler.density is laplace, was uniform"]
    assert new["arguments"]["learning_rate"] == 0.01
    assert new["versions"]["torch"] == metadata.version("torch")
    assert new["started"] <= new["ended"]
    assert TOKEN not in json.dumps(document)
    assert os.listdir(tmp_path) == ["run.json"]


def test_passwords_in_addresses_are_masked(tmp_path: Path) -> None:
    line = ["--pretrained_model_name_or_path", "a/b", "--dataset_name", "https://me:pw12@host/x"]
    args = parse_args(line)
    RunRecord(tmp_path, args.tracked(), {}).start()
    text = (tmp_path / "run.json").read_text()
    assert "https://***@host/x" in text
    assert "pw12" not in text


UNREADABLE = [b"", b"{", b"[]", b'{"sessions": 3}', b"\xff\xfe", b"[" * 9999]


@pytest.mark.parametrize("content", UNREADABLE)
def test_an_unreadable_record_is_moved_aside(
    images: Path, tmp_path: Path, content: bytes, caplog: Any
) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        RunRecord(tmp_path, arguments(images).tracked(), {"seed": 1}).start()
    assert (tmp_path / "run.json.unreadable").read_bytes() == content
    assert len(read(tmp_path)["sessions"]) == 1
    assert "run.json.unreadable" in caplog.text


def test_a_failed_write_leaves_the_old_record_and_the_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    record = RunRecord(tmp_path, arguments(images).tracked(), {"seed": 1})
    record.start()
    before = (tmp_path / "run.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_record.os, "fsync", full)
    record.finish(3)
    assert "No space left" in caplog.text
    assert (tmp_path / "run.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["run.json"]


# -- the script ------------------------------------------------------------------------------------

CURRICULUM = (
    "--curriculum",
    "difficulty",
    "--curriculum_clusters",
    3,
    "--curriculum_patience",
    1,
    "--curriculum_max_share",
    10**9,
)
RESUME = ("--max_train_steps", 4, "--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def stopped(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("stopped")
    more = ("--max_train_steps", 2, "--checkpointing_steps", 2, "--revision", "abc123")
    run_script(bench.argv(folder, *CURRICULUM, *more, "--use_ema", "--hub_token", TOKEN))
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    shutil.copy(stopped / "run.json", tmp_path / "out")
    return tmp_path / "out"


def test_a_run_and_its_checkpoint_tell_the_same(stopped: Path) -> None:
    document = read(stopped)
    (session,) = document["sessions"]
    assert document["facts"] == read_manifest(stopped / "checkpoint-2")["facts"]
    assert (session["outcome"], session["first_step"], session["last_step"]) == ("done", 0, 2)
    assert session["arguments"]["revision"] == "abc123"  # R25: a pinned revision is recorded
    assert document["facts"]["sampler"]["clusters"] == 3
    assert TOKEN not in (stopped / "run.json").read_text()


def test_a_resumed_run_adds_a_session(bench: Bench, folder: Path) -> None:
    run_script(bench.argv(folder, *CURRICULUM, *RESUME, "--use_ema"))
    first, second = read(folder)["sessions"]
    assert first["last_step"] == second["first_step"] == 2
    assert second["resumed_from"] == str(folder / "checkpoint-2")
    assert (second["last_step"], second["changed"]) == (4, [])


SCRIPT_CHANGES: list[tuple[tuple[object, ...], str, str]] = [
    ((*CURRICULUM, "--curriculum_clusters", 4), "sampler", "curriculum.clusters is 4, was 3"),
    ((*CURRICULUM, "--timestep_sampler", "laplace"), "sampler", "density is laplace, was uniform"),
    ((), "sampler", "curriculum.clusters is unset, was 3"),
    ((*CURRICULUM, "--max_train_samples", 9), "dataset", "training samples is 9, was 18"),
    ((*CURRICULUM, "--train_batch_size", 3), "global_batch", "processes is 3, was 2"),
    ((*CURRICULUM, "--seed", 8), "seed", "--seed 7"),
    ((*CURRICULUM, "--learning_rate", 0.5), "optimizer", "learning_rate is 0.5, was 0.001"),
    ((*CURRICULUM, "--ema_decay", 0.5), "ema", "ema.decay is 0.5, was 0.9999"),
]


@pytest.mark.parametrize(("more", "name", "told"), SCRIPT_CHANGES)
def test_another_run_is_refused_unless_it_is_named(
    bench: Bench, folder: Path, more: tuple[object, ...], name: str, told: str, capsys: Any
) -> None:
    argv = bench.argv(folder, *more, *RESUME, "--use_ema")
    before = (folder / "run.json").read_bytes()
    assert status(argv) == 2
    message = capsys.readouterr().err
    assert told in message
    assert f"--allow_config_change {name}" in message
    assert (folder / "run.json").read_bytes() == before
    record = run_script([*argv, "--allow_config_change", name])
    assert record.numbers == [2, 3]
    assert len(read(folder)["sessions"][1]["changed"]) >= 1
    if name == "optimizer":
        assert record.steps[-1].lr == 0.5
    if name == "ema":
        assert record.last.averages.ema.decay == 0.5
    if name == "sampler" and "--curriculum" in more:
        assert record.steps[0].stage == 1  # the new curriculum starts at its first stage


def test_a_name_that_is_none_is_refused(bench: Bench, folder: Path, capsys: Any) -> None:
    argv = bench.argv(folder, *CURRICULUM, *RESUME, "--use_ema")
    assert status([*argv, "--allow_config_change", "everything"]) == 2
    assert "everything" in capsys.readouterr().err
