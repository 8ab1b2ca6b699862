"""Pipelines whose parts do not fit are told from their configs, before data and weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, DDPMWuerstchenScheduler, IPNDMScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from diffusers_curriculum.models.tiny import TinySizes, make_tiny_pipeline
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts import components
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from tests.training.command_lines import parse_args

SIZES = TinySizes((8, 8), (8, 8), text_width=8, text_length=8, groups=4)
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minuscule pipeline."""
    folder = tmp_path_factory.mktemp("fit") / "pipeline"
    make_tiny_pipeline(None, folder, resolution=8, vae_steps=0, sizes=SIZES)
    return folder


@pytest.fixture
def copied(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change; its weights may not be loaded."""
    monkeypatch.setattr(components, "load_whole", lambda *a, **k: pytest.fail("loaded"))
    return Path(shutil.copytree(pipeline, tmp_path / "copy"))


def arguments(folder: Path, *more: str) -> Arguments:
    return parse_args(["--pretrained_model_name_or_path", str(folder), *more], machine=False)


def choose(folder: Path, *more: str) -> TextToImage:
    """What a run does before it looks at its data."""
    task = TextToImage()
    line = ["--pretrained_model_name_or_path", str(folder), *more]
    task.choose(task.parse(line, machine=False), 0)
    return task


def edited(name: str, **changes: Any) -> Change:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _longer_vocabulary(folder: Path) -> None:
    tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<mine>", "<yours>"])
    tokenizer.save_pretrained(folder / "tokenizer")


def _without(*names: str) -> Change:
    def remove(folder: Path) -> None:
        path = folder / "model_index.json"
        kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in names}
        path.write_text(json.dumps(kept | {"_class_name": "WuerstchenDecoderPipeline"}))

    return remove


UNET, ENCODER, INDEX = "unet/config.json", "text_encoder/config.json", "model_index.json"
MISFITS: dict[str, tuple[Change, str]] = {
    "inpainting": (edited(UNET, in_channels=9), "unet takes 9 channels, and its vae's .* have 4"),
    "variance": (edited(UNET, out_channels=8), "unet gives 8 channels, and its vae's .* have 4"),
    "latents": (edited("vae/config.json", latent_channels=16), "takes 4 .* have 16"),
    "width": (
        edited(UNET, cross_attention_dim=16),
        "cross_attention_dim is 16, and its text_encoder gives 8",
    ),
    "widths": (edited(UNET, cross_attention_dim=[8, 16]), r"cross_attention_dim is \[8, 16\]"),
    "projection": (edited(UNET, encoder_hid_dim=32), "encoder_hid_dim is 32, .* gives 8"),
    "sdxl": (edited(UNET, addition_embed_type="text_time"), "addition_embed_type is 'text_time'"),
    "image": (edited(UNET, encoder_hid_dim_type="image_proj"), "encoder_hid_dim_type is 'image"),
    "classes": (edited(UNET, num_class_embeds=10), "num_class_embeds is 10: it wants more"),
    "embedding": (edited(UNET, class_embed_type="timestep"), "class_embed_type is 'timestep'"),
    "bert": (edited(ENCODER, model_type="bert"), "text_encoder/config.json is one of 'bert'"),
    "t5": (
        edited(INDEX, text_encoder=["transformers", "T5EncoderModel"]),
        "its text_encoder is a T5EncoderModel, and this script takes a CLIPTextModel",
    ),
    "wuerstchen": (_without("unet", "vae"), "WuerstchenDecoderPipeline, .* it has no unet and no"),
    "length": (
        edited("tokenizer/tokenizer_config.json", model_max_length=77),
        "model_max_length is 77, and its text_encoder has 8 positions: write 8",
    ),
    "tokens": (_longer_vocabulary, r"\d+ tokens, and its text_encoder embeddings for \d+"),
    "contradiction": (
        edited("vae/config.json", _class_name="VQModel"),
        "vae is a AutoencoderKL in model_index.json, and a VQModel in vae/config.json",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_parts_that_do_not_fit(copied: Path, name: str) -> None:
    change, told = MISFITS[name]
    choose(copied)
    change(copied)
    with pytest.raises(UsageError, match=f"(?s)--pretrained_model_name_or_path .*{told}") as error:
        choose(copied)
    assert "\n" not in str(error.value)


def test_all_faults_are_told_at_once(copied: Path) -> None:
    edited(UNET, in_channels=9, num_class_embeds=3)(copied)
    with pytest.raises(UsageError, match=r"takes 9 .*; its unet's num_class_embeds is 3"):
        choose(copied)


def test_a_pipeline_newer_than_diffusers_is_told(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families()["sd"], "since", "99.1", raising=False)
    told = f"needs diffusers 99.1 or newer, and {diffusers.__version__} is installed"
    with pytest.raises(UsageError, match=re.escape(told)):
        choose(copied)


@pytest.mark.parametrize(
    "change",
    [
        edited(UNET, cross_attention_dim=[8, 8]),
        edited(UNET, addition_embed_type="text"),
        edited(INDEX, tokenizer=["transformers", "CLIPTokenizerFast"]),
        edited(ENCODER, model_type="clip", text_config={"hidden_size": 8, "vocab_size": 1024}),
    ],
)
def test_what_fits_is_not_refused(copied: Path, change: Change) -> None:
    change(copied)
    choose(copied)


# -- variants --------------------------------------------------------------------------------------


def add_variant(folder: Path, part: str, variant: str) -> None:
    """Save a part once more, with all numbers doubled, as a variant."""
    (plain,) = (folder / part).glob("*.safetensors")
    doubled = {name: 2 * tensor for name, tensor in load_file(plain).items()}
    save_file(doubled, plain.with_name(f"{plain.stem}.{variant}.safetensors"), {"format": "pt"})


def test_a_variant_that_is_not_there_is_told_with_those_that_are(copied: Path) -> None:
    with pytest.raises(UsageError, match=r"--variant fp16: no weights of .* are of it: leave it"):
        choose(copied, "--variant", "fp16")
    add_variant(copied, "unet", "non_ema")
    with pytest.raises(UsageError, match=r"--variant fp16: .* give non_ema, or leave it out"):
        choose(copied, "--variant", "fp16")


def test_a_variant_that_only_the_unet_has(pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "copy"))
    add_variant(folder, "unet", "non_ema")
    args = arguments(folder, "--variant", "non_ema")
    choose(folder, "--variant", "non_ema")
    cpu, family = torch.device("cpu"), families()["sd"]
    models, plain = (
        family.load_components(each, {}, cpu, torch.float32) for each in (args, arguments(folder))
    )
    pairs = zip(models.network.parameters(), plain.network.parameters(), strict=True)
    assert all(torch.equal(ours, 2 * theirs) for ours, theirs in pairs)
    pairs = zip(models.vae.parameters(), plain.vae.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


# -- schedulers ------------------------------------------------------------------------------------


def with_scheduler(folder: Path, scheduler: Any) -> Path:
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    edited(INDEX, scheduler=["diffusers", type(scheduler).__name__])(folder)
    return folder


@pytest.mark.parametrize("kind", [IPNDMScheduler, DDPMWuerstchenScheduler])
def test_a_scheduler_without_a_table_is_told(copied: Path, kind: Any) -> None:
    with pytest.raises(UsageError, match=f"{kind.__name__} shows no table of training noise"):
        choose(with_scheduler(copied, kind()))


def test_the_class_of_the_scheduler_is_that_of_the_index(copied: Path) -> None:
    edited(INDEX, scheduler=["diffusers", "DDIMScheduler"])(copied)
    task = choose(copied)
    assert type(task.levels.inference).__name__ == "DDIMScheduler"
    assert type(task.levels.scheduler) is DDPMScheduler
