"""The second stage of ViT-VQGAN: codes in raster order, with a law over their positions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffusers_curriculum.models.code_space import CodeSpace
from diffusers_curriculum.models.image_tokens import ImageTokenTransformer
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.pipelines import ImageTokenPipeline
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.evaluation import evaluator
from diffusers_curriculum.training.tasks.image_tokens import ImageTokenRun, ImageTokens
from tests.metrics.tiny_networks import save
from tests.scripts.image_runs import write_class_folders
from tests.scripts.small_runs import (
    NO_DROPOUT,
    Bench,
    hashes,
    make_token_bench,
    recorded,
    status,
    tiny_vit_vq,
)

SPLIT = ("--validation_split", 0.3)
CURRICULUM = ("--curriculum", "difficulty", "--curriculum_clusters", 4)
CURRICULUM += ("--curriculum_pacing", "fixed", "--curriculum_stage_steps", 2)
CURRICULUM += ("--curriculum_max_share", 1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return make_token_bench(tmp_path_factory.mktemp("bench"))


def unconditional(bench: Bench, output: Path, *more: object) -> list[str]:
    """A command line without classes."""
    argv = bench.argv(output, *more)
    argv.remove("--class_conditional")
    return argv


def load_pipeline(folder: Path) -> Any:
    pipeline: Any = ImageTokenPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refusal(bench: Bench, folder: Path, *more: object) -> str:
    with pytest.raises(UsageError) as error:
        ImageTokens().parse(bench.argv(folder, *more))
    return str(error.value)


def test_it_learns_the_codes(bench: Bench, tmp_path: Path) -> None:
    held_out = (*SPLIT, "--validation_loss_steps", 60)
    more = ("--max_train_steps", 60, "--cache_latents", "--use_ema", "--ema_decay", 0.9)
    with recorded() as record:
        bench.module.main(bench.argv(tmp_path, *more, *held_out, batch=6))
    losses = [float.fromhex(step.loss) for step in record.steps]
    assert abs(losses[0] - math.log(16)) < 0.1  # nothing is known at first
    assert losses[-1] < losses[0] - 0.3
    lines = (tmp_path / "validation_loss.jsonl").read_text().splitlines()
    first, last = (json.loads(line) for line in lines)
    assert last["raw"] < first["raw"] - 0.3
    assert last["ema_bits"] == pytest.approx(last["ema"] / math.log(2))
    parts = [v for k, v in last.items() if k.startswith("raw/from_position_")]
    assert len(parts) == 8
    assert np.mean(parts) == pytest.approx(last["raw"])
    # of the codes themselves, one image by one
    pipeline = load_pipeline(tmp_path)
    with torch.no_grad():
        expected = np.mean(
            [
                float(cross_entropy(pipeline.transformer(codes[:, :-1], label).logits[0], codes[0]))
                for codes, label in held_out_codes(bench, pipeline)
            ]
        )
    assert last["ema"] == pytest.approx(expected, abs=1e-4)


def held_out_codes(bench: Bench, pipeline: Any) -> list[tuple[Tensor, Tensor]]:
    """Codes (1, N) and class (1,) of each image, cropped in the middle."""
    space = CodeSpace.of(LatentSpace.of(pipeline.vae))
    task = ImageTokens()
    args = task.args = task.parse(bench.argv(bench.images, "--center_crop", *SPLIT))
    task.load_rows(args, 0)
    rows = task.held_out
    read = evaluator.training_images(rows, task.transform(args))
    labels = rows["label"]
    return [
        (space.encode(read([n]) * 2 - 1).flatten(1), torch.tensor([labels[n]]))
        for n in range(len(rows))
    ]


def test_an_autoencoder_is_loaded_where_something_is_left_for_it(
    bench: Bench, tmp_path: Path, loaded: list[torch.dtype]
) -> None:
    kept, losses = ("--cache_latents", "--latent_cache_dir", tmp_path / "codes"), []
    for name, counted, more in (
        ("first", 1, []),  # to make the codes
        ("again", 0, []),
        ("drawn", 2, ["--validation_steps", 1]),  # on the way, and at the end
    ):
        argv = bench.argv(tmp_path / name, "--max_train_steps", 2, *kept, *more)
        if more:
            argv.remove("--no_pictures")
        loaded.clear()
        with recorded() as record:
            bench.module.main(argv)
        assert len(loaded) == counted
        losses.append(record.losses)
    assert losses[0] == losses[1] == losses[2]
    images = [
        load_pipeline(tmp_path / name)([0, 1], generator=torch.Generator().manual_seed(1)).images[0]
        for name in ("first", "again")
    ]
    assert images[0].tobytes() == images[1].tobytes()


def test_dropout_is_resumed_bit_for_bit(bench: Bench, tmp_path: Path) -> None:
    network = ("--model_args", "n_layer=1", "n_embd=8", "n_head=2")  # drops a tenth by default
    more = (*network, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    losses = {}
    for name, stops in (("straight", [4]), ("resumed", [2, 4]), ("without", [4])):
        losses[name] = []
        for stop in stops:
            own = () if name == "without" else more
            argv = bench.argv(tmp_path / name, "--max_train_steps", stop, *own)
            with recorded() as record:
                bench.module.main(argv)
            losses[name] += record.losses
    assert losses["resumed"] == losses["straight"] != losses["without"]


def test_codes_are_kept(bench: Bench, tmp_path: Path) -> None:
    encode, losses = ImageTokenRun.codes, []
    for name, more in (("kept", ["--cache_latents"]), ("encoded", [])):
        encoded: list[bool] = []

        def noting(run: Any, batch: Any) -> Tensor:
            encoded.append("pixel_values" in batch)  # noqa: B023
            return encode(run, batch)

        argv = unconditional(bench, tmp_path / name, "--max_train_steps", 9, "--center_crop")
        with mock.patch.object(ImageTokenRun, "codes", noting), recorded() as record:
            bench.module.main([*argv, *more])
        assert encoded == [name == "encoded"] * 9
        losses.append(record.losses)
    assert losses[0] == losses[1]


def test_a_law_weighs_the_positions_and_a_curriculum_leaves_some_out(
    bench: Bench, tmp_path: Path
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    loss = ImageTokenRun.loss

    def noting(run: Any, logits: Tensor, codes: Tensor, weights: Tensor) -> Any:
        seen.append((codes, weights))
        return loss(run, logits, codes, weights)

    law = ("--timestep_sampler", "logit_normal", "--timestep_floor", 0.2)
    with mock.patch.object(ImageTokenRun, "loss", noting), recorded() as record:
        bench.module.main(bench.argv(tmp_path, *law, *CURRICULUM, "--max_train_steps", 8))
    sampler = record.last.sampler
    for step, (codes, weights) in enumerate(seen):
        mass = sampler.probabilities(step).flip(0)  # position 0 is the noisiest level
        known = int((mass > 0).sum())
        assert codes.shape[1] == len(weights) == known
        assert torch.allclose(weights.double(), mass[:known], atol=1e-7)
        assert len(record.steps[step].indices) == 2 * known
        assert record.steps[step].indices[:2] == (63, 62)
    lengths = [len(weights) for _, weights in seen]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == 64
    losses = np.array(record.steps[-1].losses).reshape(2, 64)
    weighed = (losses * seen[-1][1].numpy()).sum(1).mean()
    assert float.fromhex(record.losses[-1]) == pytest.approx(weighed, rel=1e-5)


def test_two_runs_leave_the_same_pipeline_which_a_third_goes_on_from(
    bench: Bench, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        bench.module.main(bench.argv(tmp_path / name, "--max_train_steps", 3))
    first = tmp_path / "first"
    assert hashes(first / "transformer") == hashes(tmp_path / "second" / "transformer")
    modules = {str(path.relative_to(first)) for path in first.rglob("*.py")}
    assert modules == {"pipeline.py", "transformer/image_tokens.py", "vae/vit_vq.py"}
    images = [
        load_pipeline(tmp_path / n)(
            [0, 1], generator=torch.Generator().manual_seed(1), output_type="np"
        )
        for n in ("first", "second")
    ]
    assert np.array_equal(images[0].images, images[1].images)
    argv = bench.argv(tmp_path / "third", "--max_train_steps", 2)
    at = argv.index("--pretrained_vae_model_name_or_path")
    argv[at : at + 2] = ["--pretrained_model_name_or_path", str(first)]
    at = argv.index("--model_args")
    del argv[at : at + 4 + len(NO_DROPOUT)]
    with recorded() as record:
        bench.module.main(argv)
    assert len(record.steps) == 2
    network: Any = ImageTokenTransformer.from_pretrained(first / "transformer")
    assert record.last.weights.config["model_args"] == network.config["model_args"]


def test_a_probe_and_metrics_are_computed(bench: Bench, tmp_path: Path) -> None:
    write_class_folders(tmp_path / "images", ("a", "b"), each=12)
    vit = tiny_vit_vq()
    vit.save_pretrained(tmp_path / "vit")
    argv = unconditional(bench, tmp_path / "run", "--max_train_steps", 2, "--eval_steps", 1)
    argv[argv.index("--train_data_dir") + 1] = str(tmp_path / "images")
    argv += ["--pretrained_vae_model_name_or_path", str(tmp_path / "vit")]
    argv += ["--validation_split", "0.4", "--eval_metrics", "linear_probe", "precision_recall"]
    argv += ["--eval_samples", "8", "--eval_feature_model", str(tmp_path / "vision")]
    save("vit_bare", tmp_path / "vision")
    bench.module.main(argv)
    told = (tmp_path / "run" / "linear_probe.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in told]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 0 <= line["features"] <= 1
        assert line["pixels"] == lines[0]["pixels"]
    told = (tmp_path / "run" / "eval_metrics.jsonl").read_text().splitlines()
    assert {"precision", "recall", "temperature"} <= json.loads(told[-1]).keys()
    assert "linear_probe" not in json.loads(told[-1])


def test_pictures_are_drawn_as_asked(bench: Bench, tmp_path: Path) -> None:
    argv = bench.argv(tmp_path, "--max_train_steps", 1, "--top_k", 1, "--guidance_scale", 2)
    argv.remove("--no_pictures")
    with mock.patch.object(ImageTokenPipeline, "__call__", autospec=True) as call:
        call.side_effect = RuntimeError("drawn")
        with pytest.raises(RuntimeError, match="drawn"):
            bench.module.main(argv)
    given = call.call_args.kwargs
    assert (given["top_k"], given["temperature"], given["guidance_scale"]) == (1, 1.0, 2.0)
    assert "top_p" not in given


def test_what_cannot_be_is_refused(bench: Bench, tmp_path: Path) -> None:
    refused = (
        (("--eval_metrics", "linear_probe", "--eval_steps", 1), "samples that are kept apart"),
        (("--timestep_sampler", "laplace", "--data_scale", "auto"), "codes have no scale"),
        (("--cache_latents", "--latent_cache_dtype", "float16"), "rounds the numbers of codes"),
        (("--timestep_sampler", "auto"), "derived for the errors of a denoiser"),
        (("--top_p", 0), "--top_p is 0"),
        (("--temperature", -1), "--temperature is -1"),
        (("--eval_batch_size", 3), "drop --no_pictures)"),
        (("--pretrained_model_name_or_path", bench.images), "no effect without a fresh network"),
    )
    for more, told in refused:
        assert told in refusal(bench, tmp_path, *more)
    argv = bench.argv(tmp_path)
    at = argv.index("--pretrained_vae_model_name_or_path")
    del argv[at : at + 2]
    with pytest.raises(ValueError, match="name the autoencoder"):
        ImageTokens().parse(argv)


def test_an_autoencoder_without_codes_is_refused(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoencoderKL(sample_size=8).save_pretrained(tmp_path / "kl")
    argv = bench.argv(tmp_path / "run", "--pretrained_vae_model_name_or_path", tmp_path / "kl")
    assert status(argv, bench.script) == 2
    assert "AutoencoderKL has no codebook" in capsys.readouterr().err
    argv = bench.argv(tmp_path / "run", "--model_args", "n_layr=2")
    assert status(argv, bench.script) == 2
    assert "gpt2 has no such setting" in capsys.readouterr().err
