"""A network that lies in shards on all processes: FSDP2, as accelerate is told to use it.

accelerate reads its configuration and starts the processes; torch's ``fully_shard`` is called here,
and last of all, as accelerate calls it on GPUs only and forgets what an optimizer holds. Until then
a run is set up, and read from a checkpoint, as on one process; then weights, moments and averages
are cut along their first axis. What is evaluated or saved is whole for as long as that takes.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError

# torch.distributed.fsdp takes a while to import: it is imported where it is used.

logger = logging.getLogger(__name__)

ASKED, VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
_TRUE = ("true", "1", "yes", "y", "on", "t")
# What accelerate's configuration may ask for besides, and what to do instead.
_UNKNOWN = {
    "FSDP_OFFLOAD_PARAMS": "set fsdp_offload_params: false",
    "FSDP_ACTIVATION_CHECKPOINTING": "give --gradient_checkpointing in its place",
}
# Arguments whose other values than the default work on whole tensors.
_WHOLE = ("compile", "optimizer", "use_8bit_adam", "offload_ema", "foreach_ema", "quantize_base")
_WHOLE += ("bnb_quantization_config_path",)
# Blocks of networks that do not tell theirs; DiT calls the embeddings inside its first one by
# themselves, too.
_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "CombinedTimestepLabelEmbeddings")


def is_on(environment: Mapping[str, str], variable: str) -> bool:
    """Whether a variable says yes."""
    return environment.get(variable, "").lower() in _TRUE


def check_sharding(args: Arguments, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what is asked for beside FSDP2 and does not go with it, or another version of it.

    Raises:
        UsageError: names the variable or flag, and the remedy.
    """
    if not is_on(environment, ASKED):
        return
    version = environment.get(VERSION, "1")
    if version != "2":
        raise UsageError(
            f"{ASKED} is {environment[ASKED]} and {VERSION} is {version}, which is not supported: "
            "set fsdp_version: 2 in accelerate's configuration, or start by accelerate launch "
            "--use_fsdp --fsdp_version 2."
        )
    for variable, remedy in _UNKNOWN.items():
        if is_on(environment, variable):
            value = environment[variable]
            raise UsageError(f"{variable} is {value}, which is not supported: {remedy}.")
    for flag in args.flags:
        value = args[flag.dest]
        if flag.dest in _WHOLE and value != flag.default:
            raise UsageError(
                f"--{flag.name} is {'set' if value is True else value}, which does not go with "
                f"the shards of FSDP2: drop it, or unset {ASKED}."
            )


def sharding_plugin(environment: Mapping[str, str] = os.environ) -> Any:
    """What accelerate is told of FSDP2 where the environment asks for it; else None.

    Weights are gathered in float32 and precision is left to autocast, as on one process. Every
    process reads its models itself, whatever the default of the launcher.

    Raises:
        UsageError: torch or accelerate are too old.
    """
    if not is_on(environment, ASKED):
        return None
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

    try:
        _ = FSDPModule.set_reshard_after_forward
        return FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=MixedPrecisionPolicy(),
        )
    except (AttributeError, TypeError) as error:
        raise UsageError(f"{ASKED}: torch or accelerate is too old for FSDP2: {error}.") from error


def put_in_effect(accelerator: Any, plugin: Any) -> None:
    """Let accelerate know of FSDP2 on a CPU too, where it knows of plain processes only.

    Raises:
        UsageError: there is one process without a launcher, or another kind of device.
    """
    if plugin is None:
        return
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = plugin
        for state in (PartialState(), accelerator.state):  # the second is made anew from the first
            state.distributed_type = DistributedType.FSDP
    if not accelerator.is_fsdp2:
        raise UsageError(
            f"{ASKED} is set, and accelerate runs {accelerator.distributed_type.value}: start it "
            "by accelerate launch or torchrun on CPUs or GPUs, or unset the variable."
        )


def is_sharded(accelerator: Any) -> bool:
    """Whether networks are to lie in shards."""
    return getattr(accelerator, "is_fsdp2", False)


def prepared(accelerator: Any, network: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """Network and optimizer as accelerate prepares them, still whole where they will be shards."""
    if not is_sharded(accelerator):
        return accelerator.prepare(network, optimizer)
    whole = accelerator.prepare_model(network, evaluation_mode=True)  # without DDP
    return whole, accelerator.prepare_optimizer(optimizer)


def shard(accelerator: Any, network: nn.Module, optimizer: Any) -> None:
    """Cut the weights of a network, and what its optimizer holds of them, in place; the parameters
    are other objects then. Every process calls it, with the same values."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    before, blocks = dict(network.named_parameters()), _blocks(network)
    for block in reversed(blocks):  # those inside others first
        fully_shard(block, mesh=mesh, reshard_after_forward=_let_go())
    fully_shard(network, mesh=mesh)
    after = dict(network.named_parameters())
    cut = {parameter: after[name] for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [cut[parameter] for parameter in group["params"]]
    for parameter in [*optimizer.state]:
        entries = optimizer.state.pop(parameter)
        like = cut[parameter]
        optimizer.state[like] = {key: shard_of(value, like) for key, value in entries.items()}
    kinds = Counter(type(block).__name__ for block in blocks)
    units = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    logger.info("network in %d shards, by blocks: %s", mesh.size(), units or "none")


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that are made whole one after the other, as its models tell."""
    names = {*_BLOCKS}
    for module in network.modules():
        names |= {*(getattr(module, "_no_split_modules", None) or ())}
    return [m for m in network.modules() if type(m).__name__ in names and m is not network]


def _let_go(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether blocks are whole for their own forward and backward pass only."""
    return environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in _TRUE


def shard_of(value: Any, parameter: Any) -> Any:
    """This process's part of a tensor that is laid as a parameter is; anything else as it is."""
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def whole_tensor(tensor: Any) -> Any:
    """A tensor of which all processes hold shards, on each of them; anything else as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def gathered(holders: Iterable[Any], keep: bool) -> Iterator[None]:
    """Inside the block, whole tensors on the host stand in the place of shards.

    Args:
        holders: lists, and dicts, of tensors; every process gives the same.
        keep: whether this process wants them.
    """
    places = [
        (holder, key, value)
        for holder in holders
        for key, value in (holder.items() if isinstance(holder, dict) else enumerate(holder))
        if hasattr(value, "full_tensor")
    ]
    try:
        for holder, key, value in places:
            whole = value.full_tensor()
            if keep:
                holder[key] = whole.cpu()
        yield
    finally:
        for holder, key, value in places:
            holder[key] = value


def _unmoved(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """In place of ``_apply``: a to(device) would cut the weights again, and on a CPU, which torch
    takes for another device than cpu:0, part what is computed with from what is gathered."""
    return module


@contextmanager
def whole(network: Any) -> Iterator[None]:
    """Inside the block a network has all its weights on every process, which may each call and save
    it by itself; every process enters. Nothing is done with one that is not in shards."""
    if not hasattr(network, "unshard"):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in network.modules() if isinstance(module, FSDPModule)]
    kinds = {unit: type(unit) for unit in units}
    for unit, kind in kinds.items():
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
        unit.__dict__["_apply"] = MethodType(_unmoved, unit)
        # a saved config has the name of the class
        unit.__class__ = next(k for k in kind.__mro__ if not issubclass(k, FSDPModule))
    # FSDP2 would cut the weights again at the sight of a state_dict()
    hooks = {module: module._state_dict_pre_hooks for module in network.modules()}
    try:
        for module in hooks:
            module._state_dict_pre_hooks = OrderedDict()
        yield
    finally:
        for module, own in hooks.items():
            module._state_dict_pre_hooks = own
        for unit, kind in kinds.items():
            del unit.__dict__["_apply"]
            unit.__class__ = kind
            unit.reshard()
            unit.set_reshard_after_forward(unit is not network and _let_go(), recurse=False)
