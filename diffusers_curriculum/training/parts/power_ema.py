"""Moving averages of the weights whose profile in time is a power function, and their snapshots.

Averages of two widths, saved now and then, are enough to make the average of any other width after
training: see ``parts.reconstruction``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.reconstruction import FORMAT, METADATA, SNAPSHOT, gamma_of
from diffusers_curriculum.training.storage.files import disk_full_explained, write_atomically
from diffusers_curriculum.training.storage.fingerprints import hash_config

logger = logging.getLogger(__name__)

SIGMA_RELS = (0.05, 0.10)  # arXiv 2312.02696, section 3.1
SNAPSHOT_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_HALF_WRITTEN = re.compile(r"\.tmp-step-.+\.safetensors-[0-9]+")


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a model's config without what diffusers notes of its origin (``_...``)."""
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    return hash_config(json.loads(json.dumps(own, default=str)))


class PowerEMA:
    """Averages of weights with profile ``tau^gamma`` over the steps ``tau`` done so far.

    ``average(t) = beta average(t-1) + (1 - beta) weights(t)`` with
    ``beta = (1 - 1/t)^(gamma + 1)`` (arXiv 2312.02696, equation 2 and section 3.1): nothing of the
    initial weights is left after the first step, and the profile is stretched as training goes on.

    Make it when the model is on its device. It stands where diffusers' ``EMAModel`` does in
    ``ema_weights``, and is a tracker of ``TrainingState``.

    Args:
        named_parameters: of the unwrapped model; they are kept, and read by :meth:`update`.
        sigma_rels: widths, as parts of the training time; :meth:`copy_to` shows the first.
        config: the model's config, whose digest goes into the snapshots.
        dtype: of the snapshots, "float32" or "float16"; the averages themselves are float32.

    Raises:
        UsageError: a bad width or dtype, or no or repeated widths.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        sigma_rels: Sequence[float] = SIGMA_RELS,
        *,
        config: Mapping[str, Any] | None = None,
        dtype: str = "float32",
    ) -> None:
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise UsageError(f"sigma_rels are {list(sigma_rels)}: give one or more, each once.")
        if dtype not in SNAPSHOT_DTYPES:
            raise UsageError(
                f"--power_ema_dtype is {dtype!r}: choose from {', '.join(SNAPSHOT_DTYPES)}."
            )
        self.gammas = {float(sigma_rel): gamma_of(sigma_rel) for sigma_rel in sigma_rels}
        named = dict(named_parameters)
        self.names, self.parameters = list(named), list(named.values())
        self.averages = {
            sigma_rel: [_copy(p) for p in self.parameters] for sigma_rel in self.gammas
        }
        self.config_hash, self.dtype = config_hash(config or {}), dtype
        self.step = 0
        self.temp_stored_params: list[Tensor] | None = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after optimizer step ``step`` (the first is 1) into the averages.

        Where steps were left out since the last update, these weights stand for them too.
        Nothing is read back to the host.

        Raises:
            ValueError: the step is not later than that of the last update, or the model has moved
                to another device.
        """
        if step <= self.step:
            raise ValueError(f"step={step} must be later than {self.step}, the last one averaged.")
        ratio = self.step / step
        for sigma_rel, averages in self.averages.items():
            if averages[0].device != self.parameters[0].device:
                raise ValueError(
                    f"the averages are on {averages[0].device} and the model on "
                    f"{self.parameters[0].device}: make PowerEMA after the model was moved."
                )
            new = [p.detach().to(a.dtype) for p, a in zip(self.parameters, averages, strict=True)]
            share = 1 - ratio ** (self.gammas[sigma_rel] + 1)
            torch._foreach_lerp_(averages, new, share)
        self.step = step

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep a model's own weights, on the CPU, until :meth:`restore`."""
        self.temp_stored_params = [p.detach().to("cpu", copy=True) for p in parameters]

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor], sigma_rel: float | None = None) -> None:
        """Give a model the averages of one width; None is the first."""
        wanted = next(iter(self.averages)) if sigma_rel is None else sigma_rel
        if wanted not in self.averages:
            raise UsageError(f"sigma_rel={wanted} is not averaged: only {list(self.averages)}.")
        for parameter, average in zip(parameters, self.averages[wanted], strict=True):
            parameter.copy_(average)

    @torch.no_grad()
    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Give a model the weights of :meth:`store` back."""
        if self.temp_stored_params is None:
            raise RuntimeError("No weights are stored: call store() before restore().")
        for parameter, stored in zip(parameters, self.temp_stored_params, strict=True):
            parameter.copy_(stored)
        self.temp_stored_params = None

    def nbytes(self) -> int:
        """Bytes of all averages."""
        return sum(tensor.nbytes for averages in self.averages.values() for tensor in averages)

    def state_dict(self) -> dict[str, Any]:
        """The averages by width and parameter, and the step of the last update."""
        averages = {
            repr(sigma_rel): dict(zip(self.names, tensors, strict=True))
            for sigma_rel, tensors in self.averages.items()
        }
        return {"step": self.step, "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, in place.

        Raises:
            ValueError: the averages are of other widths or other parameters; nothing has changed.
        """
        own, saved = self.state_dict()["averages"], state_dict["averages"]
        if list(saved) != list(own):
            raise ValueError(f"it has averages of the widths {list(saved)}, not {list(own)}.")
        odd = sorted({name for key in own for name in own[key].keys() ^ saved[key].keys()})
        if odd:
            raise ValueError(f"{len(odd)} averaged parameters differ by name, such as {odd[0]}.")
        for key, tensors in own.items():
            for name, tensor in tensors.items():
                tensor.copy_(saved[key][name])
        self.step = int(state_dict["step"])

    def snapshot(self, folder: str | Path, step: int) -> list[Path]:
        """Write the averages, one file per width, each whole or not at all; main process only.

        The same averages give the same bytes: files of an interrupted run are written again.

        Raises:
            ValueError: the averages are not those after ``step``, or do not fit the dtype.
            DiskFullError: no space; files that were there are intact.
        """
        if step != self.step or step < 1:
            raise ValueError(f"step={step} is not the last one averaged, which is {self.step}.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return [self._write(folder, sigma_rel) for sigma_rel in self.averages]

    def _write(self, folder: Path, sigma_rel: float) -> Path:
        path = folder / f"step-{self.step:08d}-sigma_rel-{sigma_rel!r}.safetensors"
        told = {
            "format": FORMAT,
            "step": self.step,
            "sigma_rel": sigma_rel,
            "config": self.config_hash,
        }
        dtype = SNAPSHOT_DTYPES[self.dtype]
        averages = zip(self.names, self.averages[sigma_rel], strict=True)
        tensors = {name: _narrowed(name, average, dtype) for name, average in averages}
        content = save(tensors, {METADATA: json.dumps(told, sort_keys=True)})
        with disk_full_explained(path, len(content)):
            write_atomically(path, content)
        return path


def forget_later(folder: str | Path, step: int) -> None:
    """Remove snapshots later than the step that a run goes on from, and half-written ones.

    They are of a course of training that need not be this one's; what this run comes to again it
    writes again. Call it at the start, on the main process; a run from scratch has step 0.
    """
    folder = Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = SNAPSHOT.fullmatch(path.name)
        if _HALF_WRITTEN.fullmatch(path.name) or (found and int(found[1]) > step):
            logger.warning("Removing %s: this run goes on from step %d.", path, step)
            path.unlink()


def _copy(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


def _narrowed(name: str, average: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy on the CPU."""
    tensor = average.to("cpu", dtype).contiguous()
    if not torch.isfinite(tensor).all():
        raise UsageError(
            f"the average of {name} is not finite in {dtype}: use --power_ema_dtype float32."
        )
    return tensor
