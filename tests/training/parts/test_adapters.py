"""Adapters: what is trained of a frozen network, and that plain diffusers loads what is saved."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.adapters import (
    WEIGHTS_FILE,
    Adapter,
    add_adapters,
    check_adapter,
)
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.tasks.text_to_image_lora_sdxl import TextToImageLoraSDXL
from tests.reliability.test_checkpoints_of_scripts import FIXTURES
from tests.text_adapters import needs_text_adapters
from tests.training.parts.families.flow_benches import pipeline_of

peft = pytest.importorskip("peft")

PIPELINE = FIXTURES / "text_to_image" / "pipeline"
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
SETTINGS: dict[str, Any] = {
    "rank": 4,
    "lora_alpha": 4.0,
    "lora_dropout": 0.0,
    "use_dora": False,
    "use_rslora": False,
    "init_lora_weights": "gaussian",
    "lora_target_modules": TARGETS,
}


def told(**changes: Any) -> Any:
    return SimpleNamespace(**SETTINGS | changes)


def plain_unet(dtype: torch.dtype = torch.float32) -> Any:
    return UNet2DConditionModel.from_pretrained(PIPELINE / "unet", torch_dtype=dtype)


def adapted(dtype: torch.dtype = torch.float32, seed: int = 3, **changes: Any) -> Adapter:
    """The tiny UNet with an adapter, as the flags ask for it."""
    args, unet = told(**changes), plain_unet(dtype)
    return add_adapters(args, {"unet": unet}, {"unet": args.lora_target_modules}, seed)


def trained(adapter: Adapter) -> Adapter:
    """The same with other weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    for weight in adapter.state_dict().values():
        weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return adapter


def saved(adapter: Adapter, folder: Path, save_format: str, family: str = "sd") -> Path:
    """The folder of a file with names of that format."""
    config: Any = adapter.networks["unet"].config
    named = partial(families()[family].kohya_name, network=config)
    adapter.save_pretrained(folder, named if save_format == "kohya" else None)
    return folder


def prediction(unet: Any) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    channels, side = unet.config.in_channels, unet.config.sample_size
    noisy = torch.randn(2, channels, side, side, generator=draw)
    text = torch.randn(2, 3, unet.config.cross_attention_dim, generator=draw)
    with torch.no_grad():
        return unet.eval()(noisy, torch.tensor([5, 900]), text, return_dict=False)[0]


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_alone_trains_and_is_float32(dtype: torch.dtype, dora: bool) -> None:
    adapter = adapted(dtype, use_dora=dora)
    unet = adapter.networks["unet"]
    mine = {id(p) for p in adapter.parameters()}
    assert {id(p) for p in unet.parameters() if p.requires_grad} == mine
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if id(p) not in mine} == {dtype}
    assert len(mine) == (3 if dora else 2) * 32  # 4 in each of 8 attentions


def test_an_adapter_begins_as_nothing_and_as_a_function_of_the_seed() -> None:
    before = torch.random.get_rng_state()
    one, again, other = adapted(seed=3), adapted(seed=3), adapted(seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(prediction(one.networks["unet"]), prediction(plain_unet()))
    first, second = one.state_dict(), again.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[k], w) for k, w in other.state_dict().items())


@pytest.mark.parametrize("kind", ["gaussian", "kaiming", "orthogonal"])
def test_first_weights_have_the_law_that_is_asked_for(kind: str) -> None:
    adapter = adapted(init_lora_weights=kind)
    assert torch.allclose(prediction(adapter.networks["unet"]), prediction(plain_unet()), atol=1e-5)
    down = torch.cat([w.flatten() for k, w in adapter.state_dict().items() if "lora_A" in k])
    up = torch.cat([w.flatten() for k, w in adapter.state_dict().items() if "lora_B" in k])
    assert bool(up.any()) == (kind == "orthogonal")
    if kind == "gaussian":
        assert float(down.std()) == pytest.approx(1 / 4, rel=0.1)
    if kind == "kaiming":  # uniform in +-1 / sqrt(width), whose widths are 4 and 8
        assert 0.9 / 4**0.5 < float(down.abs().max()) <= 1 / 4**0.5


# -- what is saved ---------------------------------------------------------------------------------


def loaded(folder: Path) -> Any:
    """The tiny pipeline of plain diffusers with the weights of a folder."""
    pytest.importorskip("transformers", minversion="5")  # which saved it
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None)
    pipeline.load_lora_weights(str(folder), weight_name=WEIGHTS_FILE)
    return pipeline.unet


def updates(unet: Any) -> dict[str, Tensor]:
    """What is added to each weight of the base."""
    layers = {k: m for k, m in unet.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {k: m.get_delta_weight(m.active_adapters[0]).detach() for k, m in layers.items()}


KINDS: list[dict[str, Any]] = [
    {},
    {"lora_alpha": 10.0},
    {"lora_alpha": 2.5, "use_rslora": True},
    {"rank": 3, "lora_alpha": 1.0, "lora_target_modules": ["to_q", "conv1", "proj_in"]},
    {"use_dora": True, "lora_alpha": 7.0},
]


@pytest.mark.parametrize(
    ("changes", "save_format"),
    [*((kind, "diffusers") for kind in KINDS), *((kind, "kohya") for kind in KINDS[:-1])],
    ids=str,
)
def test_plain_diffusers_loads_the_same_updates(
    tmp_path: Path, changes: dict[str, Any], save_format: str
) -> None:
    adapter = trained(adapted(**changes))
    saved(adapter, tmp_path, save_format)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_FILE]
    mine, unet = adapter.networks["unet"], loaded(tmp_path)
    wanted, found = updates(mine), updates(unet)
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[k], w, rtol=1e-6, atol=0) for k, w in wanted.items())
    assert torch.allclose(prediction(unet), prediction(mine), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(prediction(unet), prediction(plain_unet()), atol=1e-3)


@pytest.mark.parametrize("save_format", ["diffusers", "kohya"])
def test_a_file_of_another_alpha_is_another(tmp_path: Path, save_format: str) -> None:
    adapter = trained(adapted(lora_alpha=8.0))
    unet: Any = adapter.networks["unet"]
    unet.peft_config["default"].lora_alpha = 4.0
    saved(adapter, tmp_path, save_format)
    wanted, found = updates(unet), updates(loaded(tmp_path))
    assert all(torch.allclose(2 * found[k], w, rtol=1e-6, atol=0) for k, w in wanted.items())


def test_the_file_tells_rank_and_alpha_and_nothing_of_one_version_of_peft(tmp_path: Path) -> None:
    trained(adapted(lora_alpha=6.0)).save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118
    expected = {"r": 4, "lora_alpha": 6.0, "target_modules": sorted(TARGETS)}
    # diffusers before 0.40 wants the last one
    expected |= {"use_dora": False, "use_rslora": False, "rank_pattern": {}}
    assert told == {f"unet.{name}": value for name, value in expected.items()}


def test_kohyas_names_and_numbers(tmp_path: Path) -> None:
    saved(trained(adapted(lora_alpha=6.0, use_rslora=True)), tmp_path, "kohya")
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        names = {key for key in file.keys() if key.startswith(f"{module}.")}  # noqa: SIM118
        assert names == {
            f"{module}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
        }
        assert float(file.get_tensor(f"{module}.alpha")) == 12.0  # 6 sqrt(4), as its factor is / 4
        assert file.metadata()["ss_network_dim"] == "4"


# -- text encoders ---------------------------------------------------------------------------------

XL: Any = families()["sdxl"]


def adapted_xl(**changes: Any) -> Adapter:
    """Adapters in all networks of a tiny Stable Diffusion XL, as if they had been trained."""
    pipeline: Any = DiffusionPipeline.from_pretrained(pipeline_of("sdxl"))
    networks = {name: getattr(pipeline, name) for name in ("unet", *XL.encoders)}
    configs = {name: networks[name].config.to_dict() for name in XL.encoders}
    targets = {name: XL.encoder_targets(name, config) for name, config in configs.items()}
    return trained(add_adapters(told(**changes), networks, {"unet": TARGETS, **targets}, 3))


@pytest.mark.parametrize(
    ("changes", "save_format"),
    [
        ({}, "diffusers"),
        ({"lora_alpha": 2.5, "use_rslora": True}, "diffusers"),
        ({"lora_alpha": 2.5, "use_rslora": True}, "kohya"),
    ],
    ids=str,
)
@needs_text_adapters
def test_plain_diffusers_loads_the_same_updates_of_all_networks(
    tmp_path: Path, changes: dict[str, Any], save_format: str
) -> None:
    adapter = adapted_xl(**changes)
    pipeline: Any = DiffusionPipeline.from_pretrained(pipeline_of("sdxl"))
    folder = saved(adapter, tmp_path, save_format, "sdxl")
    (file,) = folder.glob("*.safetensors")
    pipeline.load_lora_weights(str(folder), weight_name=file.name)
    for part, network in adapter.networks.items():
        wanted, found = updates(network), updates(getattr(pipeline, part))
        assert wanted.keys() == found.keys()
        assert all(torch.allclose(found[k], w, rtol=1e-6, atol=0) for k, w in wanted.items())
    tokens = torch.arange(10)[None]
    for part in XL.encoders:
        with torch.no_grad():
            ours, theirs = (
                encoder.eval()(tokens, output_hidden_states=True, return_dict=False)
                for encoder in (adapter.networks[part], getattr(pipeline, part))
            )
        assert torch.allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


@needs_text_adapters
def test_names_of_a_file_are_those_of_every_transformers() -> None:
    names = [*adapted_xl().state_dict()]
    heads = {name.partition(".layers.")[0] for name in names if name.startswith("text")}
    assert heads == {f"{part}.text_model.encoder" for part in XL.encoders}


@needs_text_adapters
def test_networks_of_one_shape_begin_with_other_weights() -> None:
    weights = adapted_xl().state_dict()
    one, other = (
        weights[f"{part}.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"]
        for part in XL.encoders
    )
    assert one.shape == other.shape
    assert not torch.equal(one, other)


@needs_text_adapters
def test_a_layer_that_nobody_listens_to_gets_no_adapter() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, num_hidden_layers=12, vocab_size=9)
    for part, layers in (("text_encoder", 11), ("text_encoder_2", 12)):
        encoder = CLIPTextModel(config)
        targets = {part: XL.encoder_targets(part, config.to_dict())}
        names = add_adapters(told(), {part: encoder}, targets, 0).state_dict()
        found = {int(name.partition(".layers.")[2].partition(".")[0]) for name in names}
        assert found == {*range(layers)}
        assert len(names) == layers * 4 * 2


def test_kohya_numbers_the_blocks_of_sdxl_through() -> None:
    module = "attentions.1.transformer_blocks.0.attn1.to_q"
    network = {"layers_per_block": 2}
    found = {
        place: XL.kohya_name(f"unet.{place}.{module}", network)
        for place in ("down_blocks.1", "mid_block", "up_blocks.1")
    }
    rest = "1_transformer_blocks_0_attn1_to_q"
    assert found == {
        "down_blocks.1": f"lora_unet_input_blocks_5_{rest}",
        "mid_block": f"lora_unet_middle_block_{rest}",
        "up_blocks.1": f"lora_unet_output_blocks_4_{rest}",
    }
    assert XL.kohya_name("unet.down_blocks.1.resnets.0.conv1", network) is None


# -- checkpoints -----------------------------------------------------------------------------------


def test_weights_come_back_in_place() -> None:
    adapter = trained(adapted())
    kept = {name: weight.clone() for name, weight in adapter.state_dict().items()}
    mine = [*adapter.parameters()]
    trained(adapter).load_state_dict(kept)
    assert all(a is b for a, b in zip(mine, adapter.parameters(), strict=True))
    assert all(torch.equal(w, kept[name]) for name, w in adapter.state_dict().items())
    assert [name for name, _ in adapter.named_parameters()] == [*kept]


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"lora_target_modules": ["to_k", "to_w"]}, ("to_k to_w", "'to_w'", "to_out")),
        ({"lora_target_modules": ["norm1"]}, ("norm1", "not supported")),
        ({"rank": 3, "init_lora_weights": "orthogonal"}, ("--rank 3", "even")),
    ],
)
def test_what_peft_cannot_make_is_refused_without_a_weight(
    changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    config: Any = UNet2DConditionModel.load_config(str(PIPELINE / "unet"))
    with pytest.raises(UsageError) as refusal:
        check_adapter(told(**changes), UNet2DConditionModel, config)
    assert [part for part in parts if part not in str(refusal.value)] == []
    check_adapter(told(), UNet2DConditionModel, config)


def test_a_peft_that_transformers_does_not_take_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, argv = TextToImageLoraSDXL(), ["--train_data_dir", str(tmp_path)]
    argv += ["--pretrained_model_name_or_path", str(tmp_path), "--train_text_encoder"]
    args = task.parse(argv, machine=False)
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    with pytest.raises(UsageError, match=r"peft 99\.0 or later, and peft \S+ is installed"):
        task.choose(args, 0)  # before its folder is looked at
