"""What a job asks of one kind of training: its flags, data, networks, and what it leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from diffusers_curriculum.models.saving import share_weights
from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.data.buckets import Buckets
from diffusers_curriculum.training.data.plan import BatchPlan, Shards, SourceShare
from diffusers_curriculum.training.loop.monitor import Monitor
from diffusers_curriculum.training.loop.run import Run
from diffusers_curriculum.training.parts.averages import Averages

logger = logging.getLogger(__name__)


class JobParts:
    """What a job is made of, in the order in which it comes to it."""

    args: Arguments  # checked; ``max_train_steps`` is put in where it is not given
    accelerator: Any  # of accelerate
    resumed: dict[str, Any] | None  # facts of the checkpoint that it goes on from
    seed: int  # of everything random
    rows: Any  # the samples
    plan: BatchPlan  # which sample is seen when
    network: Any  # what is trained, without accelerate's wrappers
    weights: Any  # what of it is trained and saved: itself, or an adapter in it
    run: Run  # what the step works with
    forward: Forward | None  # what a validation loss is computed by, of the script
    start: int  # the first optimizer step
    monitor: Monitor  # what tells of it


class Forward(NamedTuple):
    """The parts of a step that a validation loss shares with it."""

    encode: Callable[..., tuple[Tensor, Any]]  # (run, batch, draw) -> latents and conditioning
    predict: Callable[..., tuple[Tensor, ...]]  # (run, latents, conditioning, drawn, draw)


class Trained(NamedTuple):
    """The network that is trained."""

    network: Any  # on its device, without accelerate's wrappers
    folder: str  # the name of its weights in pipelines and checkpoints, such as "unet"
    averages: Averages  # of its weights, or of those of an adapter in it: what is trained of it


class Publisher(Protocol):
    """What a run shows on the way, and leaves at its end. All processes call it alike."""

    def is_due(self, done: int) -> bool: ...

    def validate(self, done: int) -> None: ...

    def saved(self, step: int) -> None: ...  # a checkpoint, after so many steps

    def finish(self) -> None: ...


class NetworkPublisher:
    """Saves the trained network, with averaged weights if any, and shows nothing on the way."""

    def __init__(self, job: JobParts) -> None:
        self.job = job

    def is_due(self, done: int) -> bool:
        return False

    def validate(self, done: int) -> None: ...

    def saved(self, step: int) -> None: ...

    def finish(self) -> None:
        """Save the network into the output folder."""
        job = self.job
        with job.run.averages.shown():
            if job.accelerator.is_main_process:
                job.weights.save_pretrained(job.args.output_dir)
                share_weights(job.args.output_dir, "*.safetensors")
                logger.info("network in %s", job.args.output_dir)
        job.accelerator.wait_for_everyone()


class Task:
    """One kind of training. An instance serves one job, and keeps what it loads for it.

    A job calls the methods in the order in which they stand here; whatever can fail without a
    model fails before one is loaded.
    """

    command_line: ClassVar[CommandLine]
    num_class_images: int = 0  # at the end of the usable rows, for prior preservation
    sources: tuple[SourceShare, ...] = ()  # of the usable rows, in their order, if several
    shards: Shards | None = None  # of the usable rows, if they are read from such
    buckets: Buckets | None = None  # of the usable rows, if a batch is of one size

    def parse(self, argv: Sequence[str] | None = None, *, machine: bool = True) -> Arguments:
        """Parse and check a command line; see :meth:`CommandLine.parse`."""
        args = self.command_line.parse(argv, self.settle, machine=machine)
        self.check(args)
        return args

    def settle(self, args: Arguments) -> None:
        """Put defaults that depend on one another."""

    def check(self, args: Arguments) -> None:
        """Refuse what cannot be, beyond what the flags say."""

    def show(self, args: Arguments) -> str | None:
        """What the command line asks to be shown in place of a training; None to train."""
        return None

    def check_engine(self, sharded: bool) -> None:
        """Refuse a network that lies in shards on all processes, if the task cannot train one."""

    def remember(self, args: Arguments, resumed: Mapping[str, Any] | None) -> None:
        """Take over what the run to resume had measured, from its facts; None for a new run."""

    def choose(self, args: Arguments, seed: int) -> None:
        """Choose what is trained on; loads neither data nor models."""

    def load_rows(self, args: Arguments, seed: int) -> Any:
        """The samples, images undecoded; the main process comes first."""
        raise NotImplementedError

    def usable_rows(self, args: Arguments, accelerator: Any, rows: Any) -> Any:
        """Those of the samples that can be trained on; every process calls it."""
        return rows

    def facts(self, job: JobParts) -> dict[str, Any]:
        """What a resumed run is compared with, as plain data; see ``same_run.run_facts``."""
        raise NotImplementedError

    def publisher(self, job: JobParts) -> Publisher:
        """Made before training, so that what cannot be published is told then; by default one that
        saves the network."""
        return NetworkPublisher(job)

    def load(self, job: JobParts) -> Trained:
        """Load the models."""
        raise NotImplementedError

    def measured(self, job: JobParts) -> dict[str, Any]:
        """Facts that models are needed for, such as the scale of latents; every process calls
        it, and what follows from them is put right here."""
        return {}

    def make_run(self, job: JobParts, **common: Any) -> Run:
        """What the step works with; ``common`` are the fields of :class:`Run`."""
        raise NotImplementedError

    def monitor(self, job: JobParts) -> Monitor:
        """What reports while it trains."""
        raise NotImplementedError

    def parts(self, job: JobParts) -> dict[str, Any]:
        """More state for checkpoints: by name, "sampler" that of the noise levels."""
        return {}

    def described(self, job: JobParts) -> dict[str, Any]:
        """What the log tells of the run at its start, besides its length."""
        return {}

    def dataset(self, job: JobParts) -> Any:
        """The samples by position in the training sequence."""
        raise NotImplementedError

    def started(self, job: JobParts) -> None:
        """Called before the first step, once the state is loaded."""

    def after_update(self, job: JobParts, done: int, outcome: Any, norm: Tensor | None) -> None:
        """Called when everything of an update is done; ``done`` counts the finished steps."""

    def finished(self, job: JobParts) -> None:
        """Called when everything is saved and published."""
