"""No part of a model is left at random: what is loaded is whole and of its class, or refused."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, VQModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from diffusers_curriculum.models.loading import load_pipeline
from diffusers_curriculum.models.networks import build_network
from diffusers_curriculum.models.vit_vq import ViTVQModel
from diffusers_curriculum.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from diffusers_curriculum.training.loop import job
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.process import runtime
from tests.metrics.tiny_networks import save as save_vision_model
from tests.scripts.image_runs import make_materials
from tests.scripts.small_runs import make_bench, reset_accelerate, write_json
from tests.text_adapters import TEXT_ADAPTERS

pytestmark = pytest.mark.reliability
AUTOENCODER = Path(__file__).parents[2] / "examples" / "autoencoder"
SCRIPTS = {
    "text_to_image": "train_text_to_image_curriculum",
    "text_to_image_sdxl": "examples.text_to_image.train_text_to_image_sdxl_curriculum",
    "text_to_image_lora": "examples.text_to_image.train_text_to_image_lora_curriculum",
    "text_to_image_lora_sdxl": "examples.text_to_image.train_text_to_image_lora_sdxl_curriculum",
    "class_conditional": "examples.class_conditional.train_class_conditional_curriculum",
    "unconditional": "examples.unconditional.train_unconditional_curriculum",
    "vit_vqgan": "train_vit_vqgan",
}


@dataclass(frozen=True)
class Place:
    """Weights that a script loads: its command line without data, and where their folder is."""

    script: str
    flags: tuple[str, ...]  # {} is the folder of all models
    part: str  # the folder of the part below that of all models
    key: str  # beginning of a weight's name


def _vision(*flags: str) -> tuple[str, ...]:
    metrics = ("--eval_metrics", "kid", "--eval_steps", "1", "--eval_samples", "8")
    return ("--eval_feature_model", "{}/vision", *metrics, *flags)


SD, XL, IMAGES, PLAIN = (
    ("--pretrained_model_name_or_path", f"{{}}/{name}") for name in ("sd", "xl", "classes", "plain")
)
OWN_VAE = (*XL, "--pretrained_vae_model_name_or_path", "{}/AutoencoderKL")
DIT = ("--model_config", "{}/dit.json", "--pretrained_vae_model_name_or_path")
VQGAN = ("--pretrained_model_name_or_path", "{}/ViTVQModel")
LOOK = ("--perceptual_model", "{}/vision", "--model_config", "{}/ViTVQModel/config.json")
PLACES = {
    "sd-unet": Place("text_to_image", SD, "sd/unet", "mid_block.attentions"),
    "sd-vae": Place("text_to_image", SD, "sd/vae", "decoder.conv_in"),
    "sd-text_encoder": Place("text_to_image", SD, "sd/text_encoder", "layers.0"),
    "xl-unet": Place("text_to_image_sdxl", XL, "xl/unet", "add_embedding"),
    "xl-text_encoder": Place("text_to_image_sdxl", XL, "xl/text_encoder", "layers.0"),
    "xl-text_encoder_2": Place("text_to_image_sdxl", XL, "xl/text_encoder_2", "text_projection"),
    "xl-AutoencoderKL": Place("text_to_image_sdxl", OWN_VAE, "AutoencoderKL", "quant_conv"),
    "lora-unet": Place("text_to_image_lora", SD, "sd/unet", "mid_block.attentions"),
    "lora-xl-text_encoder": Place(
        "text_to_image_lora_sdxl", (*XL, *TEXT_ADAPTERS), "xl/text_encoder", "layers.0"
    ),
    "class-unet": Place("class_conditional", IMAGES, "classes/unet", "conv_out"),
    "class-vae": Place("class_conditional", IMAGES, "classes/vae", "decoder.conv_in"),
    "class-AutoencoderKL": Place(
        "class_conditional", (*DIT, "{}/AutoencoderKL"), "AutoencoderKL", "quant_conv"
    ),
    "class-VQModel": Place("class_conditional", (*DIT, "{}/VQModel"), "VQModel", "quantize"),
    "class-ViTVQModel": Place("class_conditional", (*DIT, "{}/ViTVQModel"), "ViTVQModel", "decode"),
    "class-metrics": Place("class_conditional", _vision(*IMAGES), "vision", "layernorm"),
    "unconditional-unet": Place("unconditional", PLAIN, "plain/unet", "conv_in"),
    "vqgan": Place("vit_vqgan", VQGAN, "ViTVQModel", "encode"),
    "vqgan-perceptual": Place("vit_vqgan", LOOK, "vision", "layernorm"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with every kind of model that is loaded, and images."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    make_materials(root)
    shutil.copytree(make_bench(root / "bench").pipeline, root / "sd")
    families()["sdxl"].save_tiny(root / "xl")
    save_vision_model("vit_bare", root / "vision")
    sizes: dict[str, Any] = {"channels": 4, "sample_size": 4}
    unet = build_network(str(root / "unet.json"), num_classes=3, **sizes)
    vae: Any = AutoencoderKL.from_pretrained(root / "AutoencoderKL")
    names = {number: f"class {number}" for number in range(3)}
    parts: dict[str, Any] = {"unet": unet, "vae": vae}
    ClassConditionalPipeline(DDPMScheduler(), id2label=names, **parts).save_pretrained(
        root / "classes"
    )
    plain = build_network(str(root / "unet.json"), channels=3, sample_size=8)
    UnconditionalPipeline(DDPMScheduler(), unet=plain).save_pretrained(root / "plain")
    return root


@pytest.fixture
def broken(models: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of all models, to break one."""
    yield Path(shutil.copytree(models, tmp_path / "models"))
    reset_accelerate()


@pytest.fixture(autouse=True)
def _no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(AUTOENCODER))
    monkeypatch.setattr(job, "make_update", lambda *_: pytest.fail("it trains"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the tensors of a model."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()  # the loaded ones may be windows into it
    changed = change(tensors)
    assert changed.keys() != tensors.keys()
    save_file(changed, file, {"format": "pt"})


def dropped(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {n: t for n, t in tensors.items() if key not in n}


def renamed(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {n.replace(key, f"old_{key}"): t for n, t in tensors.items()}


def started(script: str, root: Path, flags: tuple[str, ...]) -> int:
    """The exit status of a script on the models of a folder."""
    resolution = ("--resolution", "8", "--train_batch_size", "2", "--max_train_steps", "1")
    data = ("--train_data_dir", f"{root}/images", "--cache_dir", f"{root}/cache")
    output = ("--output_dir", f"{root}/output", "--seed", "1")
    argv = [flag.replace("{}", str(root)) for flag in (*flags, *data, *output, *resolution)]
    if "lora" in script:
        pytest.importorskip("peft")
    module = importlib.import_module(SCRIPTS[script])
    reset_accelerate()
    return runtime.exit_status(lambda: module.main(argv))


@pytest.mark.parametrize("fault", [dropped, renamed])
@pytest.mark.parametrize("name", PLACES)
def test_missing_weights_end_before_step_0(
    broken: Path, name: str, fault: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    place = PLACES[name]
    rewrite(broken / place.part, fault(place.key))
    assert started(place.script, broken, place.flags) == 2
    told = capsys.readouterr().err.split("error: ")[-1]
    assert "weights are not in its file" in told
    assert place.key in told
    assert place.part.split("/")[-1] in told or place.part in told


@pytest.mark.parametrize("name", PLACES)
def test_whole_weights_train(broken: Path, name: str) -> None:
    place = PLACES[name]
    with pytest.raises(pytest.fail.Exception, match="it trains"):
        started(place.script, broken, place.flags)


def test_a_bert_in_the_place_of_clip(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = broken / "sd/text_encoder"
    shutil.rmtree(folder)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 1024}
    BertModel(BertConfig(hidden_size=8, intermediate_size=8, **sizes)).save_pretrained(folder)
    assert started("text_to_image", broken, SD) == 2
    assert "text_encoder/config.json is one of 'bert'" in capsys.readouterr().err
    index = json.loads((broken / "sd/model_index.json").read_text())
    write_json(broken / "sd/model_index.json", index | {"text_encoder": ["transformers", "Bert"]})
    assert started("text_to_image", broken, SD) == 2
    assert "text_encoder is a Bert, and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "flags", "part"),
    [("text_to_image", SD, "sd/vae"), ("class_conditional", IMAGES, "classes/vae")],
)
def test_a_class_that_contradicts_the_index(
    broken: Path, script: str, flags: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(broken / part)
    shutil.copytree(broken / "VQModel", broken / part)
    assert started(script, broken, flags) == 2
    told = capsys.readouterr().err
    assert "vae is a AutoencoderKL in model_index.json, and a VQModel in vae/config.json" in told


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_reloaded_for_pictures(broken: Path, part: str) -> None:
    key = {"unet": "conv_out", "vae": "quant_conv", "text_encoder": "layers.0"}[part]
    assert load_pipeline(StableDiffusionPipeline, broken / "sd").unet is not None
    rewrite(broken / "sd" / part, dropped(key))
    with pytest.raises(ValueError, match=rf"weights are not in its file, such as .*{key}"):
        load_pipeline(StableDiffusionPipeline, broken / "sd")


def test_the_models_are_of_all_kinds(models: Path) -> None:
    kinds = {AutoencoderKL: "AutoencoderKL", VQModel: "VQModel", ViTVQModel: "ViTVQModel"}
    for kind, name in kinds.items():
        config = json.loads((models / name / "config.json").read_text())
        assert config["_class_name"] == kind.__name__
