"""Flags that save memory: captions encoded once, parts that wait on the host, a base in fewer bits.
What is trained stays the same, and nothing that is saved tells of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from torch import nn

from diffusers_curriculum.training.parts.adapters import WEIGHTS_FILE
from diffusers_curriculum.training.parts.families.base import ModelFamily
from tests.scripts.small_runs import BENCHES, Bench, Record, adapted, finite, hashes, status

STEPS = ("--max_train_steps", 3, "--lr_warmup_steps", 0)
SCRIPTS = ["text_to_image", "text_to_image_sdxl", "text_to_image_lora"]


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each script of captions but the one of flow matching, which has tests of its own."""
    return BENCHES[request.param](tmp_path_factory.mktemp("bench"))


@pytest.fixture
def lora(bench: Bench) -> Bench:
    """An adapter in the small pipeline."""
    return adapted(bench)


def losses(record: Record) -> list[float]:
    return [float.fromhex(loss) for loss in record.losses]


# -- captions encoded once -------------------------------------------------------------------------


def test_captions_encoded_once_give_the_same_run(script: Bench, tmp_path: Path) -> None:
    prompt = "--validation_prompts" if "--validation_prompts" not in script.words else None
    one = ("--validation_prompt", "a bird", "--num_validation_images", 1)
    told = (prompt, "a bird") if prompt else one
    more = (*STEPS, "--caption_dropout", 0.3, *told)
    kept = script.train(tmp_path / "kept", *more, "--cache_text_embeddings")
    plain = script.train(tmp_path / "plain", *more)
    assert kept.last.models.encoders == {}
    assert plain.last.models.encoders
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-4)
    assert (tmp_path / "kept" / "val_imgs_grid.png").is_file()  # encoders are read again for it
    shutil.rmtree(tmp_path / "kept" / "captions")
    assert hashes(tmp_path / "kept").keys() == hashes(tmp_path / "plain").keys()


def test_every_phrasing_is_encoded(bench: Bench, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(bench.images, images)
    rows = [json.loads(row) for row in (images / "metadata.jsonl").read_text().splitlines()]
    texts = [[f"{row['text']} {n}" for n in range(2)] for row in rows]
    rows = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ("--train_data_dir", images, *STEPS, "--cache_text_embeddings")
    record = bench.train(tmp_path / "run", *more, "--text_cache_dir", tmp_path / "cache")
    assert record.last.captions.kept.keys() == {text for each in texts for text in each}
    assert not (tmp_path / "run" / "captions").exists()


def test_a_run_with_kept_captions_goes_on_bit_for_bit(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--lr_warmup_steps", 0)
    more += ("--caption_dropout", 0.3, "--cache_text_embeddings", "--text_cache_dir")
    whole = bench.train(tmp_path / "whole", *more, tmp_path / "cache")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = (*more, tmp_path / "cache", "--resume_from_checkpoint", "latest")
    with pytest.MonkeyPatch.context() as patch:  # nothing is encoded anew
        patch.setattr("diffusers_curriculum.training.cache.captions._Shards", None)
        rest = bench.train(tmp_path / "again", *resumed)
    assert rest.losses == whole.losses[2:]
    last = tmp_path / "whole" / "checkpoint-4"
    assert hashes(tmp_path / "again" / "checkpoint-4") == hashes(last)

    # a cache of another pipeline's text encoder is refused
    other = tmp_path / "other"
    shutil.copytree(bench.pipeline, other)
    file = other / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    pipeline = ("--pretrained_model_name_or_path", other)
    argv = bench.argv(tmp_path / "new", *more, tmp_path / "cache", *pipeline)
    assert status(argv, bench.script) == 2
    assert "text cache" in capsys.readouterr().err


# -- parts that wait on the host -------------------------------------------------------------------


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which models are moved, and where to; the device has another name than the host."""
    monkeypatch.setattr(Accelerator, "device", property(lambda _: torch.device("cpu:0")))
    seen: list[tuple[str, str]] = []
    to = nn.Module.to

    def noting(module: nn.Module, *args: Any, **named: Any) -> Any:
        seen.append((type(module).__name__, str((*args, *named.values())[0])))
        return to(module, *args, **named)

    monkeypatch.setattr(nn.Module, "to", noting)
    return seen


def places(moved: list[tuple[str, str]], kind: str) -> list[str]:
    return [place for name, place in moved if name == kind]


def test_what_is_offloaded_comes_for_each_batch_and_goes(
    script: Bench, tmp_path: Path, moved: list[tuple[str, str]]
) -> None:
    plain = script.train(tmp_path / "plain", *STEPS)
    assert {*places(moved, "AutoencoderKL"), *places(moved, "CLIPTextModel")} == {"cpu:0"}
    moved.clear()
    flag = "--offload_models" if script.script.startswith("train_") else "--offload"
    waiting = script.train(tmp_path / "waiting", *STEPS, flag)
    assert waiting.losses == plain.losses
    for kind in ("AutoencoderKL", "CLIPTextModel"):
        found = places(moved, kind)
        assert found[-1] == "cpu"
        assert found[-6:] == ["cpu:0", "cpu"] * 3  # the last three batches
    trained = Counter(places(moved, "UNet2DConditionModel"))
    assert not trained["cpu"]


# -- parts that have encoded all -------------------------------------------------------------------


def test_what_only_encodes_is_not_loaded_where_all_is_kept(
    script: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (*STEPS, "--cache_latents", "--latent_cache_dir", tmp_path / "latents")
    more = (*more, "--cache_text_embeddings", "--text_cache_dir", tmp_path / "captions")
    first = script.train(tmp_path / "first", *more)
    loaded, load = list[str](), ModelFamily.load_part

    def noted(family: Any, args: Any, part: str, *rest: Any, **more: Any) -> Any:
        loaded.append(part)
        return load(family, args, part, *rest, **more)

    monkeypatch.setattr(ModelFamily, "load_part", noted)
    again = script.train(tmp_path / "again", *more)
    assert again.losses == first.losses
    assert loaded == ["unet"]
    left = [hashes(tmp_path / name) for name in ("first", "again")]
    assert left[0] | {"run.json": ""} == left[1] | {"run.json": ""}


def test_an_autoencoder_is_back_for_pictures_and_kept_for_held_out_images(tmp_path: Path) -> None:
    sdxl = BENCHES["text_to_image_sdxl"](tmp_path / "bench")
    more = (*STEPS, "--cache_latents", "--latent_cache_dir", tmp_path / "latents")
    told = ("--validation_prompt", "a bird", "--num_validation_images", 1, "--validation_steps", 1)
    drawn = sdxl.train(tmp_path / "drawn", *more, *told)
    assert not drawn.last.models.has_vae
    assert (tmp_path / "drawn" / "val_imgs_grid.png").is_file()
    shutil.rmtree(tmp_path / "latents")
    held = ("--validation_split", 0.3, "--validation_loss_steps", 1)
    watched = sdxl.train(tmp_path / "held", *more, *held)
    assert watched.last.models.vae_waits
    assert (tmp_path / "held" / "validation_loss.jsonl").is_file()


# -- a base in fewer bits --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8wo", "float8wo"])
def test_a_base_in_8_bits(lora: Bench, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchao")
    few = (*STEPS, "--checkpointing_steps", 1, "--quantize_base", kind)
    whole = lora.train(tmp_path / "whole", *few)
    plain = lora.train(tmp_path / "plain", *STEPS)
    assert finite(whole)
    assert losses(whole) != losses(plain)
    assert losses(whole) == pytest.approx(losses(plain), rel=0.05)

    # only linear layers are, and no adapter
    network = whole.last.models.network
    kinds = {
        type(module).__name__: type(module.weight)
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert kinds["Conv2d"] is nn.Parameter
    assert kinds["Linear"] is not nn.Parameter
    assert {weight.dtype for weight in whole.last.weights.parameters()} == {torch.float32}

    # resumed bit for bit; a base of another kind is refused
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")
    resumed = ("--resume_from_checkpoint", "latest")
    rest = lora.train(tmp_path / "parts", *few, *resumed)
    assert rest.losses == whole.losses[1:]
    left = [(tmp_path / name / WEIGHTS_FILE).read_bytes() for name in ("whole", "parts")]
    assert left[0] == left[1]
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["facts"]["model"]["quantization"] == kind
    assert status(lora.argv(tmp_path / "whole", *STEPS, *resumed), lora.script) == 2

    # what is left loads onto the base in full
    pipeline = StableDiffusionPipeline.from_pretrained(lora.pipeline, safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path / "whole"), weight_name=WEIGHTS_FILE)
    assert pipeline.get_active_adapters()
