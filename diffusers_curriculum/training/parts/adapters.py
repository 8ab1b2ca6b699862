"""Low-rank adapters (LoRA) by peft: all that is trained, averaged and saved of frozen networks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_curriculum.randomness import key
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import OF_CONFIGS, UsageError, usage_errors
from diffusers_curriculum.training.storage.tensors import save_tensors, write_json

# peft and diffusers.training_utils take seconds to import, which a wrong command line should not
# have to wait for: they are imported where they are used.

# Names of diffusers: of the file, and of what it tells. Written here, as its ``save_lora_weights``
# writes the same with the bytes in an order of their own each time.
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
FOLDER = "lora"  # in checkpoints
_NAME = "default"  # peft's, of the one adapter that a network has here
# What a loader needs to know; the rest of peft's config differs from version to version.
_TOLD = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora")
_KOHYA_ENDS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}


def lora_config(args: Arguments, targets: Sequence[str]) -> Any:
    """peft's description of the adapter that the flags ask for."""
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]

    return LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(targets),
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        init_lora_weights=args.init_lora_weights if args.init_lora_weights != "kaiming" else True,
    )


def check_adapter(args: Arguments, kind: Any, config: Mapping[str, Any]) -> list[str]:
    """Put the adapter into a network of class ``kind`` without weights.

    Args:
        config: of the network.

    Returns:
        Names of the modules that it was put into.

    Raises:
        UsageError: --lora_target_modules names a module that the network lacks or that takes no
            adapter, or peft refuses another setting.
    """
    with torch.device("meta"), usage_errors("--pretrained_model_name_or_path", OF_CONFIGS):
        network = kind.from_config(dict(config))
    names, targets = [name for name, _ in network.named_modules()], args.lora_target_modules
    missing = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if missing:
        ends = sorted({name.rpartition(".")[2] for name in names} - set(map(str, range(100))))
        raise UsageError(
            f"--lora_target_modules is {' '.join(targets)}: no module of the {kind.__name__} ends "
            f"in {missing[0]!r}; its names end in {', '.join(filter(None, ends))}."
        )
    with usage_errors(f"--lora_target_modules {' '.join(targets)} --rank {args.rank}"):
        network.add_adapter(lora_config(args, targets))
    return [name for name, module in network.named_modules() if hasattr(module, "lora_A")]


def check_text_adapters() -> None:
    """Refuse adapters in text encoders where transformers asks for a later peft."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise UsageError(
            f"--train_text_encoder: transformers {version('transformers')} puts adapters into text "
            f"encoders by peft {MIN_PEFT_VERSION} or later, and peft {version('peft')} is "
            "installed: update peft, take an earlier transformers, or drop the flag."
        ) from error


def add_adapters(
    args: Arguments, networks: Mapping[str, Any], targets: Mapping[str, Sequence[str]], seed: int
) -> Adapter:
    """Freeze networks and put an adapter into each, in float32 whatever the dtype of the network.

    Args:
        networks: by the names of parts.
        targets: modules that get one, of each network; the first weights are a function of the
            flags, of these and of the seed.
    """
    from diffusers.training_utils import cast_training_params

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(seed, purpose="adapter") >> 65)
        for part, modules in targets.items():
            networks[part].requires_grad_(False)
            networks[part].add_adapter(lora_config(args, modules))
    adapted = {part: networks[part] for part in targets}
    cast_training_params([*adapted.values()], torch.float32)
    return Adapter(adapted)


class Adapter:
    """The adapters in the networks of a pipeline, as one model.

    It stands where a network does that is trained as a whole: optimizer, averages and checkpoints
    see the adapters' weights alone, by the names that diffusers gives them in a file.

    Args:
        networks: by the names of parts, each with what :func:`add_adapters` put into it.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.networks = dict(networks)
        named = (_named(part, network) for part, network in networks.items())
        self._places = {name: place for each in named for name, place in each}

    @property
    def _weights(self) -> dict[str, nn.Parameter]:
        """The parameters by name, which may be replaced by shards."""
        return {name: getattr(*place) for name, place in self._places.items()}

    @property
    def config(self) -> dict[str, Any]:
        """What tells the adapters besides their weights: rank, alpha, ... by part."""
        return {part: _told(network) for part, network in self.networks.items()}

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [*self._weights.values()]

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The same, by names such as ``unet.mid_block.….to_q.lora_A.weight``."""
        return self._weights.items()

    def state_dict(self) -> dict[str, Tensor]:
        """The same, detached."""
        return {name: weight.detach() for name, weight in self._weights.items()}

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights of all those names back, in place."""
        for name, weight in self.state_dict().items():
            weight.copy_(weights[name])

    def save_pretrained(
        self, folder: str | Path, kohya: Callable[[str], str | None] | None = None
    ) -> None:
        """Write what a pipeline's ``load_lora_weights`` reads, with rank and alpha.

        Args:
            kohya: kohya's name of a module, for a file of such names.
        """
        config = {part: told | {"rank_pattern": {}} for part, told in self.config.items()}
        told = {f"{part}.{k}": v for part, each in config.items() for k, v in each.items()}
        weights, about = self.state_dict(), {_METADATA: json.dumps(told, sort_keys=True)}
        if kohya is not None:
            weights, about = self._in_kohyas_terms(kohya)
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_tensors(Path(folder, WEIGHTS_FILE), weights, **about)

    def save_config(self, folder: str | Path) -> None:
        """Write rank, alpha, ... as config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder, "config.json"), self.config)

    def _in_kohyas_terms(
        self, kohya: Callable[[str], str | None]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Weights by kohya's names, an alpha beside each, and what its files tell of themselves.

        diffusers' ``convert_state_dict_to_kohya`` writes the rank in place of alpha.
        """
        found: dict[str, Tensor] = {}
        for name, weight in self.state_dict().items():
            end = next(end for end in _KOHYA_ENDS if name.endswith(end))
            module = name.removesuffix(end)
            head, part = kohya(module), module.partition(".")[0]
            found[f"{head}{_KOHYA_ENDS[end]}"] = weight
            found[f"{head}.alpha"] = torch.tensor(_alpha(self.config[part]))
        told = next(iter(self.config.values()))
        numbers = {"ss_network_dim": str(told["r"]), "ss_network_alpha": str(_alpha(told))}
        return found, {"ss_network_module": "networks.lora", **numbers}


def _alpha(told: Mapping[str, Any]) -> float:
    """The alpha whose quotient by the rank is the factor of the updates."""
    return told["lora_alpha"] * (math.sqrt(told["r"]) if told["use_rslora"] else 1.0)


def _told(network: Any) -> dict[str, Any]:
    config = network.peft_config[_NAME].to_dict()
    return {
        name: sorted(config[name]) if isinstance(config[name], set) else config[name]
        for name in _TOLD
    }


def _named(part: str, network: Any) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Modules and attributes of the trainable parameters of a network, by their names in a file;
    those of a CLIP are the same for transformers 4, where it has a ``text_model``, and 5, where it
    is one."""
    from peft import get_peft_model_state_dict  # pyright: ignore[reportMissingImports]

    is_flat = part.startswith("text_encoder") and not hasattr(network, "text_model")
    head = f"{part}.text_model" if is_flat else part
    owners = {
        p.data_ptr(): (module, attribute)
        for module in network.modules()
        for attribute, p in module.named_parameters(recurse=False)
        if p.requires_grad
    }
    for name, weight in get_peft_model_state_dict(network, adapter_name=_NAME).items():
        yield f"{head}.{name}", owners[weight.data_ptr()]
