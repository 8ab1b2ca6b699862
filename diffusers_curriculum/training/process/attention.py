"""Which attention a network computes with: asked for, and looked at after it was set."""

from __future__ import annotations

from typing import Any

from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch import nn

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.run import ATTENTIONS
from diffusers_curriculum.training.errors import UsageError

# diffusers' names of what its dispatcher serves; networks that do not use it know two only.
BACKENDS = {name: f"_native_{name}" for name in ("cudnn", "efficient", "math")}
BACKENDS |= {"sdpa": "native", "xformers": "xformers", "flash": "flash", "flex": "flex"}
_NAMES = {backend: name for name, backend in BACKENDS.items()}
_OF_TRANSFORMERS = "_attn_implementation"  # in the config of a language model
_SLOT = "_attention_backend"  # of a processor that asks the dispatcher


def choose_attention(args: Arguments, network: nn.Module) -> None:
    """Let a network compute its attention as the command line asks; nothing is asked: as it is.

    diffusers' ``set_attention_backend`` does nothing, and says nothing, where processors do not ask
    its dispatcher, as those of UNets and DiT: so the outcome is looked at.

    Raises:
        UsageError: it cannot, or does not.
    """
    name = "xformers" if args.enable_xformers_memory_efficient_attention else args.attention
    if name is None:
        return
    kind, model = type(network).__name__, _Model(network)
    if not model.processors:
        raise UsageError(f"--attention is {name}, and {kind} has no attention: drop the flag.")
    try:
        model.set(name)
    except (ImportError, RuntimeError, ValueError) as error:
        raise UsageError(f"--attention is {name}, which {kind} cannot use here: {error}") from error
    found = attention_of(network)
    if found != name:
        raise UsageError(
            f"--attention is {name}, and that of {kind} is {found}: give one that it can use "
            f"({', '.join(model.known)})."
        )


def attention_of(network: Any) -> str | None:
    """What a network's attention is computed by, as its processors tell, or the config of a model
    of transformers; several are joined by commas, and a network without gives None."""
    found = {_name(processor) for processor in _Model(network).processors}
    configs = (getattr(module, "config", None) for module in network.modules())
    own = (getattr(config, _OF_TRANSFORMERS, None) for config in configs)
    found |= {name for name in own if name is not None}
    return ", ".join(sorted(found)) or None


class _Model:
    """A network, as far as its attention is concerned."""

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        own = (getattr(module, "processor", None) for module in network.modules())
        self.processors = [processor for processor in own if processor is not None]
        self.is_dispatched = any(hasattr(processor, _SLOT) for processor in self.processors)
        self.known = ATTENTIONS if self.is_dispatched else ("sdpa", "xformers")

    def set(self, name: str) -> None:
        if self.is_dispatched:
            self.network.set_attention_backend(BACKENDS[name])
        elif name == "xformers":
            self.network.enable_xformers_memory_efficient_attention()


def _name(processor: Any) -> str:
    kind = type(processor).__name__
    if hasattr(processor, _SLOT):
        backend = getattr(processor, _SLOT) or DIFFUSERS_ATTN_BACKEND
        word = str(getattr(backend, "value", backend))
        return _NAMES.get(word, word)
    if "XFormers" in kind:
        return "xformers"
    return "sdpa" if kind.endswith("2_0") else kind
