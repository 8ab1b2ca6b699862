"""Every part of a pipeline comes from one revision and variant, and only the UNet is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_curriculum.models.tiny import TinySizes, make_tiny_pipeline
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.process.attention import attention_of
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from tests.training.command_lines import parse_args
from tests.training.fake_accelerator import FakeAccelerator

FAMILY = families()["sd"]
CPU = torch.device("cpu")
SIZES = TinySizes((8, 8), (8, 8), text_width=8, text_length=8, groups=4)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minuscule pipeline."""
    folder = tmp_path_factory.mktemp("parts") / "pipeline"
    make_tiny_pipeline(None, folder, resolution=8, vae_steps=0, sizes=SIZES)
    return folder


def arguments(path: Path | str, *more: str) -> Arguments:
    return parse_args(["--pretrained_model_name_or_path", str(path), *more], machine=False)


def load(args: Arguments, dtype: torch.dtype = torch.float32) -> Components:
    return FAMILY.load_components(args, FAMILY.load_tokenizers(args), CPU, dtype)


def with_config(pipeline: Path, folder: Path, config: dict[str, Any]) -> Path:
    """The pipeline's scheduler folder alone, with another config."""
    shutil.copytree(pipeline / "scheduler", folder / "scheduler")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return with_index(folder, config["_class_name"])


def with_index(folder: Path, name: str) -> Path:
    """A folder with the index of a pipeline that has a scheduler of that class."""
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", name]}))
    return folder


# -- schedulers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "training"),
    [
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), DDPMScheduler),
        (PNDMScheduler(beta_end=0.01, skip_prk_steps=True), DDPMScheduler),
        (DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True), DDPMScheduler),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler),
        (EDMEulerScheduler(sigma_max=60.0), EDMEulerScheduler),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_two_schedulers_with_the_settings_of_the_pipeline(
    tmp_path: Path, own: Any, training: type
) -> None:
    own.save_pretrained(tmp_path / "scheduler")
    with_index(tmp_path, type(own).__name__)
    adding, sampling = FAMILY.load_schedulers(arguments(tmp_path))
    assert type(adding) is training
    assert type(sampling) is type(own)
    for name, value in own.config.items():
        if not name.startswith("_"):
            assert sampling.config[name] == value
            assert adding.config.get(name, value) == value


@pytest.mark.parametrize("name", ["AutoencoderKL", "MyScheduler", "os", "None"])
def test_a_class_that_is_no_scheduler(pipeline: Path, tmp_path: Path, name: str) -> None:
    folder = with_config(pipeline, tmp_path, {"_class_name": name})
    with pytest.raises(UsageError, match=f"{name!r}, which is no scheduler of diffusers"):
        FAMILY.load_schedulers(arguments(folder))


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_unet_trains_in_float32_and_the_rest_is_frozen(
    pipeline: Path, dtype: torch.dtype
) -> None:
    models = load(arguments(pipeline), dtype)
    assert {p.dtype for p in models.network.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in models.network.parameters())
    assert models.network.training
    for frozen in (models.vae, *models.encoders.values()):
        assert {p.dtype for p in frozen.parameters()} == {dtype}
        assert not any(p.requires_grad for p in frozen.parameters())
        assert not frozen.training


def test_the_models_are_those_of_the_folder(pipeline: Path) -> None:
    models = load(arguments(pipeline))
    saved = StableDiffusionPipeline.from_pretrained(pipeline)
    loaded = {"unet": models.network, "vae": models.vae, **models.encoders}
    for name, part in loaded.items():
        ours, theirs = (x.state_dict() for x in (part, getattr(saved, name)))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert models.tokenizers["tokenizer"]("a b").input_ids == saved.tokenizer("a b").input_ids


def test_gradient_checkpointing_is_switched_on(pipeline: Path) -> None:
    assert load(arguments(pipeline, "--gradient_checkpointing")).network.is_gradient_checkpointing
    assert not load(arguments(pipeline)).network.is_gradient_checkpointing


def test_xformers_is_switched_on_for_the_unet(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class XFormersAttnProcessor(AttnProcessor2_0):
        """Stands for the one of that name."""

    def enable(self: UNet2DConditionModel) -> None:
        asked.append(type(self))
        self.set_attn_processor(XFormersAttnProcessor())  # pyright: ignore[reportArgumentType]

    asked: list[type] = []
    name = "enable_xformers_memory_efficient_attention"
    monkeypatch.setattr(UNet2DConditionModel, name, enable)
    models = load(arguments(pipeline, f"--{name}"))
    assert asked == [UNet2DConditionModel]
    assert attention_of(models.network) == "xformers"


def test_all_parts_come_from_one_revision_and_variant(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "copy"))
    for file in folder.glob("*/*model.safetensors"):
        shutil.copy(file, file.with_name(f"{file.stem}.fp16.safetensors"))
    asked: dict[str, dict[str, Any]] = {}

    def spied(kind: Any) -> None:
        original = kind.from_pretrained

        def from_pretrained(path: Any, **kwargs: Any) -> Any:
            asked[kwargs["subfolder"]] = kwargs
            plain = {k: v for k, v in kwargs.items() if k not in ("revision", "variant")}
            return original(path, **plain)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (CLIPTextModel, AutoencoderKL, UNet2DConditionModel):
        spied(kind)
    spied(CLIPTokenizer)
    flags = ("--revision", "r1", "--variant", "fp16", "--non_ema_revision", "r2")
    load(arguments(folder, *flags))
    assert asked.keys() == {"tokenizer", "text_encoder", "vae", "unet"}
    assert {name: kw["revision"] for name, kw in asked.items()} == {
        "tokenizer": "r1",
        "text_encoder": "r1",
        "vae": "r1",
        "unet": "r2",
    }
    assert {kw["variant"] for name, kw in asked.items() if name != "tokenizer"} == {"fp16"}


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "text_encoder", "vae", "unet"])
def test_a_missing_part_is_named(pipeline: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(pipeline, folder)
    shutil.rmtree(folder / part)
    args = arguments(folder)
    told = rf"broken'.*its {part} cannot be loaded.*--revision"
    with pytest.raises(UsageError, match=told):
        FAMILY.load_schedulers(args) if part == "scheduler" else load(args)


@pytest.mark.parametrize("lacks", ["words", "settings"])
def test_a_tokenizer_without_words_or_length_is_refused(
    pipeline: Path, tmp_path: Path, lacks: str
) -> None:
    # transformers would make one of two tokens, for which all captions are the same
    folder = tmp_path / "broken"
    shutil.copytree(pipeline, folder)
    for file in (folder / "tokenizer").iterdir():  # words in files whose names differ by version
        if (file.name == "tokenizer_config.json") == (lacks == "settings"):
            file.unlink()
    with pytest.raises(UsageError, match="its tokenizer cannot be loaded"):
        FAMILY.load_tokenizers(arguments(folder))
    assert len(FAMILY.load_tokenizers(arguments(pipeline))["tokenizer"]) > 500


# -- the average -----------------------------------------------------------------------------------


def averaged(args: Arguments) -> tuple[Any, EMAModel | None]:
    """The UNet that a run loads, and its average."""
    task = TextToImage()
    task.published = SimpleNamespace()  # type: ignore[assignment]
    task.family, task.tokenizers = FAMILY, FAMILY.load_tokenizers(args)
    job: Any = SimpleNamespace(args=args, accelerator=FakeAccelerator(False))
    trained = task.load(job)
    return trained.network, trained.averages.ema


def test_no_average_unless_asked_for(pipeline: Path) -> None:
    assert averaged(arguments(pipeline))[1] is None


@pytest.mark.parametrize("foreach", [False, True])
def test_the_average_starts_from_the_weights(pipeline: Path, foreach: bool) -> None:
    more = ("--use_ema", "--ema_decay", "0.9", *(["--foreach_ema"] if foreach else []))
    unet, ema = averaged(arguments(pipeline, *more))
    assert ema is not None
    pairs = list(zip(ema.shadow_params, unet.parameters(), strict=True))
    assert all(torch.equal(mean, weight) for mean, weight in pairs)
    assert all(mean.data_ptr() != weight.data_ptr() for mean, weight in pairs)
    assert (ema.decay, ema.foreach) == (0.9, foreach)


def test_the_average_of_another_revision_starts_from_that(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = UNet2DConditionModel.from_pretrained

    def from_pretrained(path: Any, **kwargs: Any) -> Any:
        loaded: Any = original(path, subfolder=kwargs["subfolder"], output_loading_info=True)
        unet = loaded[0]
        if kwargs["revision"] is None:
            for parameter in unet.parameters():
                torch.nn.init.constant_(parameter, 3.0)
        return loaded

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", from_pretrained)
    unet, ema = averaged(arguments(pipeline, "--use_ema", "--non_ema_revision", "non_ema"))
    assert ema is not None
    assert all(bool((mean == 3).all()) for mean in ema.shadow_params)
    assert not all(bool((weight == 3).all()) for weight in unet.parameters())


# -- export ----------------------------------------------------------------------------------------


def exported(pipeline: Path, folder: Path, *more: str) -> Any:
    """What is left of a run of no steps, as it is loaded for pictures."""
    args = arguments(pipeline, *more)
    models = load(args, torch.bfloat16)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    assert models.base is not None
    final = FAMILY.save_pipeline(models.base, models.network, scheduler, folder)()
    assert final.unet is models.network
    return final


def test_the_final_pipeline(pipeline: Path, tmp_path: Path) -> None:
    final = exported(pipeline, tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    for found in (final, loaded):
        assert found.scheduler.config.prediction_type == "v_prediction"
        # the frozen parts as they were, not as they were rounded for training
        assert found.vae.dtype == found.text_encoder.dtype == torch.float32
    before = json.loads((pipeline / "model_index.json").read_text())
    assert json.loads((tmp_path / "model_index.json").read_text()) == before


def test_frozen_parts_are_copied_byte_for_byte(pipeline: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(pipeline, tmp_path / "base"))
    for name, text in {
        "tokenizer/vocab.json": "{}",  # which transformers 5 does not write
        "tokenizer/merges.txt": "#version: 0.2",
        "text_encoder/flax_model.msgpack": "not asked for",
        "text_encoder/modeling.py": "never copied",
    }.items():
        if not (base / name).exists():
            (base / name).write_text(text)
    exported(base, tmp_path / "out")
    for part in ("tokenizer", "text_encoder", "vae"):
        files = {file.name for file in (base / part).iterdir()} - {
            "flax_model.msgpack",
            "modeling.py",
        }
        assert {file.name for file in (tmp_path / "out" / part).iterdir()} == files
        for name in files:
            ours, theirs = (folder / part / name for folder in (tmp_path / "out", base))
            assert ours.read_bytes() == theirs.read_bytes()


def test_frozen_parts_of_a_variant_get_plain_names(pipeline: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    full: Any = StableDiffusionPipeline.from_pretrained(pipeline)
    half = full.to(torch.float16)
    half.save_pretrained(base)
    half.vae.save_pretrained(base / "vae", variant="fp16", max_shard_size="20KB")
    half.text_encoder.save_pretrained(base / "text_encoder", variant="fp16")
    for part in ("vae", "text_encoder"):
        for file in (base / part).glob("*model.safetensors"):
            file.unlink()
    final = exported(base, tmp_path / "out", "--variant", "fp16")
    assert final.text_encoder.dtype == torch.float32
    names = [file.name for file in (tmp_path / "out").rglob("*") if "fp16" in file.name]
    assert names == []
    assert len([*(tmp_path / "out/vae").glob("*-of-*.safetensors")]) > 1
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    ours, theirs = loaded.vae.state_dict(), half.vae.float().state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_parts_of_a_base_on_the_hub_are_fetched(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, **settings: Any) -> str:
        asked.append((name, settings["revision"], settings["unet"]))
        return str(pipeline)

    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
    args = arguments("some/pipeline", "--revision", "abc")
    assert FAMILY.base_folder(args) == pipeline
    assert asked == [("some/pipeline", "abc", None)]


def test_a_run_may_end_where_its_base_is(pipeline: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(pipeline, tmp_path / "base"))
    exported(base, base)
    assert StableDiffusionPipeline.from_pretrained(base).vae is not None
