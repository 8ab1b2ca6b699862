"""All that training needs to go on exactly where it stopped, written to and read from a folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffusers_curriculum.training.checkpoint.optimizer import (
    check_optimizer_state,
    load_optimizer_state,
    optimizer_state,
    own_numbers,
)
from diffusers_curriculum.training.errors import CheckpointError
from diffusers_curriculum.training.process import sharding
from diffusers_curriculum.training.storage.manifest import verify_checkpoint
from diffusers_curriculum.training.storage.tensors import (
    check_tensors,
    conform,
    load_tensors,
    pack,
    read_json,
    save_tensors,
    unpack,
    write_json,
)

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

logger = logging.getLogger(__name__)

_Json = Mapping[str, Any]
FORMAT = 1
STATE_FILE = "training_state.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # diffusers' name
# foreach is no state; shadow_params are weights and stand in their own file.
_EMA_START = {"optimization_step": 0, "cur_decay_value": None}  # its position
_EMA_NUMBERS = (
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
    "cur_decay_value",
)
POWER_EMA = "tracker_power_ema"
# Flags of torch's schedules while they step; which of them there are differs among its versions.
_FLAGS_OF_TORCH = {"verbose", "_is_initial", "_get_lr_called_within_step"}


class Stateful(Protocol):
    """Anything whose state is tensors, plain numbers, strings, and lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def starts_afresh(name: str, renew: Collection[str]) -> bool:
    """Whether a part is not to be taken from the checkpoint; "trackers" means all of them but the
    averaged weights, which are no statistics."""
    statistics = name.startswith("tracker_") and name != POWER_EMA
    return name in renew or ("trackers" in renew and statistics)


def load_part(part: Stateful, state: dict[str, Any], name: str) -> None:
    """Give a part its state back; an error has its name."""
    try:
        part.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint's {name} does not fit this run: {error}") from error


@dataclass
class TrainingState:
    """The live objects of a run.

    The main process calls :meth:`write`, through ``save_checkpoint``, while the others wait; every
    process calls :meth:`read`.

    Attributes:
        model: the trained model, unwrapped; a diffusers model with ``save_pretrained``.
        sampler: a Stateful, or None where there is none.
        trackers: more state by name (letters, digits, underscores).
        model_name: the model's folder in a checkpoint; its average goes to ``<model_name>_ema``.
        network: what the model is a part of, such as that of an adapter; None: itself.
    """

    model: Any
    optimizer: Optimizer
    lr_scheduler: Any
    sampler: Any
    ema: EMAModel | None = None
    scaler: torch.amp.GradScaler | None = None
    trackers: Mapping[str, Stateful] = field(default_factory=dict)
    model_name: str = "unet"
    network: Any = None

    @contextmanager
    def whole(self, keep: bool) -> Iterator[None]:
        """Inside the block, what lies in shards is whole on the processes that ``keep`` it; every
        process enters."""
        averages = getattr(self.trackers.get("power_ema"), "averages", {})
        shadows = [] if self.ema is None else [self.ema.shadow_params]
        holders = [*self.optimizer.state.values(), *shadows, *averages.values()]
        with sharding.whole(self.network), sharding.gathered(holders, keep):
            yield

    def nbytes(self) -> int:
        """Bytes of models, averages and optimizer: about the size of a checkpoint."""
        entries = (entry for state in self.optimizer.state.values() for entry in state.values())
        shadows = self.ema.shadow_params if self.ema is not None else []
        held = [*self.model.state_dict().values(), *shadows, *entries]
        own = sum(item.nbytes for item in held if isinstance(item, Tensor))
        # of other parts, averaged weights are large, and say how large
        return own + sum(getattr(part, "nbytes", lambda: 0)() for part in self.trackers.values())

    def write(self, folder: str | Path, step: int) -> None:
        """Write the state after optimizer step ``step`` into an empty folder.

        Raises:
            CheckpointError: a part's state cannot be stored.
            RuntimeError: the model holds averaged or other borrowed weights just now.
        """
        folder = Path(folder)
        if self.ema is not None and self.ema.temp_stored_params is not None:
            raise RuntimeError("The averaged weights are swapped in: call ema.restore() first.")
        self.model.save_pretrained(folder / self.model_name)
        document: dict[str, Any] = {"format": FORMAT, "step": step, "parts": {}}
        if self.ema is not None:
            document["ema"] = self._write_ema(self.ema, folder / f"{self.model_name}_ema")
        tensors, document["optimizer"] = optimizer_state(self.optimizer)
        save_tensors(folder / "optimizer.safetensors", tensors)
        for name, part in self._parts().items():
            tensors = {}
            document["parts"][name] = pack(part.state_dict(), tensors, name)
            if tensors:
                save_tensors(folder / f"{name}.safetensors", tensors)
        write_json(folder / STATE_FILE, document)

    def read(self, folder: str | Path, renew: Collection[str] = ()) -> int:
        """Restore everything from a checkpoint, and return its optimizer step.

        Everything is verified, read into memory and compared with the live objects before the
        first of them changes. What was chosen for this run holds: learning rate and its course,
        hyperparameters, decays of averages. The checkpoint gives the moments, the averages, and
        the positions.

        Args:
            renew: parts, such as "sampler" and "trackers", that start afresh instead.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit this run.
        """
        folder = Path(folder)
        manifest = verify_checkpoint(folder)
        document = self._document(folder, manifest, renew)
        changes = self._read_parts(folder, document, manifest["files"], renew)
        saved = load_tensors(folder / "optimizer.safetensors"), document["optimizer"]
        check_optimizer_state(self.optimizer, *saved)
        changes.append(partial(load_optimizer_state, self.optimizer, *saved))
        weights = _load_weights(folder, self.model_name, manifest["files"])
        check_tensors(weights, self.model.state_dict(), self.model_name)
        changes.append(partial(self.model.load_state_dict, weights))
        if self.ema is not None and "ema" in document:
            changes.append(self._read_ema(self.ema, folder, document, manifest["files"]))
        elif self.ema is not None:
            changes.append(partial(_set_ema, self.ema, [*self.model.parameters()], _EMA_START))
        changes.append(own_numbers(self.optimizer, self.lr_scheduler))
        for change in changes:
            change()
        return document["step"]

    def _parts(self) -> dict[str, Stateful]:
        """Everything but models and optimizer, by name; first those that may refuse a state."""
        named: dict[str, Any] = {"sampler": self.sampler}
        named |= {f"tracker_{name}": tracker for name, tracker in self.trackers.items()}
        named |= {"lr_scheduler": self.lr_scheduler, "scaler": self.scaler}
        for name in named:
            if not re.fullmatch(r"\w+", name, re.ASCII):
                raise CheckpointError(f"{name!r} is no file name: use letters, digits and _.")
        return {name: part for name, part in named.items() if part is not None}

    def _document(self, folder: Path, manifest: _Json, renew: Collection[str]) -> dict[str, Any]:
        """The JSON part of the state, if it has the parts that this run needs, no more, no less."""
        if STATE_FILE not in manifest["files"]:
            raise CheckpointError(f"{folder} holds no training state: {STATE_FILE} is missing.")
        document = read_json(folder / STATE_FILE)
        if document.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder / STATE_FILE} has format {document.get('format')!r}, this version reads "
                f"{FORMAT}: update diffusers-curriculum."
            )
        saved = {*document["parts"], *({"ema"} & document.keys())}
        live = {*self._parts(), *(("ema",) if self.ema is not None else ())}
        # the precision may change: a scaler that is new, or no longer needed
        if {name for name in saved ^ live if not starts_afresh(name, renew)} - {"scaler"}:
            raise CheckpointError(
                f"{folder} does not fit this run: only the checkpoint has {sorted(saved - live)}, "
                f"only the run has {sorted(live - saved)}. Resume with the arguments of the run "
                "that wrote it (--use_ema)."
            )
        return document

    def _read_parts(
        self, folder: Path, document: _Json, files: _Json, renew: Collection[str]
    ) -> list[Callable[[], object]]:
        changes: list[Callable[[], object]] = []
        for name, part in self._parts().items():
            if starts_afresh(name, renew) or name not in document["parts"]:
                logger.warning("The state of %s is not that of the checkpoint: a fresh one.", name)
                continue
            file = f"{name}.safetensors"
            tensors = load_tensors(folder / file) if file in files else {}
            saved = unpack(document["parts"][name], tensors)
            live = part.state_dict()
            if name == "sampler":
                saved = self.sampler.upgraded(saved)
            elif name == "lr_scheduler":
                saved = {key: saved[key] for key in saved.keys() - _FLAGS_OF_TORCH}
                saved |= {key: live[key] for key in live.keys() & _FLAGS_OF_TORCH}
            changes.append(partial(load_part, part, conform(saved, live, name), name))
        return changes

    def _averaged(self, ema: EMAModel) -> dict[str, Tensor]:
        """The state dict of the average: its own parameters, the model's buffers."""
        names = [name for name, _ in self.model.named_parameters()]
        return self.model.state_dict() | dict(zip(names, ema.shadow_params, strict=True))

    def _write_ema(self, ema: EMAModel, folder: Path) -> dict[str, Any]:
        """Write what ``EMAModel.from_pretrained`` reads.

        ``EMAModel.save_pretrained`` builds a whole new model for it, which draws from the global
        random generator and casts the averages to that model's dtype.
        """
        numbers = {name: getattr(ema, name) for name in _EMA_NUMBERS}
        self.model.save_config(folder)
        config = read_json(folder / "config.json")
        loadable = {k: v for k, v in numbers.items() if k != "cur_decay_value"}
        loadable["min_decay"] = float(ema.min_decay)  # EMAModel refuses an integer
        write_json(folder / "config.json", config | loadable)
        save_tensors(folder / WEIGHTS_FILE, self._averaged(ema))
        return pack(numbers, {}, "ema")

    def _read_ema(
        self, ema: EMAModel, folder: Path, document: _Json, files: _Json
    ) -> Callable[[], object]:
        name = f"{self.model_name}_ema"
        weights = _load_weights(folder, name, files)
        check_tensors(weights, self._averaged(ema), name)
        ordered = [weights[key] for key, _ in self.model.named_parameters()]
        return partial(_set_ema, ema, ordered, unpack(document["ema"], {}))


def _load_weights(folder: Path, name: str, files: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights of one model: the safetensors files, or shards, that the manifest lists."""
    listed = [f for f in files if f.startswith(f"{name}/") and f.endswith(".safetensors")]
    if not listed:
        raise CheckpointError(f"{folder} holds no weights in {name}/.")
    return {key: t for file in listed for key, t in load_tensors(folder / file).items()}


@torch.no_grad()
def _set_ema(ema: EMAModel, weights: list[Tensor], numbers: Mapping[str, Any]) -> None:
    """In place, so that device and pinned memory of the averages stay."""
    for shadow, value in zip(ema.shadow_params, weights, strict=True):
        shadow.copy_(value)
    for name in _EMA_START:
        setattr(ema, name, numbers[name])
