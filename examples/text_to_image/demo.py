"""The whole way in one command: scans, a tiny Stable Diffusion, training, pictures.

Runs, and shows, the commands that you would type for your own images. Beside the training, on the
second core, the same number of steps is trained on uniform timesteps, as diffusers draws them, for
comparison. Nothing is downloaded; on two cores without a GPU it takes a few minutes.

    python examples/text_to_image/demo.py --output_dir outputs/demo
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from shell import UNIFORM, run_all, short

from diffusers_curriculum.cli.train import script_file

HERE = Path(__file__).resolve().parent
SCRIPT = script_file("text-to-image")
RESOLUTION = "32"
TRAIN_STEPS, VAE_STEPS = 600, 250
CHECKPOINTS = 6  # of each run, evenly apart


def commands(folder: Path, train_steps: int, vae_steps: int) -> list[list[str]]:
    """Return the demo's commands in order; the third one is the training itself."""
    scans, tiny, trained = (str(folder / name) for name in ("digits", "tiny-sd", "sd-digits"))
    pictures = str(folder / "pictures")
    return [
        ["python", short(HERE / "digits.py"), "--output_dir", scans, "--resolution", RESOLUTION],
        [
            *("diffusers-curriculum", "make-tiny", "--train_data_dir", scans, "--output_dir", tiny),
            *("--resolution", RESOLUTION, "--vae_steps", str(vae_steps), "--seed", "0"),
        ],
        [
            *("accelerate", "launch", "--num_processes", "1", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", "1")),
            *(short(SCRIPT), "--pretrained_model_name_or_path", tiny),
            *("--train_data_dir", scans, "--output_dir", trained, "--resolution", RESOLUTION),
            *("--train_batch_size", "64", "--max_train_steps", str(train_steps)),
            *("--learning_rate", "1e-3", "--prediction_type", "v_prediction", "--use_ema"),
            *("--timestep_sampler", "laplace", "--timestep_sampler_args", "mu=0", "b=1"),
            *("--timestep_draw", "stratified", "--curriculum", "difficulty"),
            *("--curriculum_clusters", "10", "--curriculum_patience", "5"),
            *("--checkpointing_steps", str(max(1, train_steps // CHECKPOINTS))),
            *("--validation_prompts", "a handwritten seven", "the digit 3"),
            *("--validation_steps", "300", "--log_every", "10", "--seed", "0"),
            "--overwrite_output_dir",
        ],
        [
            *("python", short(HERE / "recognise.py"), "--before", tiny, "--after", trained),
            *("--uniform", f"{trained}{UNIFORM}", "--output_dir", pictures),
        ],
        [
            *("python", short(HERE / "learning_curve.py"), "--run", trained),
            *("--uniform", f"{trained}{UNIFORM}", "--output_dir", pictures),
        ],
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a tiny Stable Diffusion on real scans.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--max_train_steps", type=int, default=TRAIN_STEPS)
    parser.add_argument("--vae_steps", type=int, default=VAE_STEPS)
    args = parser.parse_args(argv)
    start = time.monotonic()
    run_all(commands(args.output_dir, args.max_train_steps, args.vae_steps))
    trained = args.output_dir / "sd-digits"
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes. Pictures:")
    for text, file in (
        ("digits, prompts by samples", args.output_dir / "pictures" / "digits_after.png"),
        ("the same before training", args.output_dir / "pictures" / "digits_before.png"),
        ("recognised digits by steps", args.output_dir / "pictures" / "learning_curve.png"),
        ("timesteps trained on, by stage", trained / "timesteps.png"),
        ("loss per noise level", trained / "loss_per_noise_level.png"),
    ):
        print(f"  {text:32}{file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
