"""How many bits the base of an adapter is kept in: what is asked for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.quantization import quantization_facts, quantized
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora


def arguments(*more: object, machine: bool = False) -> Any:
    base = ("--pretrained_model_name_or_path", "a/b", "--dataset_name", "some/data")
    return TextToImageLora().parse([*base, *map(str, more)], machine=machine)


def settings(folder: Path, text: str) -> Path:
    (folder / "bits.json").write_text(text)
    return folder / "bits.json"


def test_a_base_in_full_is_told_nowhere() -> None:
    args = arguments()
    assert quantization_facts(args) == {}
    assert quantized(args, torch.float32) == {}


def test_products_of_4_bits_are_computed_in_the_type_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = quantized(arguments("--quantize_base", "4bit"), torch.bfloat16)["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    path = settings(tmp_path, '{"load_in_8bit": true}')
    args = arguments("--bnb_quantization_config_path", path)
    assert quantized(args, torch.bfloat16)["quantization_config"].load_in_8bit
    assert quantization_facts(args) == {"quantization": {"load_in_8bit": True}}


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"load_in_4bit": false}'])
def test_settings_that_ask_for_nothing_are_refused(tmp_path: Path, text: str) -> None:
    args = arguments("--bnb_quantization_config_path", settings(tmp_path, text))
    with pytest.raises(UsageError, match=r"--bnb_quantization_config_path .*bits\.json"):
        quantization_facts(args)


def test_two_kinds_are_refused(tmp_path: Path) -> None:
    path = settings(tmp_path, json.dumps({"load_in_4bit": True}))
    with pytest.raises(UsageError, match=r"--quantize_base 8bit and --bnb_.* drop one of"):
        arguments("--quantize_base", "8bit", "--bnb_quantization_config_path", path)


@pytest.mark.parametrize(("kind", "package"), [("4bit", "bitsandbytes"), ("int8wo", "torchao")])
def test_without_its_package_a_kind_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    monkeypatch.setattr(environment, "installed", lambda name: name != package)
    with pytest.raises(UsageError, match=rf"{kind} needs {package}: pip install .*\[quantization"):
        arguments("--quantize_base", kind, machine=True)


def test_bitsandbytes_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", lambda name: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="4bit needs a CUDA device and torch sees none"):
        arguments("--quantize_base", "4bit", machine=True)
    arguments("--quantize_base", "int8wo", machine=True)
