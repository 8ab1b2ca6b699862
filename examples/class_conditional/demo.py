"""The whole way in one command: scans by class, an autoencoder, a DiT, a grid of ten classes.

Runs, and shows, the commands that you would type for your own images. Beside the training, on the
second core, the same number of steps is trained on uniform timesteps, as diffusers draws them, for
comparison. Nothing is downloaded; on two cores without a GPU it takes a few minutes.

    python examples/class_conditional/demo.py --output_dir outputs/demo-class
    python examples/class_conditional/demo.py --latents vit_vqgan --output_dir outputs/demo-vit
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "text_to_image"))
from shell import UNIFORM, run_all, short  # noqa: E402

SCRIPT = HERE / "train_class_conditional_curriculum.py"
AUTOENCODER_SCRIPT = HERE.parent / "autoencoder" / "train_vit_vqgan.py"
DIGITS = HERE.parent / "text_to_image" / "digits.py"
RESOLUTION, TRAIN_STEPS = "32", 1500
VIT_SIZES = ("dim=128", "depth=2", "heads=4", "mlp=256")


def commands(folder: Path, latents: str, train_steps: int) -> list[list[str]]:
    """Return the demo's commands in order; the third one is the training itself."""
    scans, held_out = str(folder / "digits"), str(folder / "held_out")
    trained, autoencoder = str(folder / "dit-digits"), str(folder / "autoencoder")
    make = {"kl": make_kl, "vit_vqgan": make_vit_vqgan}[latents]
    return [
        [
            *("python", short(DIGITS), "--by_class", "--output_dir", scans),
            *("--held_out_dir", held_out, "--resolution", RESOLUTION),
        ],
        make(scans, held_out, autoencoder),
        [
            *("accelerate", "launch", "--num_processes", "1", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", "1")),
            *(short(SCRIPT), *network(latents)),
            *("--pretrained_vae_model_name_or_path", autoencoder, "--cache_latents"),
            *("--train_data_dir", scans, "--output_dir", trained, "--resolution", RESOLUTION),
            *("--train_batch_size", "64", "--max_train_steps", str(train_steps)),
            *("--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "50"),
            *("--use_ema", "--ema_decay", "0.995"),
            *("--timestep_sampler", "laplace", "--timestep_sampler_args", "mu=0", "b=0.5"),
            *("--timestep_draw", "stratified", "--curriculum", "difficulty"),
            *("--curriculum_clusters", "10", "--curriculum_patience", "15"),
            *("--validation_steps", "500", "--validation_inference_steps", "25"),
            *("--log_every", "10", "--seed", "0", "--overwrite_output_dir"),
        ],
        [
            *("python", short(HERE / "recognise_classes.py"), "--pipeline", trained),
            *("--uniform", f"{trained}{UNIFORM}", "--output_dir", str(folder / "pictures")),
        ],
    ]


def network(latents: str) -> list[str]:
    """Return the flags that say which DiT is trained, and what it predicts.

    A patch of two by two vectors of the ViT-VQGAN holds 128 numbers, as many as the DiT is wide:
    too many for it to let the noise through, as a prediction of noise or v must; x0 it can tell.
    """
    if latents == "kl":
        config, more = "dit_digits.json", ["--prediction_type", "v_prediction"]
    else:
        config = "dit_digits_patch2.json"
        more = ["--prediction_type", "sample", "--loss_weighting", "unit_v"]
    return ["--model_config", short(HERE / config), *more]


def make_kl(scans: str, held_out: str, output_dir: str) -> list[str]:
    """Return the command that trains a small AutoencoderKL, inside a pipeline."""
    return [
        *("diffusers-curriculum", "make-tiny", "--train_data_dir", scans),
        *("--output_dir", output_dir, "--resolution", RESOLUTION, "--vae_steps", "250"),
        *("--seed", "0"),
    ]


def make_vit_vqgan(scans: str, held_out: str, output_dir: str) -> list[str]:
    """Return the command that trains a small ViT-VQGAN."""
    return [
        *("python", short(AUTOENCODER_SCRIPT), "--train_data_dir", scans),
        *("--validation_data_dir", held_out, "--output_dir", output_dir),
        *("--resolution", RESOLUTION, "--adversarial_weight", "0", "--model_args"),
        *("patch_size=4", "codebook_size=256"),
        *(f"{part}_{size}" for part in ("encoder", "decoder") for size in VIT_SIZES),
        *("--train_batch_size", "32", "--max_train_steps", "1000", "--learning_rate", "2e-3"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "50", "--codebook_patience", "20"),
        *("--seed", "0", "--overwrite_output_dir"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description="Train a small DiT on real scans, class by class.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-class"))
    parser.add_argument("--max_train_steps", type=int, default=TRAIN_STEPS)
    parser.add_argument(
        "--latents", choices=("kl", "vit_vqgan"), default="kl", help="of which autoencoder"
    )
    args = parser.parse_args(argv)
    start = time.monotonic()
    run_all(commands(args.output_dir, args.latents, args.max_train_steps))
    trained = args.output_dir / "dit-digits"
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes. Pictures:")
    for text, file in (
        ("digits, classes by samples", args.output_dir / "pictures" / "digits_by_class.png"),
        ("the same, drawn by the script", trained / "val_imgs_grid.png"),
        ("timesteps trained on, by stage", trained / "timesteps.png"),
        ("loss per noise level", trained / "loss_per_noise_level.png"),
    ):
        print(f"  {text:32}{file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
