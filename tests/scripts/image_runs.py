"""Minuscule autoencoders, networks and command lines for every kind of image run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    VQModel,
)
from PIL import Image

from diffusers_curriculum.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from diffusers_curriculum.training.loop.job import Job
from tests.scripts.small_runs import TINY_DIT, TINY_UNET, tiny_vit_vq, write_images, write_json

CLASS_SCRIPT = "examples.class_conditional.train_class_conditional_curriculum"
UNCONDITIONAL_SCRIPT = "examples.unconditional.train_unconditional_curriculum"
FORMULATIONS = {
    "epsilon": ("--prediction_type", "epsilon"),
    "v_prediction": ("--prediction_type", "v_prediction"),
    "sample": ("--prediction_type", "sample"),
    "flow": ("--formulation", "flow"),
    "edm": ("--formulation", "edm"),
    "mean_flow": ("--formulation", "mean_flow", "--interval_opening_steps", 10),
}
SPACES = ("pixels", "AutoencoderKL", "VQModel", "ViTVQModel")
NETWORKS = {"dit": TINY_DIT, "unet": TINY_UNET}
RESOLUTION = 8
_BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@dataclass(frozen=True)
class Materials:
    """What the runs are made of, in one folder."""

    folder: Path

    def argv(self, output: Path, script: str, network: str, space: str, *more: object) -> list[str]:
        """A command line of one of the two scripts."""
        conditional = script == CLASS_SCRIPT
        flag = "--model_config" if conditional else "--model_config_name_or_path"
        words: list[object] = [
            *(flag, self.folder / f"{network}.json", "--output_dir", output, "--seed", 3),
            *("--train_data_dir", self.folder / "images", "--cache_dir", self.folder / "cache"),
            *("--resolution", RESOLUTION, "--train_batch_size", 4, "--learning_rate", 1e-3),
            *("--no_pictures", "--lr_warmup_steps", 0),
        ]
        if space != "pixels":
            words += ["--pretrained_vae_model_name_or_path", self.folder / space]
        return [str(word) for word in (*words, *more)]


def make_materials(folder: Path) -> Materials:
    """Write images, network configs and autoencoders with random weights."""
    write_images(folder / "images", 18)
    for name, config in NETWORKS.items():
        write_json(folder / f"{name}.json", config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        AutoencoderKL(**_BLOCKS, latent_channels=4, scaling_factor=1.3).save_pretrained(
            folder / "AutoencoderKL"
        )
        VQModel(**_BLOCKS, latent_channels=4, num_vq_embeddings=16).save_pretrained(
            folder / "VQModel"
        )
        tiny_vit_vq().save_pretrained(folder / "ViTVQModel")
    return Materials(folder)


def load_pipeline(folder: Path) -> Any:
    """A pipeline that a run left, in one line as its card says."""
    own = {kind.__name__: kind for kind in (ClassConditionalPipeline, UnconditionalPipeline)}
    index: Any = DiffusionPipeline.load_config(str(folder))
    name = index["_class_name"]
    kind = own[name[1]] if isinstance(name, list | tuple) else DiffusionPipeline
    pipeline = kind.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, conditional: bool) -> np.ndarray:
    """Three images of one seed, guided where there are classes."""
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    options |= {"generator": torch.Generator().manual_seed(5)}
    if conditional:
        return pipeline(class_labels=[0, 1, 2], guidance_scale=1.5, **options).images
    return pipeline(batch_size=3, **options).images


def state_of(module: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights of a module."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@contextmanager
def weights_after_each_step() -> Iterator[list[dict[str, torch.Tensor]]]:
    """Note the trained weights after each optimizer step, as they are before anything is drawn."""
    noted: list[dict[str, torch.Tensor]] = []
    after_update = Job._after_update

    def noting(job: Any, *args: Any) -> None:
        noted.append(state_of(job.network))
        after_update(job, *args)

    with mock.patch.object(Job, "_after_update", noting):
        yield noted


def write_class_folders(folder: Path, names: Sequence[str], each: int = 4) -> Path:
    """Write random pictures in one folder per class, and return the folder of all."""
    draw = np.random.default_rng(1)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def make_pretrained_dit(folder: Path, vae: Path, *, old: bool = False, outputs: int = 8) -> Path:
    """Save a DiTPipeline with the settings of the public ones, but for its widths.

    Args:
        old: its transformer is called Transformer2DModel, as in checkpoints of before 2024.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        network = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=outputs,
            num_layers=2,
            patch_size=2,
            sample_size=RESOLUTION // 2,
            num_embeds_ada_norm=1000,
        )
    names = {number: f"thing {number}, synonym {number}" for number in range(1000)}
    autoencoder: Any = AutoencoderKL.from_pretrained(vae)
    scheduler: Any = DDIMScheduler(clip_sample=False)
    pipeline = DiTPipeline(network, autoencoder, scheduler, names)
    pipeline.register_to_config(id2label=names)
    pipeline.save_pretrained(folder)
    if old:
        _call_it_transformer_2d(folder)
    return folder


def _call_it_transformer_2d(folder: Path) -> None:
    config, index = folder / "transformer/config.json", folder / "model_index.json"
    settings = json.loads(config.read_text("utf-8")) | {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.12.0.dev0",
        "cross_attention_dim": None,
        "double_self_attention": False,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    write_json(config, settings)
    parts = json.loads(index.read_text("utf-8"))
    write_json(index, parts | {"transformer": ["diffusers", "Transformer2DModel"]})
