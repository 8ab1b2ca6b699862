"""A training run from its command line to its upload: everything but the step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from diffusers_curriculum.training.arguments.configuration import written
from diffusers_curriculum.training.checkpoint.checkpoints import (
    check_not_mixed,
    clear_output,
    find_checkpoint,
)
from diffusers_curriculum.training.checkpoint.record import RunRecord
from diffusers_curriculum.training.checkpoint.remote import local_request
from diffusers_curriculum.training.checkpoint.same_run import (
    check_imports,
    check_same_run,
    keep_choices,
    renewed_parts,
)
from diffusers_curriculum.training.checkpoint.state import TrainingState
from diffusers_curriculum.training.data.dataset import training_batches
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.loop.run import TrainingStep, make_update
from diffusers_curriculum.training.loop.saving import Saver
from diffusers_curriculum.training.loop.task import Forward, JobParts, Publisher, Task
from diffusers_curriculum.training.parts.optimizers import (
    build_lr_scheduler,
    build_optimizer,
    check_optimizer,
    check_rates,
)
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.process.compilation import (
    check_gradients,
    compile_network,
    uncompiled,
)
from diffusers_curriculum.training.process.launcher import in_effect
from diffusers_curriculum.training.process.memory import kept_objects, out_of_memory_explained
from diffusers_curriculum.training.process.profiling import check_traced, profiled
from diffusers_curriculum.training.process.sharding import is_sharded, prepared, shard
from diffusers_curriculum.training.process.stopping import StopRequest
from diffusers_curriculum.training.process.transfers import on_device
from diffusers_curriculum.training.publish.trackers import start_trackers
from diffusers_curriculum.training.storage.manifest import read_manifest


class Job(JobParts):
    """One run of a task.

    Args:
        task: what differs between kinds of training.
        argv: command line; default the program's own.

    Raises:
        UsageError: an argument is wrong; the message says what to do.
    """

    publisher: Publisher

    def __init__(self, task: Task, argv: Sequence[str] | None = None) -> None:
        self.task = task
        self.args = task.parse(argv)

    def train(
        self,
        training_step: TrainingStep,
        encode: Callable[..., Any] | None = None,
        predict: Callable[..., Any] | None = None,
    ) -> None:
        """Train from loading to the upload, or show what the command line asks for.

        Args:
            training_step: ``(run, step, slots, batch) -> outcome``: one micro-batch from its
                samples to gradients.
            encode, predict: parts of it that a validation loss is computed by; see
                :class:`Forward`.

        Raises:
            UsageError: bad data, models or checkpoint; before any model is loaded where it can be.
            NonFiniteError: a loss or gradient was not finite.
            Stopped: the run was asked to stop; everything is saved.
        """
        self.forward = Forward(encode, predict) if encode and predict else None
        shown = self.task.show(self.args)
        if shown is not None:
            sys.stdout.write(shown + "\n")
            return
        with out_of_memory_explained(self.args), kept_objects():
            self.prepare()
            self._make_updates(training_step)
        with uncompiled(self.args):
            self._finish()

    def _make_updates(self, training_step: TrainingStep) -> None:
        args, batches = self.args, self._checked(self._batches(), training_step)
        traced = args.profile_steps if self.accelerator.is_main_process else None
        length, folder = args.max_train_steps - self.start, Path(args.output_dir, "profile")
        with self.stop, kept_objects(), profiled(traced, length, folder) as step_traced:
            self.record.start()
            self.monitor.start(self.start)
            with uncompiled(args):
                self.task.started(self)
            for step in range(self.start, args.max_train_steps):
                outcome, norm = make_update(self.run, step, self.plan, batches, training_step)
                with uncompiled(args):
                    self._after_update(step, outcome, norm)
                step_traced()

    def _checked(self, batches: Iterator[Any], training_step: TrainingStep) -> Iterator[Any]:
        """The same batches, once the compiled network is looked at with the first."""
        if self.args.compile == "none" or self.start == self.args.max_train_steps:
            return batches
        first = next(batches)
        step = partial(training_step, self.run, self.start, self.plan.slots(0), first)
        check_gradients(self.args, self.network, step)
        return chain([first], batches)

    # -- before the first step -------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything that precedes the first step, in the order in which it can fail."""
        args, task = self.args, self.task
        self.accelerator = runtime.make_accelerator(args)
        task.check_engine(is_sharded(self.accelerator))
        self.stop = StopRequest(args.max_hours)

        # The run to resume, if any, and the seed
        clear = partial(clear_output, overwrite=args.overwrite_output_dir)
        runtime.prepare_output(self.accelerator, args.output_dir, clear)
        request = local_request(self.accelerator, args)
        checkpoint = find_checkpoint(args.output_dir, request) if request else None
        check_not_mixed(args.output_dir, checkpoint, request)
        resumed = self.resumed = read_manifest(checkpoint)["facts"] if checkpoint else None
        check_imports(args, resumed)
        self.seed = runtime.agree_on_seed(args.seed, resumed, args.allow_config_change)

        # What is trained on
        if resumed is not None:
            keep_choices(args, resumed)
        task.remember(args, resumed)
        task.choose(args, self.seed)
        self._load_data()
        facts = task.facts(self)
        changed = check_same_run(facts, resumed, args.allow_config_change)
        self.publisher = task.publisher(self)
        start_trackers(self.accelerator, args)
        check_optimizer(args)

        # Models
        self.network, folder, averages = task.load(self)
        self.weights = averages.network
        facts |= task.measured(self)
        self._prepare_run(averages)
        self.monitor = task.monitor(self)

        # Checkpoints
        state = self._state(folder)
        self.start = state.read(checkpoint, renewed_parts(changed)) if checkpoint else 0
        if self.accelerator.is_main_process:
            averages.start(self.start)
        self.record = RunRecord(
            args.output_dir,
            args.tracked(),
            facts,
            self.start,
            checkpoint,
            changed,
            self.accelerator.is_main_process,
            in_effect(self.accelerator, self.network),
            written({"seed": self.seed} | args.configuration),
        )
        self.saver = Saver(args, self.accelerator, state, self.monitor.guard, facts, self.stop)
        if is_sharded(self.accelerator):
            shard(self.accelerator, self.network, self.run.optimizer.optimizer)
            averages.shard(self.network)

    def _load_data(self) -> None:
        args, accelerator = self.args, self.accelerator
        with accelerator.main_process_first():
            rows = self.task.load_rows(args, self.seed)
        self.rows = self.task.usable_rows(args, accelerator, rows)
        class_images = self.task.num_class_images
        self.plan = BatchPlan(
            len(self.rows) - class_images,
            args.train_batch_size,
            args.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
            self.seed,
            class_images,
            self.task.sources,
            self.task.shards,
            self.task.buckets,
        )
        steps = self.plan.steps_for_epochs(args.num_train_epochs)
        args.max_train_steps = args.max_train_steps or steps
        check_traced(args.profile_steps, args.max_train_steps)
        check_rates(args, accelerator.num_processes, args.max_train_steps)

    def _prepare_run(self, averages: Any) -> None:
        args, accelerator = self.args, self.accelerator
        parameters = list(self.weights.parameters())
        optimizer = build_optimizer(args, parameters, accelerator.num_processes, self.network)
        lr_scheduler = build_lr_scheduler(args, optimizer, args.max_train_steps)
        compile_network(args, self.network)
        network, optimizer = prepared(accelerator, self.network, optimizer)
        self.run = self.task.make_run(
            self,
            args=args,
            accelerator=accelerator,
            seed=self.seed,
            network=network,
            averages=averages,
            optimizer=optimizer,
            guard=FiniteGuard(accelerator, optimizer, args.nonfinite),
            lr_scheduler=lr_scheduler,
        )

    def _state(self, folder: str) -> TrainingState:
        parts = dict(self.task.parts(self))
        sampler, run = parts.pop("sampler", None), self.run
        trackers = self.monitor.stateful | {"guard": run.guard} | run.averages.trackers | parts
        return TrainingState(
            self.weights,
            run.optimizer.optimizer,
            run.lr_scheduler,
            sampler,
            run.averages.ema,
            self.accelerator.scaler,
            trackers,
            model_name=folder,
            network=self.network,
        )

    def _batches(self) -> Any:
        args = self.args
        told = {
            "examples": self.plan.num_samples,
            **self.task.described(self),
            "batch per update": self.plan.total,
            "seed": self.seed,
            **in_effect(self.accelerator, self.network),
            "updates": args.max_train_steps,
            "first update": self.start,
        }
        runtime.log_run(told)
        device = self.accelerator.device
        batches = training_batches(
            self.task.dataset(self),
            self.plan,
            self.start,
            args.max_train_steps,
            args.dataloader_num_workers,
            pin_memory=device.type == "cuda",
        )
        return on_device(batches, device)

    # -- while it trains, and after --------------------------------------------------------------

    def _after_update(self, step: int, outcome: Any, norm: Any) -> None:
        """Report, save, stop, and draw: whatever is due after optimizer step ``step``."""
        done, run = step + 1, self.run
        self.monitor.add(step, outcome, norm)
        self.monitor.after_step(done, run.lr_scheduler.get_last_lr()[0])
        stopping = self.stop.requested(done)
        run.averages.snapshot(done, self.args.max_train_steps, self.accelerator.is_main_process)
        saved = self.saver.after_step(done, stopping)
        if stopping:
            self.record.finish(done, str(self.stop.stopped()))
            self.accelerator.end_training()
            raise self.stop.stopped()
        if saved:
            self.publisher.saved(done)
        if self.publisher.is_due(done):
            self.publisher.validate(done)
            self.monitor.show_law(done)
        self.task.after_update(self, done, outcome, norm)

    def _finish(self) -> None:
        """Save and publish."""
        self.monitor.finish(self.args.output_dir)
        self.publisher.finish()
        self.saver.finish()
        self.task.finished(self)
        self.record.finish(self.args.max_train_steps)
        self.accelerator.end_training()


def run_script(main: Callable[[], object]) -> None:
    """Run a script's ``main``, and end the program with the exit status of its outcome."""
    sys.exit(runtime.exit_status(main))
