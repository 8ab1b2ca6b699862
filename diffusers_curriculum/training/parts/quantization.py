"""The frozen base of an adapter in fewer bits, by bitsandbytes or torchao through diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError, usage_errors

_BY_BITSANDBYTES = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8bit": {"load_in_8bit": True},
}
_BY_TORCHAO = {"int8wo": "Int8WeightOnlyConfig", "float8wo": "Float8WeightOnlyConfig"}


def quantization_facts(args: Arguments) -> dict[str, Any]:
    """What tells the kind of the base, as plain data; nothing for one in full.

    Raises:
        UsageError: a file of settings cannot be read, or asks for no fewer bits.
    """
    if args.bnb_quantization_config_path is not None:
        return {"quantization": _read(args.bnb_quantization_config_path)}
    return {} if args.quantize_base is None else {"quantization": args.quantize_base}


def quantized(args: Arguments, dtype: torch.dtype) -> dict[str, Any]:
    """What the base is loaded with, for its ``from_pretrained``; nothing for one in full.

    Args:
        dtype: that products with it are computed in.

    Raises:
        UsageError: the installed packages refuse it.
    """
    kind = args.quantize_base
    path = args.bnb_quantization_config_path
    if kind is None and path is None:
        return {}
    with usage_errors("--bnb_quantization_config_path" if path else f"--quantize_base {kind}"):
        if kind in _BY_TORCHAO:
            import torchao.quantization as ao  # pyright: ignore[reportMissingImports]

            config = diffusers.TorchAoConfig(getattr(ao, _BY_TORCHAO[str(kind)])())
        else:
            settings = _read(path) if path else dict(_BY_BITSANDBYTES[str(kind)])
            if settings.get("load_in_4bit"):
                settings["bnb_4bit_compute_dtype"] = dtype
            config = diffusers.BitsAndBytesConfig(**settings)
    return {"quantization_config": config}


def _read(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--bnb_quantization_config_path {path} cannot be read as JSON ({error})."
        ) from error
    wanted = ("load_in_4bit", "load_in_8bit")
    if not isinstance(settings, dict) or not any(settings.get(name) for name in wanted):
        raise UsageError(
            f"--bnb_quantization_config_path {path}: it must hold an object with load_in_4bit or "
            "load_in_8bit true."
        )
    return settings
