"""No update from a loss or gradient that is not finite, decided without waiting for the device.

A fused AdamW reads a tensor ``found_inf`` on the device: where it is 1, weights, moments and step
counts keep every bit. So the decision stays on the device, and the host reads the counts only when
it reports or saves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffusers_curriculum.training.arguments.run import POLICIES
from diffusers_curriculum.training.errors import NonFiniteError

logger = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 10
# fp16's scaler starts at 2^16 and halves at each overflow: after 32 the scale is 2^-16, far below
# anything that a sound model needs.
OVERFLOWS_IN_A_ROW = 32


def supports_found_inf(optimizer: Optimizer) -> bool:
    """Whether a step with ``optimizer.found_inf`` = 1 leaves everything as it is.

    True for fused Adam and AdamW on CPU and CUDA. The other kernels of torch refuse the attribute,
    other libraries ignore it. Asked at every step, as loading a checkpoint also restores ``fused``.
    """
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and all(
        group.get("fused") and all(p.device.type in ("cpu", "cuda") for p in group["params"][:1])
        for group in optimizer.param_groups
    )


class FiniteGuard:
    """Steps an optimizer, except where a loss or gradient is not finite on any process.

    Under fp16 the gradient scaler leaves out updates that overflow, as it should; only a loss that
    is not finite, or a long row of overflows, is a fault there.

    Args:
        accelerator: for its device, its scaler and the number of processes.
        optimizer: the prepared optimizer.
        mode: "raise": :meth:`check` stops at the first fault; "skip": after 10 in a row.

    Attributes:
        left_out: () bool on the device, whether the last update was left out, on all processes.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(self, accelerator: Any, optimizer: Any, mode: str = "raise") -> None:
        if mode not in POLICIES:
            raise ValueError(f"mode is {mode!r}: choose from {', '.join(POLICIES)}.")
        self.accelerator, self.optimizer, self.mode = accelerator, optimizer, mode
        # rows: faults, overflows of fp16; columns: in all, in the present row, in the longest row
        self._counts = torch.zeros((2, 3), dtype=torch.int64, device=accelerator.device)
        self.left_out = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        self._told = 0

    def step(self, losses: Iterable[Tensor], norm: Tensor | None) -> None:
        """Step the optimizer once; call it on all processes, where gradients are synchronised.

        Args:
            losses: losses of this process's micro-batches since the last update, of any shape.
            norm: gradient norm before clipping, None if unknown.
        """
        bad = torch.stack([self._not_finite(losses), self._not_finite([norm])])
        if self.accelerator.num_processes > 1:  # one process alone may have seen it
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        self.left_out = bad.amax().bool()
        if getattr(self.accelerator, "scaler", None) is not None:
            self._count(bad)
            self.optimizer.step()  # with a found_inf of the scaler's own
            return
        bad = torch.stack([bad.amax(), torch.zeros_like(bad[0])])
        self._count(bad)
        inner = _unwrapped(self.optimizer)
        if supports_found_inf(inner):
            self._step_on_device(inner, bad[0])
        elif not bool(bad[0]):  # a host synchronisation: such an optimizer knows no better
            self.optimizer.step()

    def check(self, step: int) -> int:
        """Read the counts: call it on all processes at reports and before every save.

        All processes return, or raise, alike.

        Args:
            step: number of finished optimizer steps, for the messages.

        Returns:
            How many updates were left out so far because of a fault.

        Raises:
            NonFiniteError: a fault in mode "raise", too many in a row in mode "skip", or an fp16
                scale that has collapsed.
        """
        (total, _, longest), (_, _, overflows) = self._counts.tolist()
        if self.mode == "raise" and total > self._told:
            raise NonFiniteError(f"a loss or gradient was not finite by step {step}. {_REMEDY}")
        if longest >= SKIPS_IN_A_ROW:
            raise NonFiniteError(
                f"a loss or gradient was not finite in {longest} updates in a row by step {step}. "
                f"{_REMEDY}"
            )
        if overflows >= OVERFLOWS_IN_A_ROW:
            raise NonFiniteError(
                f"the gradients overflowed fp16 in {overflows} updates in a row by step {step}, "
                f"whatever their scale. {_REMEDY}"
            )
        if total > self._told and self.accelerator.is_main_process:
            logger.warning(
                "%d updates left out by step %d, %d of them new: a loss or gradient was not finite",
                total,
                step,
                total - self._told,
            )
        self._told = total
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, (2, 3): a row of faults goes on over a resume."""
        return {"counts": self._counts.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Continue from a saved state; what was left out before is told no more."""
        self._counts.copy_(state["counts"])
        self._told = int(self._counts[0, 0])

    def _not_finite(self, values: Iterable[Tensor | None]) -> Tensor:
        """1.0 if any value is infinite or NaN, else 0.0, on the device."""
        finite = [value.detach().isfinite().all() for value in values if value is not None]
        if not finite:
            return torch.zeros((), device=self.accelerator.device)
        return (~torch.stack(finite).all()).float()

    def _count(self, bad: Tensor) -> None:
        """Count an update; ``bad`` (2,) float: 1 where there is a fault, an overflow."""
        bad = bad.long()
        total, row, longest = self._counts.unbind(1)
        row = (row + 1) * bad
        # in place: the counts may be loaded, and read, at any time
        self._counts.copy_(torch.stack([total + bad, row, torch.maximum(longest, row)], 1))

    def _step_on_device(self, inner: Any, bad: Tensor) -> None:
        inner.found_inf = bad
        try:
            self.optimizer.step()
        finally:
            del inner.found_inf  # nobody else's step may see it


_REMEDY = (
    "No such update was made, and nothing was saved since; resume from the newest checkpoint with "
    "a lower --learning_rate or --max_grad_norm, or --mixed_precision bf16 instead of fp16."
)


def _unwrapped(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    return optimizer
