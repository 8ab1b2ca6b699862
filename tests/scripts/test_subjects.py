"""One prompt, class images and masks, in every text-to-image script: what is told, how losses are
shared out, what is resumed, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusers_curriculum.objective import Objective
from diffusers_curriculum.training.tasks.flow import FlowRun
from tests.scripts.small_runs import BENCHES, Bench, finite, status
from tests.training.parts.families.flow_benches import pipeline_of

UNTOLD = ("class_conditional", "unconditional", "image_tokens")  # have no prompts
SCRIPTS = [name for name in BENCHES if name not in UNTOLD]
STEPS, WEIGHT = 3, 0.5
CLASS_PROMPT = "picture of a toy"


@dataclass
class Seen:
    """What a micro-batch was given, and what came of it."""

    slots: Any
    batch: dict[str, Any]
    drawn: Any
    weights: Tensor
    prediction: Tensor
    target: Tensor
    outcome: Any


def subject_bench(name: str, folder: Path) -> Bench:
    """A script, and a folder of images without captions, of which the left half is opaque."""
    bench = BENCHES[name](folder / "bench")
    if name == "flow":
        bench = replace(bench, pipeline=pipeline_of("sd3"))
    images = folder / "subject"
    images.mkdir()
    draw = np.random.default_rng(0)
    for number in range(5):
        pixels = draw.integers(0, 256, (16, 16, 4), dtype=np.uint8)
        pixels[:, :8, 3], pixels[:, 8:, 3] = 255, 0
        Image.fromarray(pixels).save(images / f"{number}.png")
    return replace(bench, images=images, more=(*bench.more, "--report_to", "none"))


@pytest.fixture(scope="module", params=SCRIPTS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return subject_bench(request.param, tmp_path_factory.mktemp("subject"))


@contextmanager
def watched(bench: Bench) -> Iterator[list[Seen]]:
    """Note every micro-batch."""
    step, seen = bench.module.training_step, list[Seen]()
    kind: Any = FlowRun if "flow" in bench.script else Objective
    loss = kind.loss

    def stepped(run: Any, number: int, slots: Any, batch: dict[str, Any]) -> Any:
        noted: dict[str, Any] = {}
        sample = run.sampler.sample

        def sampled(*args: Any, **options: Any) -> Any:
            noted["drawn"] = sample(*args, **options)
            return noted["drawn"]

        def compared(self: Any, prediction: Tensor, target: Tensor, *more: Any) -> Any:
            noted.update(prediction=prediction.detach(), target=target)
            return loss(self, prediction, target, *more)

        with (
            mock.patch.object(run.sampler, "sample", sampled),
            mock.patch.object(kind, "loss", compared),
        ):
            outcome = step(run, number, slots, batch)
        weights = run.levels.loss_weights(noted["drawn"])
        seen.append(Seen(slots=slots, batch=batch, weights=weights, outcome=outcome, **noted))
        return outcome

    with mock.patch.object(bench.module, "training_step", stepped):
        yield seen


def told(batch: dict[str, Any]) -> list[Any]:
    """What each sample is told, as something that can be compared."""
    if "caption" in batch:
        return batch["caption"]
    return [tuple(ids.tolist()) for ids in batch["input_ids"]]


# -- prior preservation ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preserving(bench: Bench) -> tuple[object, ...]:
    return (
        *("--instance_prompt", "a sks toy", "--with_prior_preservation"),
        *("--class_data_dir", bench.images.parent / "class", "--class_prompt", CLASS_PROMPT),
        *("--num_class_images", 3, "--sample_batch_size", 2, "--prior_loss_weight", WEIGHT),
        *("--timestep_sampler", "laplace", "--importance_correction", "0.5"),
        *("--loss_weighting", "min_snr", "--lr_warmup_steps", 0, "--max_train_steps", STEPS),
    )


def test_class_images_are_drawn_and_trained_on_with_their_own_weights(
    bench: Bench, preserving: tuple[object, ...], tmp_path: Path
) -> None:
    own = bench.images.parent / "class"
    own.mkdir()
    Image.new("RGB", (20, 20), "red").save(own / "here.png")  # one is there, two are drawn
    with watched(bench) as seen:
        whole = bench.train(tmp_path / "whole", *preserving)
    assert finite(whole)
    drawn = {path.name: path.read_bytes() for path in own.iterdir()}
    assert {*drawn} == {"here.png", "00000.png", "00001.png"}
    assert drawn["00000.png"] != drawn["00001.png"]

    # each sample is followed by a class image, with draws and weights of its own
    for each in seen:
        prompts, losses = told(each.batch), each.outcome.losses
        assert (each.slots.count, each.slots.total, len(losses)) == (4, 4, 4)
        assert prompts[0] == prompts[2] != prompts[1] == prompts[3]
        assert len(set(each.drawn.indices.tolist())) == 4
        weighted = each.weights * losses
        expected = weighted[::2].mean() + WEIGHT * weighted[1::2].mean()
        torch.testing.assert_close(each.outcome.loss[0], expected.float(), rtol=1e-5, atol=0)
        assert each.outcome.indices.equal(each.drawn.indices)

    # stopped and resumed: no image is drawn again, and no bit differs
    stopped = (*preserving, "--max_train_steps", 1, "--checkpointing_steps", 1)
    bench.train(tmp_path / "parts", *stopped)
    rest = bench.train(tmp_path / "parts", *preserving, "--resume_from_checkpoint", "latest")
    assert rest.losses == whole.losses[1:]
    assert drawn == {path.name: path.read_bytes() for path in own.iterdir()}


def test_a_resumed_run_has_the_same_class_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, own = subject_bench("text_to_image", tmp_path), tmp_path / "class"
    alone = ("--instance_prompt", "a sks toy", "--max_train_steps", 1, "--checkpointing_steps", 1)
    prior = (
        *("--with_prior_preservation", "--class_data_dir", own, "--class_prompt", "a toy"),
        *("--num_class_images", 2, "--sample_batch_size", 1),
    )
    output = tmp_path / "run"
    bench.train(output, *alone, *prior)
    resumed = ("--resume_from_checkpoint", "latest", "--max_train_steps", 2)

    def refused(*more: object) -> str:
        capsys.readouterr()
        assert status(bench.argv(output, *alone, *more, *resumed), bench.script) == 2
        return capsys.readouterr().err

    assert "prior_loss_weight is 2.0, was 1.0" in refused(*prior, "--prior_loss_weight", 2)
    assert "digest of captions" in refused(*prior, "--class_prompt", "another toy")
    assert "digest of captions" in refused()
    # one that is missing is drawn as it was: the run goes on
    image = own / "00001.png"
    before = image.read_bytes()
    image.unlink()
    bench.train(output, *alone, *prior, *resumed)
    assert image.read_bytes() == before


# -- masks -----------------------------------------------------------------------------------------


def test_a_mask_weighs_the_places_of_its_sample(bench: Bench, tmp_path: Path) -> None:
    more = ("--instance_prompt", "a sks toy", "--mask_from_alpha", "--unmasked_weight", 0.25)
    more += ("--lr_warmup_steps", 0, "--max_train_steps", 1, "--random_flip", "--snr_gamma", 5)
    with watched(bench) as seen:
        assert finite(bench.train(tmp_path / "run", *more))
    (each,) = seen
    squares = (each.prediction.float() - each.target.float()).square().mean(1)
    side, mask = squares.shape[-1], each.batch["mask"][:, 0]
    assert {*mask.unique().tolist()} == {0.25, 1.0}
    assert {tuple(row) for row in mask[:, 0, [0, -1]].tolist()} <= {(0.25, 1.0), (1.0, 0.25)}
    places = mask.reshape(len(mask), side, mask.shape[1] // side, side, -1).mean((2, 4))
    expected = (places * squares).sum((1, 2)) / places.sum((1, 2))
    torch.testing.assert_close(each.outcome.losses, expected, rtol=1e-5, atol=0)
    weighted = (each.weights * expected).mean()
    torch.testing.assert_close(each.outcome.loss[0], weighted.float(), rtol=1e-5, atol=0)


def test_a_resumed_run_has_the_same_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, masks = subject_bench("text_to_image", tmp_path), tmp_path / "subject" / "masks"
    masks.mkdir()
    lines = []
    for path in sorted(bench.images.glob("*.png")):
        with Image.open(path) as image:
            image.getchannel("A").save(masks / path.name)
        lines.append({"file_name": path.name, "mask_file_name": f"masks/{path.name}"})
    metadata = bench.images / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, lines)))
    more = ("--instance_prompt", "a sks toy", "--mask_column", "mask", "--lr_warmup_steps", 0)
    more += ("--checkpointing_steps", 1, "--max_train_steps")
    assert finite(bench.train(tmp_path / "run", *more, 1))
    resumed = (*more, 2, "--resume_from_checkpoint", "latest")
    told = bench.argv(tmp_path / "run", *resumed, "--unmasked_weight", 0.5)
    assert status(told, bench.script) == 2
    assert "objective.unmasked_weight is 0.5, was 0.0" in capsys.readouterr().err
    Image.new("L", (16, 16), "white").save(masks / "0.png")
    assert status(bench.argv(tmp_path / "run", *resumed), bench.script) == 2
    assert "dataset.masks is" in capsys.readouterr().err


# -- several captions ------------------------------------------------------------------------------


def test_an_image_with_several_captions_is_told_another_each_time(
    bench: Bench, tmp_path: Path
) -> None:
    phrasings = ["picture", "number 1 of a picture"]
    names = sorted(path.name for path in bench.images.glob("*.png"))
    lines = [json.dumps({"file_name": name, "text": phrasings}) for name in names]
    several = tmp_path / "images"
    several.mkdir()
    for name in names:
        (several / name).write_bytes((bench.images / name).read_bytes())
    (several / "metadata.jsonl").write_text("\n".join(lines))
    other = replace(bench, images=several)
    with watched(other) as seen:
        other.train(tmp_path / "run", "--lr_warmup_steps", 0, "--max_train_steps", STEPS)
    assert len({prompt for each in seen for prompt in told(each.batch)}) == 2
