"""--data_config in a run: what is seen, recorded, resumed and refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffusers_curriculum import Slots
from diffusers_curriculum.samplers import TimestepSampler
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from tests.scripts.small_runs import (
    Bench,
    finite,
    make_bench,
    status,
    train,
    write_images,
    write_json,
)
from tests.scripts.test_processes import launch, together
from tests.scripts.witness import witnessed


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return make_bench(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def toys(bench: Bench) -> Path:
    return write_images(bench.images.parent / "toys", 3)


def argv(bench: Bench, config: Path, output: Path, *more: object) -> list[str]:
    """A command line with sources in the place of the folder."""
    words = bench.argv(output, *more, "--data_config", config, "--report_to", "none")
    place = words.index("--train_data_dir")
    return words[:place] + words[place + 2 :]


def written(folder: Path, bench: Bench, toys: Path, repeats: float = 2) -> Path:
    rows = [
        {"train_data_dir": str(bench.images), "max_train_samples": 4},
        {"train_data_dir": str(toys), "instance_prompt": "a sks toy", "repeats": repeats},
    ]
    return write_json(folder / f"data{repeats}.json", rows)


def test_a_run_on_two_sources_goes_on_as_it_would_have(
    bench: Bench, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, bench, toys)
    more = ("--lr_warmup_steps", 0, "--checkpointing_steps", 2, "--max_train_steps")
    whole = train(argv(bench, config, tmp_path / "whole", *more, 5))
    assert finite(whole)
    train(argv(bench, config, tmp_path / "parts", *more, 2))
    resumed = ("--resume_from_checkpoint", "latest")
    rest = train(argv(bench, config, tmp_path / "parts", *more, 5, *resumed))
    assert rest.steps == whole.steps[2:]

    facts = json.loads((tmp_path / "whole" / "run.json").read_text())["facts"]
    assert facts["num_samples"] == 7
    assert [told["repeats"] for told in facts["dataset"]["sources"].values()] == [1, 2]
    assert "on 2 data sets with" in (tmp_path / "whole" / "README.md").read_text()

    capsys.readouterr()
    other = written(tmp_path, bench, toys, repeats=3)
    assert status(argv(bench, other, tmp_path / "parts", *more, 6, *resumed)) == 2
    assert "dataset.sources.2.repeats is 3.0, was 2.0" in capsys.readouterr().err


# -- a law of its own ------------------------------------------------------------------------------

LEARNED = {"warm_up": 1, "refresh_every": 1, "min_observations": 1, "bins": 2}
STEPS = 8
CURRICULUM = (
    *("--lr_warmup_steps", 0, "--timestep_draw", "stratified", "--log_every", 1),
    *("--curriculum", "difficulty", "--curriculum_clusters", 4, "--curriculum_patience", 1),
    *("--curriculum_max_share", 9, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 4),
    "--cache_text_embeddings",
)


def with_laws(folder: Path, bench: Bench, toys: Path, **args: object) -> Path:
    law = {"timestep_sampler": "loss_second_moment", "timestep_sampler_args": LEARNED | args}
    rows = [
        {"train_data_dir": str(bench.images), "max_train_samples": 4},
        {"train_data_dir": str(toys), "instance_prompt": "a sks toy", "repeats": 2} | law,
    ]
    return write_json(folder / "laws.json", rows)


@contextmanager
def captions_noted(bench: Bench) -> Iterator[list[str]]:
    """The captions of all samples, in the order of their slots."""
    step, captions = bench.module.training_step, list[str]()

    def stepped(run: Any, number: int, slots: Any, batch: dict[str, Any]) -> Any:
        captions.extend(batch["caption"])
        return step(run, number, slots, batch)

    with mock.patch.object(bench.module, "training_step", stepped):
        yield captions


def test_a_curriculum_and_a_law_that_learns_have_their_own_samples(
    bench: Bench, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, whole = with_laws(tmp_path, bench, toys), tmp_path / "whole"
    with captions_noted(bench) as captions:
        run = train(argv(bench, config, whole, *CURRICULUM, "--max_train_steps", STEPS))

    # each slot is drawn as its law alone would, which saw the losses of its own samples
    config_of_run = json.loads(
        (whole / "timestep_sampler" / "timestep_sampler_config.json").read_text()
    )
    assert config_of_run["of_source"] == [0, 1]
    laws = [TimestepSampler.from_config(law) for law in config_of_run["laws"]]
    ours = torch.tensor([caption == "a sks toy" for caption in captions]).reshape(STEPS, 4)
    assert 0 < int(ours.sum()) < ours.numel()
    for step, of_toys in zip(run.steps, ours, strict=True):
        indices, losses = torch.tensor(step.indices), torch.tensor(step.losses)
        for law, own in zip(laws, (~of_toys, of_toys), strict=True):
            drawn = law.sample(Slots(0, 4, 4), step=step.step).indices
            assert drawn[own].equal(indices[own])
            if own.any():
                law.observe(indices[own], losses[own], step.step)
    for law, part in zip(laws, run.last.sampler.parts, strict=True):
        torch.testing.assert_close(part.state_dict(), law.state_dict(), rtol=0, atol=0)
    assert laws[0].stage(STEPS) > 1
    assert laws[1].metrics()["law_is_learned"] > 0

    # all of them are told
    logged = dict(run.logged)[STEPS]
    assert {"curriculum/stage", "source2/sampler/law_is_learned"} <= logged.keys()
    assert "Timesteps of source2" in (whole / "README.md").read_text()
    facts = json.loads((whole / "run.json").read_text())["facts"]
    assert facts["sampler"]["laws"][1]["_class_name"] == "LossSecondMomentTimestepSampler"

    # stopped and resumed: no bit differs; another law is refused
    parts, more = tmp_path / "parts", (*CURRICULUM, "--max_train_steps")
    train(argv(bench, config, parts, *more, 4))
    rest = train(argv(bench, config, parts, *more, STEPS, "--resume_from_checkpoint", "latest"))
    assert rest.steps == run.steps[4:]
    other = with_laws(tmp_path, bench, toys, bins=5)
    resumed = (*more, STEPS + 1, "--resume_from_checkpoint", "latest")
    capsys.readouterr()
    assert status(argv(bench, other, parts, *resumed)) == 2
    assert "sampler.laws.1.bins is 5, was 2" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_draw_and_learn_as_one(bench: Bench, toys: Path, tmp_path: Path) -> None:
    config = with_laws(tmp_path, bench, toys)
    flags = [flag for flag in CURRICULUM if flag != "--cache_text_embeddings"]
    words = argv(bench, config, tmp_path / "two", *flags, "--max_train_steps", 6)
    one = [*words, "--output_dir", str(tmp_path / "one"), "--train_batch_size", "4"]
    launch([{"name": "two", "argv": words, "skew": False}], tmp_path)
    with witnessed() as alone:
        train(one, pictures=True)
    assert {"timesteps.png", "timesteps_source2.png"} <= {*os.listdir(tmp_path / "one")}
    ranks = [json.loads((tmp_path / f"two.rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["states"] == ranks[1]["states"]
    assert together(ranks) == json.loads(json.dumps(alone.seen))


def test_every_law_is_shown(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"train_data_dir": "a"}, {"train_data_dir": "b", "timestep_sampler": "laplace"}]
    config = write_json(tmp_path / "data.json", rows)
    words = ["--pretrained_model_name_or_path", str(bench.pipeline), "--data_config", str(config)]
    file = tmp_path / "shown.json"
    assert status([*words, "--show_timesteps", str(file)]) == 0
    assert "source2: laplace" in capsys.readouterr().out
    assert json.loads(file.read_text())["title"] == "uniform, draw=iid, floor=0.1"
    own = json.loads((tmp_path / "shown_source2.json").read_text())
    assert own["title"] == "source2: laplace, draw=iid, floor=0.1"
    assert status([*words, "--show_timesteps", "terminal"]) == 0
    assert "source2: laplace" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("law", "more", "told"),
    [
        ({"timestep_sampler": "laplacian"}, (), "row 2: .*'laplacian'"),
        ({"timestep_sampler": "none.json"}, (), "row 2: .*none.json cannot be read"),
        ({"timestep_sampler": "laplace", "timestep_sampler_args": {"b": -1}}, (), "row 2: .*b=-1"),
        ({"timestep_sampler_args": {"b": 1}}, (), "row 2 has timestep_sampler_args, which has no"),
        (
            {"timestep_sampler": "laplace", "timestep_sampler_args": [1]},
            (),
            "give names and values",
        ),
        (
            {"timestep_sampler": "auto"},
            ("--loss_weighting", "uncertainty"),
            "row 2: --loss_weighting uncertainty evens out",
        ),
    ],
)
def test_a_law_that_cannot_be_is_refused(
    law: dict[str, Any], more: tuple[str, ...], told: str, bench: Bench, tmp_path: Path
) -> None:
    config = write_json(
        tmp_path / "d.json", [{"train_data_dir": "a"}, {"train_data_dir": "b"} | law]
    )
    words = argv(bench, config, tmp_path / "run", *more)
    task = TextToImage()
    with pytest.raises(UsageError, match=told):
        task.choose_levels(task.parse(words, machine=False), 0)


def test_a_law_that_nothing_is_drawn_from_is_refused(bench: Bench, tmp_path: Path) -> None:
    rows = [{"train_data_dir": "a", "timestep_sampler": "laplace"}]
    words = argv(bench, write_json(tmp_path / "data.json", rows), tmp_path)
    task = TextToImage()
    with pytest.raises(UsageError, match="--curriculum difficulty has no effect, as each row"):
        task.parse([*words, "--curriculum", "difficulty"], machine=False)
    # nor can one for several sources be drawn from where there are none
    task.choose_levels(task.parse(words, machine=False), 0).sampler.save_pretrained(str(tmp_path))
    file = tmp_path / "timestep_sampler_config.json"
    args = task.parse(bench.argv(tmp_path, "--timestep_sampler", file), machine=False)
    with pytest.raises(UsageError, match="holds a law for each of several sources"):
        task.choose_levels(args, 0)
