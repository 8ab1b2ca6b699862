"""A class-conditional or unconditional run but for its steps, which stand in the scripts."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffusers_curriculum.training.arguments.run_config import tracker_config
from diffusers_curriculum.training.checkpoint.record import RunRecord
from diffusers_curriculum.training.checkpoint.same_run import (
    check_same_run,
    renewed_parts,
    run_facts,
)
from diffusers_curriculum.training.checkpoint.saving import Saver
from diffusers_curriculum.training.checkpoint.state import TrainingState
from diffusers_curriculum.training.data.dataset import ImageDataset, training_batches
from diffusers_curriculum.training.evaluation.record import read_metrics
from diffusers_curriculum.training.evaluation.setup import make_evaluator, training_images
from diffusers_curriculum.training.levels import timesteps
from diffusers_curriculum.training.loop.image_setup import (
    cached_latents,
    choose_levels,
    image_transform,
    load_data,
    load_models,
)
from diffusers_curriculum.training.loop.monitor import Monitor
from diffusers_curriculum.training.parts import images as parts
from diffusers_curriculum.training.parts.averages import forget_later
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.process.stopping import StopRequest
from diffusers_curriculum.training.publish.images import ImagePublisher
from diffusers_curriculum.training.publish.pictures import ema_weights
from diffusers_curriculum.training.storage.manifest import read_manifest

POWER_EMA_FOLDER = "power_ema"
SNAPSHOTS = 64  # of the power-function averages, unless a flag says how often


class ImageJob:
    """Everything of a run but its steps; what can fail without a model fails before one is loaded.

    Args:
        args: the checked command line; ``max_train_steps`` is put in where it is not given.
        accelerator: of the run.
        checkpoint: to go on from; None for a fresh start.
        stop: asked after each step.
        default_vp: scheduler class for sampling a variance preserving process.

    Attributes:
        run: what the training step works with.
        plan: which sample is seen when.
        start: the first optimizer step.

    Raises:
        UsageError: bad arguments, data, models or checkpoint.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Any,
        checkpoint: Path | None,
        stop: StopRequest,
        default_vp: str,
    ) -> None:
        self.args, self.accelerator, self.stop = args, accelerator, stop

        # What is trained on
        resumed = read_manifest(checkpoint)["facts"] if checkpoint else None
        seed = runtime.agree_on_seed(args.seed, resumed, args.allow_config_change)
        levels = choose_levels(args, seed, default_vp)
        parts.check_network(args, labelled=hasattr(args, "label_column"))
        self.data = load_data(args, accelerator, seed)
        self.plan, sampler, objective = self.data.plan, levels.sampler, levels.objective
        steps = self.plan.steps_for_epochs(args.num_train_epochs)
        args.max_train_steps = args.max_train_steps or steps
        timesteps.check_length(args, sampler, args.max_train_steps)
        model = parts.model_facts(args, self.data.classes)
        facts = run_facts(args, self.plan, sampler, objective, self.data.rows, model)
        changed = check_same_run(facts, resumed, args.allow_config_change)
        self.publisher = ImagePublisher(
            args, accelerator, levels.inference, sampler, objective.prediction_type, seed,
            self.data.id2label,
        )  # fmt: skip

        # Models
        self.run, models = load_models(args, accelerator, seed, levels, self.data.classes)
        self.network, self.publisher.models = models.network, models
        self.average = self.run.ema or self.run.power
        real = training_images(
            self.data.rows, args.resolution, args.image_interpolation_mode, args.image_column
        )
        self.evaluator = make_evaluator(
            args, accelerator, real, len(self.data.rows), seed, args.max_train_steps
        )
        self.latents = cached_latents(args, accelerator, self.data, models.space)

        # Reports and checkpoints
        if accelerator.is_main_process:
            accelerator.init_trackers(args.tracker_project_name, tracker_config(args))
        self.monitor = Monitor(
            accelerator, sampler, self.run.weights, args.max_train_steps, args.log_every,
            args.timestep_plot_steps, self.run.guard,
        )  # fmt: skip
        state = self._state()
        self.start = self._read(state, checkpoint, renewed_parts(changed))
        self.record = RunRecord(args.output_dir, args, facts, self.start, checkpoint, changed,
                                accelerator.is_main_process)  # fmt: skip
        self.saver = Saver(args, accelerator, state, self.run.guard, facts, stop)

    def _state(self) -> TrainingState:
        run = self.run
        more: dict[str, Any] = {"guard": run.guard}
        more |= {"loss_weights": run.learned} if run.learned else {}
        more |= {"power_ema": run.power} if run.power else {}
        return TrainingState(
            self.network, run.optimizer.optimizer, run.lr_scheduler, run.sampler, run.ema,
            self.accelerator.scaler, self.monitor.stateful | more, parts.folder_name(self.network),
        )  # fmt: skip

    def _read(self, state: TrainingState, checkpoint: Path | None, renew: Collection[str]) -> int:
        """Take over a checkpoint, and return the first step."""
        run, start = self.run, state.read(checkpoint, renew) if checkpoint else 0
        if run.learned:
            run.weights = run.learned.weights(start, self.accelerator.device)
        if run.power and self.accelerator.is_main_process:
            forget_later(Path(self.args.output_dir, POWER_EMA_FOLDER), start)
        return start

    # -- while it trains -------------------------------------------------------------------------

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's micro-batches from the first step on, after telling what is trained."""
        args, data, run = self.args, self.data, self.run
        dataset = ImageDataset(
            data.rows, data.plan, image_transform(args), image_column=args.image_column,
            label_column=data.label_column, label_dropout=getattr(args, "label_dropout", 0.0),
            null_label=run.null_label or 0, latents=self.latents,
            precise=getattr(args, "preserve_input_precision", False),
        )  # fmt: skip
        timesteps.warn_of_terminal_snr(run.objective, run.weights)
        runtime.log_run({"examples": data.plan.num_samples, "classes": data.classes,
                         "batch per update": data.plan.total, "seed": run.seed,
                         "space": run.space.kind, "network": type(self.network).__name__,
                         "formulation": args.formulation, "updates": args.max_train_steps,
                         "first update": self.start})  # fmt: skip
        self.record.start()
        self.monitor.start(self.start)
        self._make_up_metrics()
        return training_batches(
            dataset, data.plan, self.start, args.max_train_steps, args.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )  # fmt: skip

    def after_step(
        self, step: int, loss: Tensor, indices: Tensor, losses: Tensor, norm: Tensor | None
    ) -> None:
        """Report, save, stop, draw and measure: whatever is due after optimizer step ``step``.

        Raises:
            Stopped: the run was asked to stop; everything is saved.
        """
        done = step + 1
        self.monitor.add(step, loss, indices, losses, norm)
        self.monitor.after_step(done, self.run.lr_scheduler.get_last_lr()[0])
        stopping = self.stop.requested(done)
        self._snapshot(done)
        self.saver.after_step(done, stopping)
        if stopping:
            self.record.finish(done, str(self.stop.stopped()))
            self.accelerator.end_training()
            raise self.stop.stopped()
        if self.publisher.is_due(self.plan, step):
            self.publisher.validate(self.publisher.models, self.network, self.average, done)
        if hasattr(self.args, "save_model_epochs"):
            self.publisher.keep(self.network, self.average, self.plan, step)
        if done < self.args.max_train_steps:  # at the end, all is saved first
            self._evaluate(done)

    def _evaluate(self, done: int) -> None:
        if self.evaluator is not None and self.evaluator.is_due(done):
            with ema_weights(self.average, self.network):  # pyright: ignore[reportArgumentType]
                steps = self.args.eval_num_inference_steps
                self.evaluator.evaluate(self.publisher.images(self.network, steps), done)

    def _make_up_metrics(self) -> None:
        """Those of the step that a run goes on from, where it was stopped before them."""
        if self.evaluator is None:
            return
        missing = [self.start not in read_metrics(Path(self.args.output_dir))]
        broadcast_object_list(missing)  # the main process may be the only one to see the file
        if missing[0] and self.start < self.args.max_train_steps:
            self._evaluate(self.start)

    def _snapshot(self, done: int) -> None:
        power, every = self.run.power, self.args.power_ema_snapshot_steps
        every = every or max(1, self.args.max_train_steps // SNAPSHOTS)
        due = done % every == 0 or done == self.args.max_train_steps
        if power and due and self.accelerator.is_main_process:
            power.snapshot(Path(self.args.output_dir, POWER_EMA_FOLDER), done)

    def finish(self) -> None:
        """Save and publish."""
        self.monitor.finish(self.args.output_dir)
        self.publisher.finish(self.network, self.average)
        self._evaluate(self.args.max_train_steps)
        self.record.finish(self.args.max_train_steps)
        self.accelerator.end_training()
