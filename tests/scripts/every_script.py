"""Every training script of the project, and the recipe of the docs, with a small run of each."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop import job
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.loop.job import Job
from diffusers_curriculum.training.parts.families.base import families
from tests.scripts.small_runs import reset_accelerate, tiny_vit_vq
from tests.text_adapters import TEXT_ADAPTERS

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "script_checkpoints"
SCRIPTS = {
    "text_to_image": "train_text_to_image_curriculum",
    "text_to_image_sdxl": "examples.text_to_image.train_text_to_image_sdxl_curriculum",
    "text_to_image_lora": "examples.text_to_image.train_text_to_image_lora_curriculum",
    "text_to_image_lora_sdxl": "examples.text_to_image.train_text_to_image_lora_sdxl_curriculum",
    "flow": "examples.text_to_image.train_text_to_image_flow_curriculum",
    "class_conditional": "examples.class_conditional.train_class_conditional_curriculum",
    "unconditional": "examples.unconditional.train_unconditional_curriculum",
    "vit_vqgan": "train_vit_vqgan",
    "image_tokens": "examples.autoregressive.train_image_tokens_curriculum",
    "own_job": "own_job",
}
STOPPED, STEPS = 5, 10  # of the fixtures' checkpoints and runs
_FOUND_AS_SCRIPTS = {"vit_vqgan": "examples/autoencoder", "own_job": "examples/recipes"}
_OWN_JOB = (
    *("--output_dir", "{output}", "--points", "64", "--seed", "3", "--train_batch_size", "8"),
    *("--max_train_steps", "10", "--checkpointing_steps", "5", "--lr_scheduler", "cosine"),
    *("--lr_warmup_steps", "3", "--learning_rate", "0.001", "--curriculum", "difficulty"),
    *("--curriculum_clusters", "5", "--curriculum_patience", "1", "--curriculum_max_share", "9"),
    *("--use_ema", "--ema_decay", "0.9"),
)

_SDXL = (
    *("--pretrained_model_name_or_path", "{tiny}", "--train_data_dir", "{captions}"),
    *("--cache_dir", "{cache}", "--output_dir", "{output}", "--resolution", "8", "--seed", "7"),
    *("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "0.001"),
    *("--lr_scheduler", "cosine", "--lr_warmup_steps", "3", "--max_train_steps", "10"),
    *("--checkpointing_steps", "5", "--log_every", "1", "--random_flip", "--use_ema"),
    *("--timestep_sampler", "laplace", "--curriculum", "difficulty", "--curriculum_clusters", "5"),
    *("--curriculum_patience", "1", "--curriculum_max_share", "9", "--ema_decay", "0.9"),
    *("--proportion_empty_prompts", "0.2", "--noise_offset", "0.1", "--snr_gamma", "5"),
)
_FLOW = (*_SDXL[:-6], "--caption_dropout", "0.2")
_LORA_SDXL = (*_FLOW, *_SDXL[-4:], *TEXT_ADAPTERS)
_TOKENS = (
    *("--pretrained_vae_model_name_or_path", "{tiny}", "--train_data_dir", "{captions}"),
    *_SDXL[4:-6],
    *("--model_args", "n_layer=1", "n_embd=16", "n_head=2"),
)
# of those without a fixture
_WORDS = {"own_job": _OWN_JOB, "text_to_image_sdxl": _SDXL, "flow": _FLOW}
_WORDS |= {"text_to_image_lora_sdxl": _LORA_SDXL, "image_tokens": _TOKENS}
# families of their pipelines
_TINY = {"text_to_image_sdxl": "sdxl", "text_to_image_lora_sdxl": "sdxl", "flow": "flux"}


class Reached(Exception):
    """The run has come as far as the test wanted."""


class Script:
    """One script with the flags of a run of ten steps.

    Args:
        name: of :data:`SCRIPTS`.
        work: folder of all that runs write; their results go to ``output``.
        patch: so that the script's neighbours are found as when it is run as a script.
    """

    def __init__(self, name: str, work: Path, patch: pytest.MonkeyPatch) -> None:
        self.name, self.work, self.output = name, work, work / "run"
        if "lora" in name:
            pytest.importorskip("peft")
        if name in ("text_to_image", "text_to_image_lora"):
            pytest.importorskip("transformers", minversion="5")  # which saved their pipeline
        if name in _FOUND_AS_SCRIPTS:
            patch.syspath_prepend(str(ROOT / _FOUND_AS_SCRIPTS[name]))
        if name == "image_tokens":
            tiny_vit_vq(patch_size=1).save_pretrained(work / "tiny")
        if name in _TINY:
            families()[_TINY[name]].save_tiny(work / "tiny")
        self.module = importlib.import_module(SCRIPTS[name])

    def argv(self, *more: object) -> list[str]:
        """A command line; later arguments win."""
        words: Sequence[str] = _WORDS.get(self.name, ())
        if not words:
            words = json.loads((FIXTURES / self.name / "argv.json").read_text())
        places = {
            "{pipeline}": FIXTURES / self.name / "pipeline",
            "{images}": FIXTURES / self.name / "images",
            "{captions}": FIXTURES / "text_to_image" / "images",
            "{tiny}": self.work / "tiny",
            "{checkpoints}": FIXTURES,
            "{cache}": self.work / "cache",
            "{output}": self.output,
        }
        for placeholder, path in places.items():
            words = [word.replace(placeholder, str(path)) for word in words]
        return [*words, *map(str, more)]

    def main(self, *more: object) -> None:
        """Run it in this process."""
        reset_accelerate()
        try:
            if self.name == "own_job":
                Job(self.module.Mixture(), self.argv(*more)).train(self.module.training_step)
            else:
                self.module.main(self.argv(*more))
        finally:
            reset_accelerate()

    def refused(self, *more: object) -> str:
        """The message with which it refuses to start, before it looks at data or models."""
        with before_data(), pytest.raises(UsageError) as refusal:
            self.main(*more)
        return str(refusal.value)

    def stopped(self) -> None:
        """Leave the checkpoint of a run that was stopped after five steps."""
        name = f"checkpoint-{STOPPED}"
        if self.name in _WORDS:
            self.main("--max_train_steps", STOPPED)
        else:
            shutil.copytree(FIXTURES / self.name / name, self.output / name)

    def resumed(self, *more: object) -> Any:
        """The Run of its first update, which is made; nothing follows."""
        with after_update() as noted, pytest.raises(Reached):
            self.main("--resume_from_checkpoint", "latest", *more)
        return noted[0]


@contextmanager
def before_data() -> Iterator[None]:
    """End a run where it would look at its data."""
    with mock.patch.object(Job, "_load_data", side_effect=Reached):
        yield


@contextmanager
def after_update() -> Iterator[list[Any]]:
    """End a run after its first update, and note its Run with the rate of that as ``used``."""
    noted: list[Any] = []
    make_update = job.make_update

    def once(run: Any, *args: Any) -> Any:
        with rates() as used:
            make_update(run, *args)
        run.used = used[0]
        noted.append(run)
        raise Reached

    with mock.patch.object(job, "make_update", once):
        yield noted


@contextmanager
def rates() -> Iterator[list[float]]:
    """The learning rate of each update, as the optimizer has it."""
    used: list[float] = []
    step = FiniteGuard.step

    def noting(guard: Any, *args: Any) -> None:
        used.append(float(guard.optimizer.param_groups[0]["lr"]))
        step(guard, *args)

    with mock.patch.object(FiniteGuard, "step", noting):
        yield used


@contextmanager
def faults(is_faulty: Callable[[int], bool]) -> Iterator[None]:
    """Let gradients be NaN in the updates for which ``is_faulty(number)``, counted from 0."""
    step, made = FiniteGuard.step, dict[int, int]()

    def spoilt(guard: Any, losses: Any, norm: Any) -> None:
        number = made.setdefault(id(guard), 0)
        made[id(guard)] += 1
        if is_faulty(number):
            norm = norm * float("nan")
        step(guard, losses, norm)

    with mock.patch.object(FiniteGuard, "step", spoilt):
        yield
