"""Runs of the training script inside the test's own process, and what their steps computed."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from diffusers_curriculum.models.tiny import TinySizes, make_tiny_pipeline
from diffusers_curriculum.models.vit_vq import ViTVQModel
from diffusers_curriculum.samplers import CurriculumTimestepSampler
from diffusers_curriculum.training.loop import job
from diffusers_curriculum.training.loop.monitor import LevelMonitor
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.process import runtime
from tests.text_adapters import TEXT_ADAPTERS
from tests.training.fake_accelerator import TIMED

SAMPLES = 18  # not a multiple of any global batch used here: steps straddle epochs
RESOLUTION = 8
SIZES = TinySizes((8, 8), (8, 8), text_width=8, text_length=8, groups=4)


@dataclass(frozen=True)
class Bench:
    """A training script, and the pipeline, data set and cache that all its runs here share.

    Attributes:
        pipeline: the pipeline to fine-tune, or the config of the network to train.
        script: module with a ``main(argv)`` and a ``training_step``.
        trained: folder of the trained model in checkpoints, and in pipelines unless ``left`` is
            where a run leaves it.
        model: the flag that ``pipeline`` is given by.
        words: what a flag of the text-to-image script is called here; None where there is no such
            flag, and it is left out with its values.
        more: arguments of every run.
        draws: purposes that the step draws for, whose values a witness notes.
        weights: file name of trained weights.
    """

    pipeline: Path
    images: Path
    cache: Path
    script: str = "train_text_to_image_curriculum"
    trained: str = "unet"
    model: str = "--pretrained_model_name_or_path"
    words: Mapping[str, str | None] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    draws: frozenset[str] = frozenset({"noise"})
    left: str = ""
    weights: str = "diffusion_pytorch_model.safetensors"

    @property
    def exported(self) -> str:
        """Where a run leaves the trained weights, in its output folder."""
        return self.left or self.trained

    @property
    def index(self) -> str:
        """The file that tells plain diffusers what a run left."""
        return self.left or "model_index.json"

    @property
    def module(self) -> ModuleType:
        """The script."""
        return importlib.import_module(self.script)

    def argv(self, output_dir: Path, *more: object, batch: int = 2) -> list[str]:
        """A command line for this pipeline and data set; later arguments win."""
        return [
            *(self.model, str(self.pipeline)),
            *("--train_data_dir", str(self.images), "--cache_dir", str(self.cache)),
            *("--output_dir", str(output_dir), "--resolution", str(RESOLUTION)),
            *("--train_batch_size", str(batch), "--seed", "7", "--learning_rate", "1e-3"),
            *(*self.more, *self._in_its_words(map(str, more))),
        ]

    def train(self, output_dir: Path, *more: object, batch: int = 2, **options: Any) -> Record:
        """Run the script to its end; see :func:`train`."""
        return train(self.argv(output_dir, *more, batch=batch), script=self.script, **options)

    def _in_its_words(self, arguments: Iterable[str]) -> Iterator[str]:
        kept = True
        for argument in arguments:
            if argument.startswith("--"):
                argument = self.words.get(argument, argument)
                kept = argument is not None
            if kept and argument is not None:
                yield argument


@dataclass(frozen=True)
class Step:
    """What one optimizer step computed; losses are compared by their bits."""

    step: int
    loss: str
    indices: tuple[int, ...]
    losses: tuple[float, ...]
    norm: float | None
    lr: float
    stage: int


@dataclass
class Record:
    """What a run computed and told its trackers."""

    steps: list[Step] = field(default_factory=list)
    logged: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    last: Any = None  # the script's own Run

    @property
    def numbers(self) -> list[int]:
        """Which optimizer steps were made."""
        return [step.step for step in self.steps]

    @property
    def losses(self) -> list[str]:
        """Loss of each step, every bit of it."""
        return [step.loss for step in self.steps]


def make_bench(folder: Path) -> Bench:
    """Write a data set and a pipeline for text-to-image training."""
    images = write_images(folder / "images", SAMPLES)
    make_tiny_pipeline(images, folder / "pipeline", resolution=RESOLUTION, vae_steps=0, sizes=SIZES)
    draws = frozenset({"noise", "noise_offset", "posterior"})
    return Bench(folder / "pipeline", images, folder / "cache", draws=draws)


TINY_DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 1,
    "patch_size": 2,
    "dropout": 0.1,  # drawn inside the network: keyed, too
}
TINY_UNET = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def make_class_bench(folder: Path) -> Bench:
    """Write a data set with classes and the config of a DiT."""
    return Bench(
        write_json(folder / "dit.json", TINY_DIT),
        write_images(folder / "images", SAMPLES),
        folder / "cache",
        "examples.class_conditional.train_class_conditional_curriculum",
        "transformer",
        "--model_config",
        {"--caption_dropout": "--label_dropout", "--noise_offset": None}
        | {"--validation_prompts": None},
        ("--no_pictures",),
    )


def make_sdxl_bench(folder: Path) -> Bench:
    """The same for Stable Diffusion XL."""
    families()["sdxl"].save_tiny(folder / "pipeline")
    return Bench(
        folder / "pipeline",
        write_images(folder / "images", SAMPLES),
        folder / "cache",
        "examples.text_to_image.train_text_to_image_sdxl_curriculum",
        words={"--caption_dropout": "--proportion_empty_prompts", "--validation_prompts": None},
        draws=frozenset({"noise", "noise_offset", "posterior"}),
    )


def make_flow_bench(folder: Path) -> Bench:
    """The same for a family of flow matching."""
    families()["flux"].save_tiny(folder / "pipeline")
    return Bench(
        folder / "pipeline",
        write_images(folder / "images", SAMPLES),
        folder / "cache",
        "examples.text_to_image.train_text_to_image_flow_curriculum",
        "transformer",
        words={"--noise_offset": None, "--validation_prompts": None},
        more=("--resolution", "16"),
        draws=frozenset({"noise", "posterior"}),
    )


def make_unconditional_bench(folder: Path) -> Bench:
    """Write a data set and the config of a U-Net."""
    return Bench(
        write_json(folder / "unet.json", TINY_UNET),
        write_images(folder / "images", SAMPLES),
        folder / "cache",
        "examples.unconditional.train_unconditional_curriculum",
        "unet",
        "--model_config_name_or_path",
        {
            "--caption_dropout": None,
            "--noise_offset": None,
            "--validation_prompts": None,
            "--ema_decay": "--ema_max_decay",
            "--num_train_epochs": "--num_epochs",
        },
        ("--no_pictures", "--lr_scheduler", "constant"),
    )


NO_DROPOUT = ("attn_pdrop=0.0", "embd_pdrop=0.0", "resid_pdrop=0.0")  # in a gpt2


def make_token_bench(folder: Path) -> Bench:
    """Write a data set with classes, and an autoencoder that makes 64 codes of each image."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tiny_vit_vq(patch_size=1).save_pretrained(folder / "vit")
    return Bench(
        folder / "vit",
        write_images(folder / "images", SAMPLES),
        folder / "cache",
        "examples.autoregressive.train_image_tokens_curriculum",
        "transformer",
        "--pretrained_vae_model_name_or_path",
        {"--caption_dropout": "--label_dropout", "--noise_offset": None}
        | {"--validation_prompts": None},
        (
            "--no_pictures",
            "--class_conditional",
            "--model_args",
            "n_layer=1",
            "n_embd=8",
            "n_head=2",
            *NO_DROPOUT,  # each process draws its own
        ),
        draws=frozenset(),
    )


def tiny_vit_vq(patch_size: int = 2, side: int = 0) -> ViTVQModel:
    """A ViT-VQGAN with latents of 4 channels; ``side`` of them, by default as many as the small
    images give."""
    sizes: dict[str, Any] = {f"{part}_depth": 1 for part in ("encoder", "decoder")}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_dim": 8, f"{part}_heads": 2, f"{part}_mlp": 16}
    sizes |= {"image_size": patch_size * side or RESOLUTION, "patch_size": patch_size}
    return ViTVQModel(codebook_size=16, codebook_dim=4, **sizes)


def make_lora_bench(folder: Path) -> Bench:
    """Write a data set and a pipeline for an adapter."""
    return adapted(make_bench(folder))


def make_lora_sdxl_bench(folder: Path) -> Bench:
    """The same for Stable Diffusion XL, with adapters in its text encoders."""
    bench = adapted(make_sdxl_bench(folder), "lora_sdxl")
    return replace(bench, more=TEXT_ADAPTERS)


def adapted(bench: Bench, name: str = "lora") -> Bench:
    """The same pipeline and data set for an adapter, by a script of that name."""
    pytest.importorskip("peft")
    return replace(
        bench,
        script=f"examples.text_to_image.train_text_to_image_{name}_curriculum",
        trained="lora",
        left="pytorch_lora_weights.safetensors",
        weights="pytorch_lora_weights.safetensors",
        words={"--validation_prompts": None},
    )


def write_json(path: Path, content: object) -> Path:
    """Write a file, with its folders, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


# Every training script of the project; the tests of the training envelope run over all of them.
BENCHES: dict[str, Callable[[Path], Bench]] = {
    "text_to_image": make_bench,
    "text_to_image_sdxl": make_sdxl_bench,
    "text_to_image_lora": make_lora_bench,
    "text_to_image_lora_sdxl": make_lora_sdxl_bench,
    "flow": make_flow_bench,
    "class_conditional": make_class_bench,
    "unconditional": make_unconditional_bench,
    "image_tokens": make_token_bench,
}


def write_images(folder: Path, count: int, size: int = 12) -> Path:
    """Write random pictures with captions and three classes, and return their folder."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    rows = [
        {"file_name": f"{i:02d}.png", "text": f"picture number {i}", "label": i % 3}
        for i in range(count)
    ]
    for row in rows:
        pixels = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def reset_accelerate() -> None:
    """Forget the process-wide state that one Accelerator leaves for the next."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(argv: Sequence[str], *, pictures: bool = False, script: str = Bench.script) -> Record:
    """Run a script to its end; the pictures that it leaves are drawn only where asked for."""
    module = importlib.import_module(script)
    with recorded() as record, drawing(pictures):
        module.main(argv)
    return record


def status(argv: Sequence[str], script: str = Bench.script) -> int:
    """The exit status of a script, without the pictures at its end."""
    module = importlib.import_module(script)
    reset_accelerate()
    with drawing(False):
        try:
            return runtime.exit_status(lambda: module.main(argv))
        except SystemExit as error:  # from argparse
            return int(str(error.code))
        finally:
            reset_accelerate()


@contextmanager
def drawing(wanted: bool) -> Iterator[None]:
    """Leave out the two pictures at the end of a run, which take longer than the run."""
    if wanted:
        yield
        return
    with mock.patch.object(LevelMonitor, "finish", lambda monitor, folder: monitor.bar.close()):
        yield


@contextmanager
def recorded() -> Iterator[Record]:
    """Note what each update computes and what is logged, and change nothing."""
    reset_accelerate()
    record, make_update, log = Record(), job.make_update, Accelerator.log

    def update(run: Any, step: int, *rest: Any) -> Any:
        stage = stage_of(run.sampler, step)
        outcome, norm = make_update(run, step, *rest)
        record.steps.append(_noted(run, step, stage, outcome, norm))
        record.last = run
        return outcome, norm

    def logs(accelerator: Any, values: dict[str, Any], step: int, **kwargs: Any) -> None:
        record.logged.append((step, {k: v for k, v in values.items() if k not in TIMED}))
        log(accelerator, values, step=step, **kwargs)

    with mock.patch.object(job, "make_update", update), mock.patch.object(Accelerator, "log", logs):
        try:
            yield record
        finally:
            reset_accelerate()


def finite(record: Record) -> bool:
    """Whether the run made steps, all with finite positive losses."""
    losses = [float.fromhex(loss) for loss in record.losses]
    return bool(losses) and all(0 < loss < math.inf for loss in losses)


def _noted(run: Any, step: int, stage: int, outcome: Any, norm: Any) -> Step:
    return Step(
        step=step,
        loss=loss_of(outcome).hex(),
        indices=tuple(outcome.indices.tolist()),
        losses=tuple(outcome.losses.tolist()),
        norm=None if norm is None else float(norm),
        lr=run.lr_scheduler.get_last_lr()[0],
        stage=stage,
    )


def loss_of(outcome: Any) -> float:
    """The loss of a whole update."""
    return float(outcome.loss.double().mean())


def stage_of(sampler: Any, step: int) -> int:
    """The stage in which ``step`` trains, 0 without a curriculum."""
    return sampler.stage(step) if isinstance(sampler, CurriculumTimestepSampler) else 0


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` that holds state, or of it, by relative path."""
    files = [p for p in (folder, *folder.rglob("*")) if p.suffix in (".safetensors", ".json")]
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.name != "manifest.json"
    }


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of the bytes of a tensor, or of this process's shard of it."""
    own = getattr(tensor, "to_local", lambda: tensor)()
    return hashlib.sha256(own.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def checkpoint_names(folder: Path) -> set[str]:
    """The checkpoints in an output folder."""
    return {path.name for path in folder.glob("checkpoint-*")}
