"""Compiled graphs of the network that is trained, and whether their gradients are its own."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

_BLOCKS = ("BasicTransformerBlock",)  # of networks that do not tell, such as DiT
# Largest error of a tensor's gradient, as a share of it or of a tenth of the whole gradient. A
# wrong one is off by all of it; rounding by 1e-6 in float32, 1e-2 in bfloat16.
_LARGEST_ERROR = 0.1


def compile_network(args: Arguments, network: nn.Module) -> None:
    """Let a network, or each of its repeated blocks, be compiled when it is first called, as the
    command line asks; in place, so that its weights keep their names and owners.

    Raises:
        UsageError: it has no repeated blocks.
    """
    if args.compile == "none":
        return
    model: Any = _model_in(network)
    chosen = [model] if args.compile == "full" else _repeated_blocks(model)
    if not chosen:
        raise UsageError(
            f"--compile is blocks, and {type(model).__name__} has no repeated blocks: give "
            "--compile full, or drop the flag."
        )
    from torch._inductor import list_mode_options  # here, as it takes a second

    # a mode is a name for options, and dropout draws what it draws without a compiler
    options = list_mode_options(args.compile_mode or "default") | {"fallback_random": True}
    for module in chosen:
        module.compile(options=options)


def compiled_in(network: nn.Module) -> str | None:
    """What of a network is compiled, such as "16 BasicTransformerBlock"; None: nothing."""
    kinds = Counter(type(m).__name__ for m in network.modules() if m._compiled_call_impl)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or None


def uncompiled(args: Arguments) -> AbstractContextManager[Any]:
    """Inside the block networks run as they are: pictures and measurements, whose batches have
    sizes of their own, wait for no compiler, and compare between runs."""
    if args.compile == "none":
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def check_gradients(args: Arguments, network: nn.Module, step: Callable[[], object]) -> None:
    """Compare the gradients of compiled graphs with those of the network as it is, for compilers
    are known to get some wrong without a word.

    Args:
        step: calls the network as an update does, and is left there: it must not have changed
            anything by then.

    Raises:
        UsageError: they differ by more than rounding, or there are none.
    """
    model = _model_in(network)

    def compare(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        hook.remove()
        with _stirred(model):
            plain = _gradients(model, inputs, named)
            with torch.compiler.set_stance("default"), _compiling(args):
                compiled = _gradients(model, inputs, named)
        _refuse_difference(args, plain, compiled)
        raise _Compared

    hook = model.register_forward_pre_hook(compare, with_kwargs=True)
    with uncompiled(args), suppress(_Compared):
        step()


@contextmanager
def _compiling(args: Arguments) -> Iterator[None]:
    from torch._dynamo.exc import BackendCompilerFailed  # here, as it takes a second

    try:
        yield
    except BackendCompilerFailed as error:
        where = os.environ.get(
            "TORCHINDUCTOR_CACHE_DIR", "torchinductor_... of the temporary files"
        )
        what = " ".join(str(error).splitlines()[:2])
        raise UsageError(
            f"--compile is {args.compile}, and the compiler fails ({what}). "
            f"One that was killed may have left a file cut short: delete the folder {where}, or "
            "drop the flag."
        ) from error


class _Compared(Exception):
    """There is no need to go on."""


@contextmanager
def _stirred(model: nn.Module) -> Iterator[None]:
    """Weights by which every part has a gradient, where those that begin at 0 would stop it."""
    kept = {p: p.detach().to("cpu", copy=True) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            wave = torch.arange(p.numel(), device=p.device).cos() / p.numel() ** 0.5
            p.add_(wave.reshape(p.shape))
        try:
            with torch.enable_grad():
                yield
        finally:
            for tensor, before in kept.items():
                tensor.copy_(before)


def _gradients(
    model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Of half the mean square of what the network tells, on the host; its buffers stay."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device = next(iter(weights.values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        told = model(*inputs, **named)
    parts = told.values() if isinstance(told, Mapping) else told
    parts = [parts] if isinstance(parts, Tensor) else [p for p in parts if isinstance(p, Tensor)]
    errors = [part.detach() / part.numel() ** 0.5 for part in parts]
    found = torch.autograd.grad(parts, [*weights.values()], errors, allow_unused=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # which may be other tensors by now
            buffer.copy_(before[name])
    zero = torch.zeros(())
    return {name: zero if g is None else g.cpu() for name, g in zip(weights, found, strict=True)}


def _refuse_difference(
    args: Arguments, plain: Mapping[str, Tensor], compiled: Mapping[str, Tensor]
) -> None:
    length = torch.linalg.vector_norm
    norms = {name: float(length(gradient)) for name, gradient in plain.items()}
    whole = float(length(torch.tensor([*norms.values()])))
    if not math.isfinite(whole):
        logger.warning("Compiled gradients cannot be compared: they are not finite.")
        return
    errors = {
        name: float(length(compiled[name].float() - plain[name].float())) / max(norm, whole / 10)
        for name, norm in norms.items()
    }
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= _LARGEST_ERROR:
        raise UsageError(
            f"--compile is {args.compile}, and the gradient of {worst} that comes from its graphs "
            f"is off by {errors[worst]:.0%}: torch {torch.__version__} compiles this network "
            "wrongly. Give another of none, blocks and full, or take another version of torch."
        )
    logger.info("compiled gradients differ by %.1g at most", errors[worst])


def _model_in(network: nn.Module) -> nn.Module:
    """The model of diffusers that a network is, or has beside others."""
    return next((m for m in network.modules() if isinstance(m, ModelMixin)), network)


def _repeated_blocks(model: Any) -> list[nn.Module]:
    names = getattr(model, "_repeated_blocks", ()) or _BLOCKS
    return [module for module in model.modules() if type(module).__name__ in names]
