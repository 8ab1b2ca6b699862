"""A push by Xet, which huggingface_hub takes wherever hf_xet is installed: blocks to a store that
the Hub names, then the commit; there is no way back to LFS but HF_HUB_DISABLE_XET=1."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from diffusers_curriculum.training.arguments.environment import satisfied
from diffusers_curriculum.training.errors import HubError
from diffusers_curriculum.training.publish.hub import push
from tests.training.fake_hub import FakeHub, reachable, serve

TOKEN = "hf_ThisIsTheSecretOfTheTest"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# of which the routes are known
pytestmark = [
    pytest.mark.skipif(not satisfied(needed), reason=f"needs {needed}")
    for needed in ("hf-xet>=1.8", "huggingface_hub>=1")
]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    huggingface_hub.utils.disable_progress_bars()
    with serve() as running, reachable(running, xet=True):
        running.token = TOKEN
        yield running
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline with weights that cannot be compressed."""
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet").mkdir()
    (tmp_path / WEIGHTS).write_bytes(random.Random(0).randbytes(300_000))
    return tmp_path


def send(hub: FakeHub, folder: Path) -> str:
    return push(folder, "somebody/x", api=HfApi(hub.url, token=TOKEN))


def test_weights_arrive_by_xet(hub: FakeHub, folder: Path) -> None:
    send(hub, folder)
    assert hub.asked("/info/lfs/") == 0
    assert hub.asked("/v1/xorbs/") == 1
    for request in hub.requests:  # the store sees its own token only
        if request.path.startswith("/v"):
            assert request.headers["authorization"] == "Bearer for_blocks"
            assert TOKEN.encode() not in request.body
    assert {name: (folder / name).read_bytes() for name in hub.arrived()} == hub.arrived()
    assert WEIGHTS in hub.arrived()


def test_a_store_that_is_busy_is_asked_again(hub: FakeHub, folder: Path) -> None:
    hub.busy["/v1/xorbs/"] = 1
    send(hub, folder)
    assert hub.asked("/v1/xorbs/") == 2
    assert hub.arrived()[WEIGHTS] == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("refused", ["/xet-write-token/", "/v1/xorbs/", "/v1/shards"])
def test_a_store_that_refuses_is_told(hub: FakeHub, folder: Path, refused: str) -> None:
    hub.refuse = refused
    with pytest.raises(HubError, match=r"upload to 'somebody/x' failed .*403.*is whole in") as told:
        send(hub, folder)
    assert TOKEN not in str(told.value)
    assert hub.commits == []
