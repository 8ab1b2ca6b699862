"""Networks: sizes of the paper, first weights, configs that agree or contradict, labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusers_curriculum.models.network_config import DIT_SIZES, Asked, complete_config, dit_config
from diffusers_curriculum.models.networks import (
    build_network,
    check_conditioning,
    learns_variance,
    load_network,
    null_class,
    num_classes,
    takes_labels,
    without_label_dropout,
)
from tests.pipelines.parts_fixtures import generator, tiny_dit, tiny_unet

TINY_DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "patch_size": 2,
}
TINY_UNET = {
    "_class_name": "UNet2DModel",
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}


def written(folder: Path, config: Any, **changes: Any) -> str:
    path = folder / "model.json"
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "absent"}))
    return str(path)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in network.named_parameters()}


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads"),
    [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)],
)
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_the_sizes_are_those_of_the_papers_table(
    name: str, layers: int, width: int, heads: int, patch: int
) -> None:
    asked = Asked(channels=4, out_channels=None, sample_size=32, num_classes=1000)
    kind, config = complete_config(f"DiT-{name}/{patch}", asked)
    assert kind is DiTTransformer2DModel
    with torch.device("meta"):
        network: Any = kind(**config)
    assert len(network.transformer_blocks) == layers
    assert network.proj_out_1.in_features == width
    assert config["num_attention_heads"] == heads
    assert config["patch_size"] == patch
    # 12 width^2 of attention and MLP, 6 width^2 of modulation: the paper's blocks
    block = {k: v.numel() for k, v in network.transformer_blocks[0].named_parameters()}
    matrices = sum(n for k, n in block.items() if k.endswith("weight") and ".emb." not in k)
    assert matrices == 18 * width**2


@pytest.mark.parametrize("name", ["DiT-M/2", "DiT-S/0"])
def test_a_dit_that_the_paper_does_not_have_is_told(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name!r} is no DiT: its size is one of S, B, L, XL"):
        dit_config(name)
    assert dit_config("facebook/DiT-XL-2-256") is None
    assert set(DIT_SIZES) == {"S", "B", "L", "XL"}


def test_the_unet_is_that_of_diffusers_script() -> None:
    kind, config = complete_config("UNet", Asked(3, None, 64, None))
    with torch.device("meta"):
        network = kind(**config)
        theirs = UNet2DModel(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=(
                "DownBlock2D",
                "DownBlock2D",
                "DownBlock2D",
                "DownBlock2D",
                "AttnDownBlock2D",
                "DownBlock2D",
            ),
            up_block_types=(
                "UpBlock2D",
                "AttnUpBlock2D",
                "UpBlock2D",
                "UpBlock2D",
                "UpBlock2D",
                "UpBlock2D",
            ),
        )
    ignored = {"_use_default_values"}
    assert {k: v for k, v in network.config.items() if k not in ignored} == {
        k: v for k, v in theirs.config.items() if k not in ignored
    }


# -- first weights ---------------------------------------------------------------------------------


def test_a_fresh_dit_says_zero_and_its_blocks_do_nothing(tmp_path: Path) -> None:
    network = build_network(written(tmp_path, TINY_DIT), channels=4, sample_size=8, num_classes=10)
    x = torch.randn(2, 4, 8, 8, generator=generator())
    labels = torch.tensor([1, 1000])
    output = network(x, torch.tensor([3, 700]), class_labels=labels, return_dict=False)[0]
    assert torch.equal(output, torch.zeros(2, 4, 8, 8))
    tokens = torch.randn(2, 16, 16, generator=generator())
    block = network.transformer_blocks[0]
    assert torch.equal(block(tokens, timestep=torch.tensor([3, 7]), class_labels=labels), tokens)


def test_the_first_weights_have_the_papers_laws() -> None:
    network = build_network("DiT-S/8", channels=4, sample_size=8, num_classes=10)
    zero, normal, xavier = [], [], []
    for name, weight in weights(network).items():
        if name.endswith("bias") or "norm1.linear" in name or "proj_out" in name:
            zero.append(float(weight.abs().max()))
        elif ".emb." in name:
            normal.append((float(weight.mean()), float(weight.std())))
        else:
            rows, columns = weight.flatten(1).shape
            limit = math.sqrt(6 / (rows + columns))
            xavier.append(float(weight.std()) / (limit / math.sqrt(3)))
            assert limit * 0.99 < float(weight.abs().max()) <= limit
    assert len(zero) > 20
    assert max(zero) == 0
    assert len(normal) == 3 * 12
    assert all(abs(mean) < 5e-4 and abs(std - 0.02) < 5e-4 for mean, std in normal)
    assert len(xavier) == 1 + 6 * 12
    assert all(abs(ratio - 1) < 0.02 for ratio in xavier)


@pytest.mark.parametrize("config", [TINY_DIT, TINY_UNET])
def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(
    config: Any, tmp_path: Path
) -> None:
    path = written(tmp_path, config)

    def build(seed: int) -> dict[str, Tensor]:
        return weights(build_network(path, channels=3, sample_size=8, seed=seed))

    before = torch.get_rng_state()
    first = build(1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    second, other = build(1), build(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# -- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "classes", "rows", "null"),
    [
        (TINY_DIT, 10, 1001, 1000),
        (TINY_DIT, 1000, 1001, 1000),
        (TINY_DIT, 1500, 1501, 1500),
        (TINY_DIT, None, 1, 0),
        (TINY_UNET, 10, 11, 10),
        (TINY_UNET, None, None, None),
    ],
)
def test_rows_and_null_class(
    config: Any, classes: int | None, rows: int | None, null: int | None, tmp_path: Path
) -> None:
    path = written(tmp_path, config)
    network = build_network(path, channels=3, sample_size=8, num_classes=classes)
    tables = [m for m in network.modules() if isinstance(m, nn.Embedding)]
    assert {len(table.weight) for table in tables} == ({rows} if rows else set())
    assert takes_labels(network) == (null is not None)
    x, t = torch.zeros(1, 3, 8, 8), torch.tensor([5])
    if null is None:
        assert num_classes(network) == 0
        with pytest.raises(ValueError, match="UNet2DModel takes no labels"):
            null_class(network)
        assert network(x, t, return_dict=False)[0].shape == x.shape
        return
    assert (null_class(network), num_classes(network)) == (null, null)
    label = torch.tensor([null])
    assert network(x, t, class_labels=label, return_dict=False)[0].shape == x.shape
    with pytest.raises(IndexError):
        network(x, t, class_labels=label + 1, return_dict=False)


def test_label_dropout_inside_is_off_and_draws_nothing(tmp_path: Path) -> None:
    network = build_network(written(tmp_path, TINY_DIT), channels=3, sample_size=8, num_classes=5)
    tiny_dit(5, 3).save_pretrained(tmp_path / "saved")
    loaded = load_network(str(tmp_path / "saved"))
    for one in (network, loaded):
        one.train()
        tables = [m for m in one.modules() if isinstance(m, LabelEmbedding)]
        assert [table.dropout_prob for table in tables] == [0.0, 0.0]
        before = torch.get_rng_state()
        one(
            torch.zeros(64, 3, 8, 8),
            torch.zeros(64),
            class_labels=torch.ones(64, dtype=torch.int64),
        )
        assert torch.equal(before, torch.get_rng_state())
    plain = DiTTransformer2DModel.from_pretrained(tmp_path / "saved").train()
    labels = torch.ones(64, dtype=torch.int64)
    before = torch.get_rng_state()
    plain(torch.zeros(64, 3, 8, 8), torch.zeros(64), class_labels=labels)
    assert not torch.equal(before, torch.get_rng_state())  # what diffusers does of itself
    assert without_label_dropout(plain) is plain


# -- configs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY_DIT, TINY_UNET])
def test_what_a_config_leaves_out_is_filled_in(config: Any, tmp_path: Path) -> None:
    network = build_network(
        written(tmp_path, config), channels=4, out_channels=8, sample_size=12, num_classes=3
    )
    found = {key: network.config[key] for key in ("in_channels", "out_channels", "sample_size")}
    assert found == {"in_channels": 4, "out_channels": 8, "sample_size": 12}
    assert learns_variance(network)
    plain = build_network(written(tmp_path, config), channels=4, sample_size=12)
    assert plain.config["out_channels"] == 4  # said, because DiTPipeline divides it
    assert not learns_variance(plain)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TINY_DIT, {"in_channels": 8}, "says in_channels=8, but 4 is asked for"),
        (TINY_UNET, {"sample_size": 64}, "says sample_size=64, but 8 is asked for"),
        (TINY_UNET, {"sample_size": [8, 16]}, r"says sample_size=\(8, 16\), but 8 is asked for"),
        (TINY_DIT, {"out_channels": 5}, "out_channels=5 fits no input of 4 channels"),
        (TINY_DIT, {"num_embeds_ada_norm": 9}, "says num_embeds_ada_norm=9, but the data need 10"),
        (TINY_UNET, {"num_class_embeds": 10}, "says num_class_embeds=10, but the data need 11"),
        (TINY_UNET, {"class_embed_type": "timestep"}, "says class_embed_type='timestep'"),
        (TINY_DIT, {"patch_size": 3}, "patch_size=3 does not divide the 8 x 8 input"),
        (
            TINY_DIT,
            {"num_layer": 3},
            "has settings that a DiTTransformer2DModel does not take: num_l",
        ),
        (
            TINY_DIT,
            {"_class_name": "absent"},
            "settings that a UNet2DModel does not take: num_layers",
        ),
        (TINY_DIT, {"_class_name": "UNet2DConditionModel"}, "is of class UNet2DConditionModel"),
        (
            TINY_DIT,
            {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"},
            "is of class Transformer2DModel, norm_type 'layer_norm'",
        ),
    ],
)
def test_a_contradiction_is_told(config: Any, changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(
            written(tmp_path, config, **changes), channels=4, sample_size=8, num_classes=10
        )


def test_what_agrees_is_taken_as_it_is(tmp_path: Path) -> None:
    agreeing = {"in_channels": 4, "sample_size": [8, 8], "out_channels": 8}
    path = written(tmp_path, TINY_DIT, num_embeds_ada_norm=12, **agreeing)
    network = build_network(path, channels=4, sample_size=8, num_classes=10)
    assert null_class(network) == 12
    assert learns_variance(network)
    with pytest.raises(ValueError, match="says out_channels=8, but 4 is asked for"):
        build_network(path, channels=4, out_channels=4, sample_size=8, num_classes=10)


def test_a_config_without_a_class_name_is_a_unets(tmp_path: Path) -> None:
    path = written(tmp_path, TINY_UNET, _class_name="absent")
    assert isinstance(build_network(path, channels=3, sample_size=8), UNet2DModel)


def test_sizes_that_a_unet_cannot_halve_are_told() -> None:
    with pytest.raises(ValueError, match="choose a multiple of 32"):
        build_network("UNet", channels=3, sample_size=28)


def test_a_config_is_read_from_a_folder_and_its_subfolder(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "pipeline" / "unet")
    inside: dict[str, Any] = {"channels": 3, "sample_size": 8}
    for source, subfolder in (
        (tmp_path / "pipeline" / "unet", None),
        (tmp_path / "pipeline", "unet"),
    ):
        network = build_network(str(source), subfolder=subfolder, **inside)
        assert network.config["block_out_channels"] == [8, 16]
    with pytest.raises(ValueError, match=r"nowhere.*its config\.json cannot be loaded"):
        build_network(str(tmp_path / "nowhere"), **inside)


# -- pretrained ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_pretrained_dit_is_loaded_under_its_old_name_too(name: str, tmp_path: Path) -> None:
    network = tiny_dit(1000, out_channels=8)
    network.save_pretrained(tmp_path / "transformer")
    path = tmp_path / "transformer" / "config.json"
    old = {"attention_type": "default", "cross_attention_dim": None, "only_cross_attention": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name} | old))
    loaded = load_network(str(tmp_path), subfolder="transformer")
    assert type(loaded) is DiTTransformer2DModel
    assert learns_variance(loaded)
    mine, theirs = weights(network), weights(loaded)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    if name == "Transformer2DModel":  # its config alone makes a fresh one
        fresh = build_network(str(path), channels=4, sample_size=8, num_classes=7)
        assert learns_variance(fresh)
        assert null_class(fresh) == 1000


def test_another_class_and_pickles_are_not_loaded(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "bin", safe_serialization=False)
    with pytest.raises(ValueError, match="its UNet2DModel cannot be loaded"):
        load_network(str(tmp_path / "bin"))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="is of class AutoencoderKL"):
        load_network(str(tmp_path))


def test_missing_weights_are_not_left_random(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    kept = load_file(file)
    del kept["conv_out.weight"]
    save_file(kept, file)
    with pytest.raises(
        ValueError, match=r"1 of its weights are not in its file, such as conv_out\.weight"
    ):
        load_network(str(tmp_path))


# -- conditioning ----------------------------------------------------------------------------------


def test_time_embeddings_that_cannot_take_the_timesteps_are_told() -> None:
    indices, flow = torch.arange(1000), torch.linspace(1, 1000, 1000)
    c_noise = torch.linspace(-1.5, 1.1, 1000)
    fourier = tiny_unet(time_embedding_type="fourier")
    for wrong in (indices, c_noise):
        with pytest.raises(ValueError, match="logarithm of timesteps, which are as low as"):
            check_conditioning(fourier, wrong)
        bad = fourier(torch.ones(1, 3, 8, 8), wrong[:1]).sample
        assert not bad.isfinite().all()  # that is why
    check_conditioning(fourier, flow)
    learned = tiny_unet(time_embedding_type="learned", num_train_timesteps=1000)
    check_conditioning(learned, indices)
    for wrong in (flow, c_noise, torch.arange(1001)):
        with pytest.raises(ValueError, match="takes whole timesteps from 0 to 999"):
            check_conditioning(learned, wrong)
    for fits in (indices, flow, c_noise):
        check_conditioning(tiny_unet(), fits)
        check_conditioning(tiny_dit(), fits)
