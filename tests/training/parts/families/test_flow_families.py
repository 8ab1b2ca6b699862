"""What families of flow matching say of themselves: captions, latents, shifts, what they refuse."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusers_curriculum.randomness import gaussian
from diffusers_curriculum.training.cache.filling import Processes
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.captions import CaptionEncoder, kept_captions
from diffusers_curriculum.training.tasks.flow import FlowTransformer
from examples.text_to_image.train_text_to_image_flow_curriculum import training_step
from tests.training.parts.families.flow_benches import FLOWS, RESOLUTION, pipeline_of
from tests.training.parts.families.test_flow_parity import CAPTIONS, SLOTS, make_run

each_family = pytest.mark.parametrize("name", FLOWS)


def choose(pipeline: Path, *more: object) -> FlowTransformer:
    """The task of a command line, once it has looked at the pipeline."""
    task = FlowTransformer()
    base = ("--pretrained_model_name_or_path", str(pipeline), "--dataset_name", "some/data")
    argv = [*base, "--resolution", str(RESOLUTION), *map(str, more)]
    args = task.parse(argv, machine=False)
    task.choose(args, 0)
    return task


def changed(name: str, folder: Path, part: str, **settings: object) -> Path:
    """The tiny pipeline of a family with other settings in the config of a part."""
    shutil.copytree(pipeline_of(name), folder)
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


# -- captions --------------------------------------------------------------------------------------


@each_family
def test_kept_captions_are_those_of_the_batch(name: str, tmp_path: Path) -> None:
    run = make_run(name)
    family, models, cpu = run.family, run.models, torch.device("cpu")
    expected = family.encode_text(models, {"caption": CAPTIONS})
    where = {"folder": tmp_path / "c", "processes": Processes(progress=False)}
    load = partial(CaptionEncoder, family, models, cpu)
    kept = CaptionEncoder(
        family, models, cpu, kept=kept_captions(CAPTIONS, load, fingerprint={}, **where)
    )
    models.encoders.clear()
    found = kept({"caption": CAPTIONS})
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        for ours, theirs in zip(found[key], value, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # of equal lengths no mask is left
    same = kept({"caption": ["a red bird"] * 2})
    assert "encoder_hidden_states_mask" not in same
    assert len(next(iter(same.values()))) == 2


@pytest.mark.parametrize("name", ["qwen_image", "sd3"])
def test_captions_that_are_encoded_together_are_told_as_alone(name: str, tmp_path: Path) -> None:
    run = make_run(name)
    family, models, cpu = run.family, run.models, torch.device("cpu")
    captions = ["a bird" * number for number in range(family.captions_at_once + 2)]
    calls, encode = list[int](), family.encode_text

    def counted(models: Any, tokens: Any) -> Any:
        calls.append(len(tokens["caption"]))
        return encode(models, tokens)

    where = {"folder": tmp_path / "c", "processes": Processes(progress=False)}
    load = partial(CaptionEncoder, family, models, cpu, counted)
    found = kept_captions(captions, load, fingerprint={}, **where)
    assert calls == [family.captions_at_once, 2]
    for caption in captions:
        with torch.no_grad():
            alone = encode(models, {"caption": [caption]})
        assert found[caption].keys() == alone.keys()
        for key, told in alone.items():
            torch.testing.assert_close(found[caption][key], told, atol=1e-5, rtol=1e-5)


def test_the_length_of_captions_is_taken_over() -> None:
    long = ["a small bird " * 9] * 3
    for name, shorter in (("flux", 20), ("sd3", 97), ("flux2", 20)):
        encoder = make_run(name, "--max_sequence_length", 20).captions
        assert encoder({"caption": long})["encoder_hidden_states"].shape[1] == shorter


@pytest.mark.parametrize(("name", "length"), [("sd3", 77), ("flux", 512), ("qwen_image", 512)])
def test_captions_are_counted_by_the_language_model(name: str, length: int) -> None:
    task = choose(pipeline_of(name))
    tokenizer, limit = task.family.caption_limit(task.args, task.tokenizers)
    assert (type(tokenizer).__name__.startswith("CLIP"), limit) == (False, length)
    task = choose(pipeline_of(name), "--max_sequence_length", 20)
    assert task.family.caption_limit(task.args, task.tokenizers)[1] == 20


def test_layers_of_flux2_are_taken_over(tmp_path: Path) -> None:
    states = make_run("flux2").captions({"caption": CAPTIONS})["encoder_hidden_states"]
    other = make_run("flux2", "--text_encoder_out_layers", 10, 20, 28).captions
    others = other({"caption": CAPTIONS})
    assert states.shape == others["encoder_hidden_states"].shape
    assert not torch.equal(states, others["encoder_hidden_states"])
    for layers in ((9, 18), (9, 18, 29)):
        with pytest.raises(UsageError, match="has 28 layers of 16 numbers a token"):
            choose(pipeline_of("flux2"), "--text_encoder_out_layers", *layers)


# -- levels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resolution", "shift"),
    [
        ("sd3", 16, 3.0),
        ("z_image", 16, 3.0),
        ("flux", 64, math.exp(0.5)),
        ("flux", 256, math.exp(1.15)),
        ("flux2", 256, math.exp(1.15)),
        ("qwen_image", 64, math.exp(0.5)),
        ("qwen_image", 256, math.exp(0.5 + 3840 * 0.4 / 7936)),
    ],
)
def test_the_shift_is_that_of_the_family(name: str, resolution: int, shift: float) -> None:
    # one token is 4 pixels of the tiny pipelines along one side
    task = choose(pipeline_of(name), "--resolution", resolution)
    assert task.levels.scheduler.config.shift == pytest.approx(shift)
    assert task.levels.objective.levels.shift == pytest.approx(shift, rel=1e-3)
    given = choose(pipeline_of(name), "--resolution", resolution, "--flow_shift", 2)
    assert given.levels.objective.levels.shift == pytest.approx(2)
    own = json.loads((pipeline_of(name) / "scheduler" / "scheduler_config.json").read_text())
    assert task.levels.inference.config.shift == own["shift"]  # pictures are drawn as before


def test_a_scheme_and_another_law_are_refused() -> None:
    flux, law = pipeline_of("flux"), ("--timestep_sampler", "laplace")
    with pytest.raises(UsageError, match="logit_normal and --timestep_sampler laplace both say"):
        choose(flux, "--weighting_scheme", "logit_normal", *law)
    weight = ("--loss_weighting", "min_snr")
    with pytest.raises(UsageError, match="cosmap and --loss_weighting min_snr both say"):
        choose(flux, "--weighting_scheme", "cosmap", *weight)
    assert choose(flux, "--weighting_scheme", "cosmap", *law).levels.weights is not None
    for flag, value in (("logit_mean", 1), ("logit_std", 2), ("mode_scale", 1)):
        with pytest.raises(UsageError, match=f"--{flag} is .* no effect without --weighting_sche"):
            choose(flux, f"--{flag}", value)
    with pytest.raises(UsageError, match=r"--mode_scale is 1\.8: it must be from -1 to 1\.75"):
        choose(flux, "--weighting_scheme", "mode", "--mode_scale", 1.8)


def test_a_scheme_is_drawn_without_a_floor() -> None:
    told = ("--weighting_scheme", "logit_normal", "--logit_mean", 0.5, "--logit_std", 0.5)
    law = choose(pipeline_of("flux"), *told).levels.sampler.probabilities()
    tau = torch.arange(1001, dtype=torch.float64) / 1000
    cdf = torch.special.ndtr((torch.logit(tau) + 0.5) / 0.5)
    torch.testing.assert_close(law.double(), cdf.diff(), atol=1e-12, rtol=1e-9)


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part", "settings", "told"),
    [
        ("sd3", "transformer", {"in_channels": 16}, "in_channels is 16, and its vae's latents"),
        (
            "sd3",
            "text_encoder_3",
            {"d_model": 48},
            "joint_attention_dim is 32, and its T5 gives 48",
        ),
        ("flux", "text_encoder", {"hidden_size": 8}, "pooled_projection_dim is 16, and its CLIP"),
        ("flux", "vae", {"latent_channels": 16}, "in_channels is 16, and patches .* have 64"),
        ("flux2", "vae", {"latent_channels": 32}, "in_channels is 16, and patches .* have 128"),
        ("qwen_image", "vae", {"z_dim": 16}, "in_channels is 16, and patches .* have 64"),
        ("z_image", "text_encoder", {"hidden_size": 8}, "cap_feat_dim is 16, and its text_encoder"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, part: str, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=f"cannot be trained by this script: .*{told}"):
        choose(changed(name, tmp_path / "pipeline", part, **settings))


@each_family
def test_a_side_that_makes_half_patches_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--resolution is 18: the pipeline takes multiples of 4"):
        choose(pipeline_of(name), "--resolution", 18)


def test_another_pipeline_is_refused(tmp_path: Path) -> None:
    shutil.copytree(pipeline_of("flux"), tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"FluxFillPipeline"'))
    with pytest.raises(UsageError, match="is a FluxFillPipeline, and this script trains one of Fl"):
        choose(tmp_path / "other")


# -- half precision --------------------------------------------------------------------------------


def test_flux2_normalises_latents_by_unrounded_numbers() -> None:
    task = choose(pipeline_of("flux2"))
    vae = task.family.load_part(task.args, "vae", torch.bfloat16)
    stored = load_file(pipeline_of("flux2") / "vae" / "diffusion_pytorch_model.safetensors")
    assert vae.dtype == torch.bfloat16
    assert torch.equal(vae.bn.running_mean, stored["bn.running_mean"])
    assert vae.bn.running_var.dtype == torch.float32


@each_family
def test_frozen_parts_in_half_precision(name: str) -> None:
    run = make_run(name)
    task, half = choose(pipeline_of(name)), torch.bfloat16
    models = run.family.load_components(run.args, task.tokenizers, run.accelerator.device, half)
    run.models, run.network = models, models.network
    run.captions = CaptionEncoder(run.family, models, run.accelerator.device)
    pixels = gaussian((3, RESOLUTION, RESOLUTION), seed=1, step=0, slots=SLOTS, purpose="noise")
    with torch.autocast("cpu", half):
        outcome = training_step(run, 0, SLOTS, {"pixel_values": pixels, "caption": CAPTIONS})
    assert math.isfinite(float(outcome.loss))
    assert all(p.dtype == torch.float32 for p in models.network.parameters())
    assert {p.dtype for part in models.encoders.values() for p in part.parameters()} == {half}
