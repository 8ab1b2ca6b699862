"""The moving averages of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.parts.power_ema import PowerEMA, forget_later
from diffusers_curriculum.training.process.sharding import gathered, shard_of, whole

if TYPE_CHECKING:  # it takes a second to import, which --help should not have to wait for
    from diffusers.training_utils import EMAModel

SNAPSHOTS_FOLDER = "power_ema"
_SNAPSHOTS = 64  # unless a flag says how often


@dataclass
class Averages:
    """The averages of a network's weights, each of which there may be or not."""

    network: Any  # whose weights are averaged, without accelerate's wrappers; or an adapter
    ema: EMAModel | None = None  # diffusers', updated every ``interval`` steps
    interval: int = 1
    offload: bool = False  # keep it on the host
    power: PowerEMA | None = None  # of several widths, copied to ``folder`` every ``every`` steps
    folder: Path = Path()
    every: int | None = None
    sharded: Any = None  # the network that the weights are in, once it is in shards

    def with_ema(
        self,
        args: Arguments,
        device: torch.device,
        source: Any = None,
        warmup: Mapping[str, Any] | None = None,
    ) -> Averages:
        """Add diffusers' average, if the command line asks for it.

        Args:
            source: whose weights it starts from; by default the network.
            warmup: further settings of ``EMAModel``.
        """
        if not args.use_ema:
            return self
        from diffusers.training_utils import EMAModel

        self.ema = EMAModel(
            (source or self.network).parameters(),
            decay=args.ema_decay,
            model_cls=type(self.network),
            model_config=self.network.config,
            foreach=args.foreach_ema,
            **(warmup or {}),
        )
        self.interval, self.offload = args.ema_interval, args.offload_ema
        self.ema.to("cpu" if self.offload else device)
        return self

    def with_power(self, args: Arguments) -> Averages:
        """Add the power-function averages that the command line asks for."""
        if args.power_ema:
            self.power = PowerEMA(
                self.network.named_parameters(),
                args.power_ema,
                config=dict(self.network.config),
                dtype=args.power_ema_dtype,
            )
            self.folder = Path(args.output_dir, SNAPSHOTS_FOLDER)
            self.every = args.power_ema_snapshot_steps
        return self

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, found once: a large network has thousands of modules to look through."""
        return [*self.network.parameters()]

    @property
    def trackers(self) -> dict[str, Any]:
        """What a checkpoint holds besides diffusers' average."""
        return {"power_ema": self.power} if self.power else {}

    def shard(self, network: Any) -> None:
        """Cut the averages as the network's weights are by now, which are other parameters."""
        self.sharded = network
        self.parameters = [*self.network.parameters()]
        cut = partial(map, shard_of)
        if self.ema is not None:
            self.ema.shadow_params = [*cut(self.ema.shadow_params, self.parameters)]
        if self.power is not None:
            self.power.parameters[:] = self.parameters
            for averages in self.power.averages.values():
                averages[:] = cut(averages, self.parameters)

    def start(self, step: int) -> None:
        """Forget copies that are later than the step that a run goes on from; main process only."""
        if self.power:
            forget_later(self.folder, step)

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step``."""
        if self.ema is not None and (step + 1) % self.interval == 0:
            if self.offload:  # it visits the device for the update
                self.ema.to(self.parameters[0].device, non_blocking=True)
            self.ema.step(self.parameters)
            if self.offload:
                self.ema.to("cpu", non_blocking=True)
        if self.power is not None:
            self.power.update(step + 1)

    def snapshot(self, done: int, last: int, main: bool) -> None:
        """Copy the power-function averages if it is time, ``done`` steps of the ``last`` being
        finished: the ``main`` process does it."""
        every = self.every or max(1, last // _SNAPSHOTS)
        if self.power and (done % every == 0 or done == last):
            with gathered(self.power.averages.values(), main):
                if main:
                    self.power.snapshot(self.folder, done)

    def whole(self) -> AbstractContextManager[None]:
        """The network is whole inside the block, if it is in shards; every process enters."""
        return whole(self.sharded)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The network is whole, with its averaged weights, if there are any, inside the block;
        every process enters."""
        with ema_weights(self.ema or self.power, self.parameters), self.whole():
            yield


@contextmanager
def ema_weights(
    ema: EMAModel | PowerEMA | None, parameters: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Give a model's parameters their averages inside the block, if ``ema`` is an average of them,
    and their own values back whatever happens.

    Raises:
        RuntimeError: the averaged weights are in the model already.
    """
    if ema is None:
        yield
        return
    if ema.temp_stored_params is not None:
        # A second store would take the averages for the model's own weights and lose those.
        raise RuntimeError("the EMA weights are already in the model; do not nest ema_weights")
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)
