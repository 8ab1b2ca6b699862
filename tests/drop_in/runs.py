"""Two training steps of official scripts on tiny pipelines, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from tests.drop_in.changes import changed, edits_of
from tests.drop_in.tiny_pipelines import build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IMAGES = 4
BATCH, STEPS = 2, 2


@dataclass(frozen=True)
class Recipe:
    """What a script is run on, with which arguments, and the weights it should leave.

    The timesteps that were drawn are ``origin + scale * seen`` of those that its network is given,
    each ``copies`` times, batch by batch.
    """

    pipeline: str
    arguments: str
    weights: str
    scale: float = 1.0
    origin: float = 0.0
    copies: int = 1


_COMMON = (
    "--output_dir {out} --resolution 64 --train_batch_size 2 --report_to tensorboard --seed 3"
    " --lr_scheduler constant --lr_warmup_steps 0"
)
_TEXT = (
    "--pretrained_model_name_or_path {pipeline} --train_data_dir {captioned} --cache_dir {cache}"
    " --max_train_steps 2 " + _COMMON
)
_FULL_SUBJECT = (
    "--pretrained_model_name_or_path {pipeline} --instance_data_dir {images} --instance_prompt"
    " photo --max_train_steps 2 " + _COMMON
)
_SUBJECT = "--rank 2 " + _FULL_SUBJECT
_TOKEN = (
    "--pretrained_model_name_or_path {pipeline} --train_data_dir {images} --placeholder_token new"
    " --initializer_token a --learnable_property object --max_train_steps 2 " + _COMMON
)
_CONTROL = (
    "--pretrained_model_name_or_path {pipeline} --dataset_name {controlled} --cache_dir {cache}"
    " --max_train_steps 2 " + _COMMON
)
_EDIT = (
    "--pretrained_model_name_or_path {pipeline} --dataset_name {controlled} --cache_dir {cache}"
    " --original_image_column image --edited_image_column conditioning_image"
    " --edit_prompt_column text --max_train_steps 2 " + _COMMON
)
_PAIRED = (
    "--rank 2 --pretrained_model_name_or_path {pipeline} --dataset_name {controlled} --image_column"
    " image --cond_image_column conditioning_image --caption_column text --instance_prompt photo"
    " --cache_dir {cache}"
    " --max_train_steps 2 " + _COMMON
)
_KANDINSKY = (
    "--pretrained_decoder_model_name_or_path {pipeline} --pretrained_prior_model_name_or_path"
    " {pipeline}/prior --train_data_dir {captioned} --cache_dir {cache} --max_train_steps 2 "
    + _COMMON
)
# of captions, where a script without them takes one sample at a time
_CAPTIONED = (
    "--rank 2 --pretrained_model_name_or_path {pipeline} --dataset_name {captioned} --image_column"
    " image --caption_column text --instance_prompt photo --cache_dir {cache} --max_train_steps 2 "
    + _COMMON
)
_PREFERENCES = (
    "--rank 2 --pretrained_model_name_or_path {pipeline} --dataset_name {pairs}"
    " --dataset_split_name train --cache_dir {cache} --max_train_steps 2 " + _COMMON
)
_CONTROLNET = "diffusion_pytorch_model.safetensors"
_LORA = "pytorch_lora_weights.safetensors"
_TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
_UNET = "unet/diffusion_pytorch_model.safetensors"
RECIPES = {
    "text_to_image/train_text_to_image.py": Recipe("sd", _TEXT, _UNET),
    "text_to_image/train_text_to_image_lora.py": Recipe("sd", _TEXT, _LORA),
    "text_to_image/train_text_to_image_sdxl.py": Recipe("sdxl", _TEXT, _UNET),
    "dreambooth/train_dreambooth_lora_sd3.py": Recipe("sd3", _SUBJECT, _LORA),
    "dreambooth/train_dreambooth_lora_flux.py": Recipe("flux", _SUBJECT, _LORA, 1000.0),
    "text_to_image/train_text_to_image_lora_sdxl.py": Recipe("sdxl", _TEXT, _LORA),
    "dreambooth/train_dreambooth.py": Recipe("sd", _FULL_SUBJECT, _UNET),
    "dreambooth/train_dreambooth_lora.py": Recipe("sd", _SUBJECT, _LORA),
    "dreambooth/train_dreambooth_lora_sdxl.py": Recipe("sdxl", _SUBJECT, _LORA),
    "dreambooth/train_dreambooth_sd3.py": Recipe("sd3", _FULL_SUBJECT, _TRANSFORMER),
    "dreambooth/train_dreambooth_flux.py": Recipe("flux", _FULL_SUBJECT, _TRANSFORMER, 1000.0),
    "textual_inversion/textual_inversion.py": Recipe("sd", _TOKEN, "learned_embeds.safetensors"),
    "textual_inversion/textual_inversion_sdxl.py": Recipe(
        "sdxl", _TOKEN, "learned_embeds.safetensors"
    ),
    "advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py": Recipe(
        "sd", _SUBJECT, _LORA
    ),
    "advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py": Recipe(
        "sdxl", _SUBJECT, _LORA
    ),
    "advanced_diffusion_training/train_dreambooth_lora_flux_advanced.py": Recipe(
        "flux", _SUBJECT, _LORA, 1000.0
    ),
    "dreambooth/train_dreambooth_lora_sdxl.py --do_edm_style_training": Recipe(
        "sdxl", _SUBJECT, _LORA
    ),
    "dreambooth/train_dreambooth_lora_lumina2.py": Recipe("lumina2", _SUBJECT, _LORA, 1000.0),
    "dreambooth/train_dreambooth_lora_flux_kontext.py": Recipe("flux", _PAIRED, _LORA, 1000.0),
    "dreambooth/train_dreambooth_lora_ideogram4.py": Recipe(
        "ideogram4", _SUBJECT, _LORA, -1000.0, 1000.0
    ),
    "kandinsky2_2/text_to_image/train_text_to_image_decoder.py": Recipe(
        "kandinsky", _KANDINSKY, _UNET
    ),
    "kandinsky2_2/text_to_image/train_text_to_image_prior.py": Recipe(
        "kandinsky", _KANDINSKY, "prior/diffusion_pytorch_model.safetensors"
    ),
    "dreambooth/train_dreambooth_lora_flux2_klein.py": Recipe(
        "flux2", _SUBJECT + " --text_encoder_out_layers 9 18 27", _LORA, 1000.0
    ),
    "dreambooth/train_dreambooth_lora_flux2_klein_img2img.py": Recipe(
        "flux2", _PAIRED, _LORA, 1000.0
    ),
    "dreambooth/train_dreambooth_lora_qwen_image.py": Recipe("qwen_image", _SUBJECT, _LORA, 1000.0),
    "dreambooth/train_dreambooth_lora_z_image.py": Recipe(
        "z_image", _SUBJECT, _LORA, -1000.0, 1000.0
    ),
    "dreambooth/train_dreambooth_lora_krea2.py": Recipe("krea2", _SUBJECT, _LORA, 1000.0),
    "dreambooth/train_dreambooth_lora_sana.py": Recipe("sana", _CAPTIONED, _LORA),
    "dreambooth/train_dreambooth_lora_hidream.py": Recipe(
        "hidream",
        _CAPTIONED + " --max_sequence_length 77"
        " --pretrained_text_encoder_4_name_or_path {pipeline}/text_encoder_4"
        " --pretrained_tokenizer_4_name_or_path {pipeline}/tokenizer_4",
        _LORA,
    ),
    "instruct_pix2pix/train_instruct_pix2pix.py": Recipe("sd", _EDIT, _UNET),
    "instruct_pix2pix/train_instruct_pix2pix_sdxl.py": Recipe("sdxl", _EDIT, _UNET),
    "t2i_adapter/train_t2i_adapter_sdxl.py": Recipe(
        "sdxl_adapter", _CONTROL + " --adapter_model_name_or_path {pipeline}/adapter", _CONTROLNET
    ),
    "controlnet/train_controlnet.py": Recipe("sd", _CONTROL, _CONTROLNET),
    "controlnet/train_controlnet_sdxl.py": Recipe("sdxl", _CONTROL, _CONTROLNET),
    "controlnet/train_controlnet_sd3.py": Recipe("sd3", _CONTROL, _CONTROLNET),
    "controlnet/train_controlnet_flux.py": Recipe(
        "flux", _CONTROL + " --num_double_layers 1 --num_single_layers 1", _CONTROLNET, 1000.0
    ),
    "flux-control/train_control_flux.py": Recipe("flux", _CONTROL, _CONTROLNET, 1000.0),
    "flux-control/train_control_lora_flux.py": Recipe(
        "flux", _CONTROL + " --rank 2", _LORA, 1000.0
    ),
    "custom_diffusion/train_custom_diffusion.py": Recipe(
        "sd",
        _FULL_SUBJECT + " --modifier_token new --initializer_token a",
        "pytorch_custom_diffusion_weights.safetensors",
    ),
    "research_projects/diffusion_dpo/train_diffusion_dpo.py": Recipe(
        "sd", _PREFERENCES, _LORA, copies=2
    ),
    "unconditional_image_generation/train_unconditional.py": Recipe(
        "unconditional",
        "--train_data_dir {images} --cache_dir {cache} --output_dir {out} --resolution 16"
        " --model_config_name_or_path {pipeline} --train_batch_size 2 --num_epochs 1"
        " --ddpm_num_inference_steps 2 --logger tensorboard --dataloader_num_workers 0",
        _UNET,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: int
    output: str
    drawn: list[list[float]]
    seen: list[list[float]]
    weights: Path


def run(name: str, source: Path, folder: Path) -> Outcome:
    """Run one of ``RECIPES`` with its change, from a checkout of diffusers, in ``folder``."""
    recipe, (path, *more) = RECIPES[name], name.split()
    official = (source / "examples" / path).read_text("utf-8")
    script = folder / Path(path).name
    script.write_text(changed(official, edits_of(path)), "utf-8")
    places = {
        "pipeline": build(recipe.pipeline, folder / "pipeline"),
        "images": _write_images(folder / "images"),
        "captioned": _write_captions(_write_images(folder / "captioned")),
        "controlled": _write_captions(_write_images(folder / "controlled"), control=True),
        "pairs": _write_pairs(folder / "pairs"),
        "cache": folder / "cache",
        "out": folder / "out",
    }
    arguments = [word.format(**places) for word in recipe.arguments.split()] + more
    witness = folder / "witness.json"
    command = [sys.executable, str(HERE / "run_official.py"), str(witness), str(script)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    notes = json.loads(witness.read_text("utf-8")) if witness.is_file() else {}
    drawn, seen = notes.get("drawn", []), notes.get("seen", [])
    return Outcome(done.returncode, done.stdout, drawn, seen, folder / "out" / recipe.weights)


def _write_images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(IMAGES)]
    for name in names:
        Image.fromarray(draw.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(folder / name)
    return folder


def _write_captions(folder: Path, *, control: bool = False) -> Path:
    names = [path.name for path in sorted(folder.iterdir())]
    rows = [{"file_name": name, "text": "a photo"} for name in names]
    if control:
        rows = [row | {"conditioning_image_file_name": row["file_name"]} for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder


def _write_pairs(folder: Path) -> Path:
    """Pairs of images in one table, of which the first or the second is preferred."""
    images = [path.read_bytes() for path in sorted(_write_images(folder / "images").iterdir())]
    table = {"jpg_0": images, "jpg_1": images[::-1], "label_0": [1, 0] * (IMAGES // 2)}
    rows = Dataset.from_dict(table | {"caption": ["a photo"] * IMAGES})
    rows.to_parquet(folder / "train" / "pairs.parquet")
    return folder / "train"


def _environment(folder: Path) -> dict[str, str]:
    """Offline, on the CPU, with this library and a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
