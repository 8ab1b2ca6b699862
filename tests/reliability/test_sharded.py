"""FSDP2 on CPUs over gloo: the samples, levels and noise of one process, losses and weights within
rounding of its; checkpoints that any number of processes goes on from, in shards or not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fsdp2 import needs_fsdp2
from tests.reliability.test_two_processes import check_ended
from tests.reliability.two_processes import Fault, Kill, Outcome, check_whole, launch
from tests.scripts.small_runs import BENCHES, Bench, hashes

pytestmark = [pytest.mark.reliability, needs_fsdp2]

STEPS, STOPPED, GLOBAL = 6, 3, 4
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
EVERYTHING = (
    *("--max_train_steps", STEPS, "--checkpointing_steps", STOPPED, "--lr_scheduler", "cosine"),
    *("--lr_warmup_steps", 1, "--timestep_sampler", "laplace", "--timestep_draw", "stratified"),
    *("--curriculum", "difficulty", "--curriculum_clusters", 4, "--curriculum_patience", 1),
    *("--curriculum_max_share", 1, "--use_ema", "--ema_decay", 0.9, "--max_grad_norm", 0.1),
    *("--resume_from_checkpoint", "latest"),
)
# Flags of pictures; and what reads the middle of a network.
PICTURES = {
    "text_to_image": ["--validation_prompts", "a", "b"],
    "text_to_image_lora": ["--validation_prompt", "a"],
    "image_tokens": ["--eval_metrics", "linear_probe", "--eval_steps", STEPS],
}


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


FAST = "class_conditional"
NAMES = [FAST, *(slow(name) for name in BENCHES if name != FAST)]


def run(
    bench: Bench, folder: Path, ranks: int, *more: object, sharded: bool = True, parts: int = 1
) -> Outcome:
    """Run to the end; ``parts``: micro-batches of each rank."""
    argv = bench.argv(
        folder / "output",
        *EVERYTHING,
        *("--gradient_accumulation_steps", parts, *more),
        batch=GLOBAL // ranks // parts,
    )
    variables = FSDP2 if sharded else {}
    outcome = launch(folder, argv, ranks, script=bench.script, variables=variables)
    assert outcome.statuses == [0] * ranks, outcome.said()
    return outcome


@pytest.fixture(scope="module", params=NAMES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return BENCHES[request.param](tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """One process."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(bench, folder, 1, sharded=False)


@pytest.fixture(scope="module")
def shards(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Two processes in shards."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, run(bench, folder, 2)


def check_like(job: tuple[Path, Outcome], other: tuple[Path, Outcome], bench: Bench) -> None:
    """The same samples and draws; losses and what is left within rounding."""
    (folder, outcome), (other_folder, expected) = job, other
    together, all_steps = outcome.together(), expected.together()
    assert together == {step: all_steps[step] for step in together}
    for step, told in outcome.saw(0).items():
        losses = [float.fromhex(each["loss"]) for each in (told, expected.saw(0)[step])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    outputs = folder / "output", other_folder / "output"
    for path in (f"checkpoint-{STEPS}", bench.exported):
        check_close(*(output / path for output in outputs))
    for config in (*outputs[0].rglob("config.json"), *outputs[0].glob("model_index.json")):
        # the classes that are loaded
        assert config.read_text() == (outputs[1] / config.relative_to(outputs[0])).read_text()


def check_close(mine: Path, other: Path) -> None:
    """Files of the same tensors, within rounding: Adam makes steps of the noise of gradients that
    are 0, so single numbers may differ."""
    files = [mine] if mine.is_file() else sorted(mine.rglob("*.safetensors"))
    assert files
    for file in files:
        found = load_file(file)
        expected = load_file(other / file.relative_to(mine) if mine.is_dir() else other)
        assert found.keys() == expected.keys()
        ends = [torch.cat([t[k].double().flatten() for k in found]) for t in (found, expected)]
        ends = [end.nan_to_num(0, 0, 0) for end in ends]
        assert (ends[0] - ends[1]).norm() <= 1e-3 * ends[1].norm(), file


def test_two_ranks_see_and_learn_what_one_does(
    bench: Bench, whole: tuple[Path, Outcome], shards: tuple[Path, Outcome]
) -> None:
    folder, outcome = shards
    assert "in 2 shards, by blocks: " in outcome.outputs[0].read_text()
    assert check_whole(folder / "output") == [f"checkpoint-{n}" for n in (STOPPED, STEPS)]
    check_like(shards, whole, bench)


@pytest.mark.parametrize(
    ("ranks", "sharded"),
    [
        pytest.param(2, True, id="2-shards"),
        pytest.param(1, False, id="1-whole"),
        pytest.param(4, True, id="4-shards", marks=pytest.mark.slow),
        pytest.param(2, False, id="2-whole", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_shards_goes_on(
    bench: Bench, shards: tuple[Path, Outcome], tmp_path: Path, ranks: int, sharded: bool
) -> None:
    source, name = shards[0] / "output", f"checkpoint-{STOPPED}"
    shutil.copytree(source / name, tmp_path / "output" / name)
    job = run(bench, tmp_path, ranks, sharded=sharded)
    assert job.ranks[0].resumed_at == STOPPED
    check_like((tmp_path, job), shards, bench)
    if (ranks, sharded) == (2, True):
        for path in (f"checkpoint-{STEPS}", bench.exported):
            assert hashes(tmp_path / "output" / path) == hashes(source / path)
        for rank in range(2):
            seen, expected = job.saw(rank), shards[1].saw(rank)
            assert seen == {step: expected[step] for step in range(STOPPED, STEPS)}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parts"), [(4, 1), (2, 2)])
def test_four_ranks_and_micro_batches(
    bench: Bench, whole: tuple[Path, Outcome], tmp_path: Path, ranks: int, parts: int
) -> None:
    check_like((tmp_path, run(bench, tmp_path, ranks, parts=parts)), whole, bench)


@pytest.mark.slow
def test_one_process_is_followed_by_shards(
    bench: Bench, whole: tuple[Path, Outcome], tmp_path: Path
) -> None:
    name = f"checkpoint-{STOPPED}"
    shutil.copytree(whole[0] / "output" / name, tmp_path / "output" / name)
    check_like((tmp_path, run(bench, tmp_path, 2)), whole, bench)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    "kill", [Kill(1, STOPPED + 1, 0.0), Kill(0, 1, 0.02, save=True)], ids=["step", "save"]
)
def test_a_rank_is_killed_and_any_number_goes_on(
    bench: Bench, shards: tuple[Path, Outcome], tmp_path: Path, kill: Kill, ranks: int
) -> None:
    argv = bench.argv(tmp_path / "output", *EVERYTHING, batch=GLOBAL // 2)
    killed = launch(tmp_path, argv, kill=kill, script=bench.script, variables=FSDP2)
    check_ended(killed, kill, tmp_path / "output")
    for rank in range(2):  # what was seen and computed before
        seen, expected = killed.saw(rank), shards[1].saw(rank)
        assert seen == {step: expected[step] for step in seen}
    saved = max([0, *killed.ranks[0].saved])
    job = run(bench, tmp_path, ranks, sharded=ranks > 1)
    assert (job.ranks[0].resumed_at or 0) in {saved, STOPPED}  # killed after the renaming
    check_like((tmp_path, job), shards, bench)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_not_finite_on_one_rank_changes_no_shard(
    bench: Bench, tmp_path: Path, gradients: bool
) -> None:
    more = (*EVERYTHING, "--checkpointing_steps", 1)
    argv, fault = bench.argv(tmp_path / "output", *more), Fault(1, 4, gradients)
    job = launch(tmp_path, argv, fault=fault, script=bench.script, variables=FSDP2)
    assert job.statuses == [3, 3], job.said()
    assert check_whole(tmp_path / "output")[-1] == "checkpoint-4"
    argv += ["--nonfinite", "skip"]
    job = launch(tmp_path, argv, fault=fault, script=bench.script, variables=FSDP2)
    assert job.statuses == [0, 0], job.said()
    held = [
        hashes(tmp_path / f"output/checkpoint-{n}" / bench.trained) for n in range(4, STEPS + 1)
    ]
    assert [a == b for a, b in pairwise(held)] == [True, False]


@pytest.mark.parametrize("name", ["class_conditional", *map(slow, PICTURES)])
def test_pictures_and_measures_of_shards(name: str, tmp_path: Path) -> None:
    """Only the first process draws, and no other is there to gather weights for it."""
    bench = BENCHES[name](tmp_path)
    bench = replace(bench, more=tuple(word for word in bench.more if word != "--no_pictures"))
    more = ["--validation_steps", 4, "--validation_split", 0.3, "--validation_loss_steps", 3]
    more += PICTURES.get(name, [])
    told = []
    for kind, ranks in (("shards", 2), ("whole", 1)):
        (tmp_path / kind).mkdir()
        run(bench, tmp_path / kind, ranks, *more, sharded=ranks > 1)
        output = tmp_path / kind / "output"
        assert (output / "val_imgs_grid.png").exists()
        files = [output / f"{measure}.jsonl" for measure in ("linear_probe", "validation_loss")]
        lines = [line for f in files if f.exists() for line in f.read_text().splitlines()]
        told.append([json.loads(line) for line in lines])
    assert len(told[0]) >= 2
    for mine, other in zip(*told, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
