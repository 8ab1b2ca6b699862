"""What a launcher, `accelerate config` and the environment set besides the command line.

A flag is never outranked without a word: what differs is refused, naming both, and what is in
effect is read back and recorded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.run import MIXED_PRECISIONS
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process.attention import attention_of
from diffusers_curriculum.training.process.compilation import compiled_in
from diffusers_curriculum.training.process.sharding import check_sharding, is_on

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
PRECISION = "ACCELERATE_MIXED_PRECISION"
EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
# Variables of accelerate for engines that keep weights and optimizer where only they can save them.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def check_environment(args: Arguments, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what the environment asks for and cannot have, before accelerate acts on it.

    Raises:
        UsageError: another number of micro-batches than the flag's, a precision or an engine that
            is not supported, another name of the experiment.
    """
    for variable, engine in ENGINES.items():
        if is_on(environment, variable):
            raise UsageError(
                f"{variable} is {environment[variable]}, but {engine} is not supported: take "
                "FSDP2, which cuts weights, gradients and moments as ZeRO does (accelerate launch "
                "--use_fsdp --fsdp_version 2), or plain data parallelism."
            )
    check_sharding(args, environment)
    flag = args.gradient_accumulation_steps
    _refuse_another(environment, ACCUMULATION, "gradient_accumulation_steps", flag)
    if args.report_to in ("mlflow", "all"):
        name = "tracker_project_name"
        _refuse_another(environment, EXPERIMENT, args.flag(name), args.tracker_project_name)
    if "mixed_precision" not in args.given:
        _check_precision(environment, args.mixed_precision)


def _check_precision(environment: Mapping[str, str], default: str | None) -> None:
    """Of a command line that leaves it to the launcher, or to the ``default`` of a script."""
    precision = environment.get(PRECISION, "no").lower()
    if precision not in MIXED_PRECISIONS:
        raise UsageError(
            f"{PRECISION} is {precision!r}, which is not supported: choose one of "
            f"{', '.join(MIXED_PRECISIONS)} in `accelerate config`, or give --mixed_precision."
        )
    if default is not None:
        _refuse_another({PRECISION: precision}, PRECISION, "mixed_precision", default)


def check_in_effect(args: Arguments, accelerator: Any) -> None:
    """Refuse to go on if accelerate has not taken over what the command line says.

    Raises:
        UsageError: it counts other micro-batches or computes in another precision, or in fp16 on a
            CPU, where neither autocast nor a gradient scaler would be.
    """
    wanted = {"gradient_accumulation_steps": args.gradient_accumulation_steps}
    if args.mixed_precision is not None:
        wanted["mixed_precision"] = args.mixed_precision
    for name, value in wanted.items():
        found = getattr(accelerator, name)
        if found != value:
            raise UsageError(
                f"--{name} is {value}, but accelerate is set up with {found}, by its configuration "
                "or the environment: make them agree."
            )
    backend = accelerator.state.dynamo_plugin.backend.value
    if args.compile != "none" and backend != "NO":
        raise UsageError(
            f"--compile is {args.compile}, and accelerate compiles by {backend}: drop the flag, or "
            "take dynamo out of `accelerate config` and unset ACCELERATE_DYNAMO_BACKEND."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        source = "--mixed_precision" if args.mixed_precision else f"the launcher's {PRECISION}"
        raise UsageError(
            f"{source} is fp16, which needs a GPU and torch runs on a CPU here: use "
            "--mixed_precision bf16 or no."
        )


def in_effect(accelerator: Any, network: Any = None) -> dict[str, Any]:
    """What a run computes with, as it is after everything was set up; plain data. Of a network,
    what its attention is computed by, where it tells, and what is compiled, where something is."""
    of_network = {"attention": attention_of, "compiled": compiled_in} if network is not None else {}
    told = {name: value for name, of in of_network.items() if (value := of(network)) is not None}
    return told | {
        "device": str(accelerator.device),
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        "autocast": bool(accelerator.native_amp),
        "dynamo_backend": accelerator.state.dynamo_plugin.backend.value,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def _refuse_another(environment: Mapping[str, str], variable: str, flag: str, value: Any) -> None:
    found = environment.get(variable)
    if found is not None and found != str(value):
        raise UsageError(
            f"the environment variable {variable} is {found!r}, but --{flag} is {value!r}: unset "
            f"the variable or give --{flag} {found}."
        )
