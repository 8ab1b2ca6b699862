"""What attention is computed by is what was asked for, or the run does not start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, UNet2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.run import ATTENTIONS
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process.attention import BACKENDS, attention_of, choose_attention
from diffusers_curriculum.training.process.launcher import in_effect
from tests.training.command_lines import parse_args

BASE = ("--pretrained_model_name_or_path", "some/model", "--dataset_name", "some/data")


@pytest.fixture(autouse=True)
def _same_backend_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers keeps the last one for all of the process."""
    name = "_active_backend"
    monkeypatch.setattr(_AttentionBackendRegistry, name, getattr(_AttentionBackendRegistry, name))


def args(name: str | None = None, xformers: bool = False) -> Any:
    return SimpleNamespace(attention=name, enable_xformers_memory_efficient_attention=xformers)


def dit() -> Any:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4, patch_size=2
    )


def unet(*blocks: str) -> Any:
    settings: dict[str, Any] = {"block_out_channels": (8,) * len(blocks), "layers_per_block": 1}
    settings |= {"down_block_types": blocks, "norm_num_groups": 4, "attention_head_dim": 4}
    settings |= {"up_block_types": [name.replace("Down", "Up") for name in reversed(blocks)]}
    return UNet2DModel(sample_size=8, add_attention=False, **settings)


def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def predicted(network: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    given = {"hidden_states": (1, 4, 4), "encoder_hidden_states": (1, 3, 8)}
    told = {name: torch.randn(shape, generator=generator) for name, shape in given.items()}
    told |= {"pooled_projections": torch.ones(1, 8), "timestep": torch.tensor([0.5])}
    told |= {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    with torch.no_grad():
        return network(**told, return_dict=False)[0]


def test_nothing_is_changed_unless_asked_for() -> None:
    network = flux()
    choose_attention(args(), network)
    assert attention_of(network) == "sdpa"
    assert {p._attention_backend for p in network.attn_processors.values()} == {None}
    assert attention_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["sdpa", "math"])
def test_a_transformer_of_the_dispatcher_takes_a_kernel(name: str) -> None:
    network = flux()
    before = predicted(network)
    choose_attention(args(name), network)
    assert attention_of(network) == name
    assert {p._attention_backend.value for p in network.attn_processors.values()} == {
        BACKENDS[name]
    }
    assert torch.allclose(predicted(network), before, atol=1e-5)


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Any, backend: str) -> None:
        raise RuntimeError(f"backend '{backend}' is not usable because of missing package")

    monkeypatch.setattr(FluxTransformer2DModel, "set_attention_backend", missing)
    told = "--attention is flash, which FluxTransformer2DModel cannot use here: .*missing package"
    with pytest.raises(UsageError, match=told):
        choose_attention(args("flash"), flux())


@pytest.mark.parametrize("make", [dit, lambda: unet("AttnDownBlock2D")])
def test_a_network_without_the_dispatcher_takes_no_kernel(make: Any) -> None:
    network = make()
    with pytest.raises(UsageError, match=r"is math, and that of \w+ is sdpa: .*\(sdpa, xformers\)"):
        choose_attention(args("math"), network)
    choose_attention(args("sdpa"), network)
    assert attention_of(network) == "sdpa"


def test_a_call_that_does_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FluxTransformer2DModel, "set_attention_backend", lambda *given: None)
    with pytest.raises(UsageError, match="is math, and that of FluxTransformer2DModel is sdpa"):
        choose_attention(args("math"), flux())
    name = "enable_xformers_memory_efficient_attention"
    monkeypatch.setattr(DiTTransformer2DModel, name, lambda self: None)
    for asked in (args("xformers"), args(xformers=True)):
        with pytest.raises(UsageError, match="is xformers, and that of DiTTransformer2DModel is"):
            choose_attention(asked, dit())


def test_a_network_without_attention_is_told() -> None:
    with pytest.raises(UsageError, match="is sdpa, and UNet2DModel has no attention: drop"):
        choose_attention(args("sdpa"), unet("DownBlock2D"))


def test_several_kinds_are_all_told() -> None:
    network = flux()
    first = next(iter(network.attn_processors.values()))
    first._attention_backend = "flash_hub"
    assert attention_of(network) == "flash_hub, sdpa"


def test_what_is_in_effect_tells_the_attention() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert in_effect(accelerator, dit())["attention"] == "sdpa"
    assert "attention" not in in_effect(accelerator, torch.nn.Linear(2, 2))


# -- the command line ------------------------------------------------------------------------------


def test_every_name_is_one_of_the_dispatcher() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert set(BACKENDS) == set(ATTENTIONS)
    assert {kind.value for kind in AttentionBackendName} >= {*BACKENDS.values()}


def test_two_flags_that_disagree_are_refused() -> None:
    flag = "--enable_xformers_memory_efficient_attention"
    with pytest.raises(UsageError, match=f"{flag} and --attention sdpa both say"):
        parse_args([*BASE, flag, "--attention", "sdpa"], machine=False)
    parse_args([*BASE, flag, "--attention", "xformers"], machine=False)


@pytest.mark.parametrize(
    ("name", "packages", "told"),
    [
        ("xformers", (), "--attention xformers needs xformers: pip install xformers"),
        ("flash", (), "--attention flash needs flash-attn: pip install flash-attn"),
        ("flash", ("flash_attn",), "--attention flash needs a CUDA device"),
        ("cudnn", (), "--attention cudnn needs a CUDA device"),
        ("efficient", (), "--attention efficient needs a CUDA device"),
    ],
)
def test_what_this_machine_cannot_compute_by_is_refused(
    name: str, packages: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "installed", lambda package: package in packages)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=told):
        parse_args([*BASE, "--attention", name])
