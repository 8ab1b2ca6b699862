"""LoRA in one command: a tiny Stable Diffusion that knows the digits 0 to 4 is taught 5 to 9.

Runs, and shows, the commands that you would type for your own images. The adapter is trained by a
curriculum over Laplace timesteps; beside it, on the second core, one on uniform timesteps, as
diffusers draws them. Three shares of recognised digits are printed: of all, of the new ones, and of
the old ones, which may be forgotten. Nothing is downloaded; on two cores it takes a few minutes.

    python examples/text_to_image/demo_lora.py --output_dir outputs/demo-lora
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import demo
from shell import UNIFORM, changed, run_all, short, uniform_twin

SCRIPT = demo.HERE / "train_text_to_image_lora_curriculum.py"
OLD, NEW = [*map(str, range(5))], [*map(str, range(5, 10))]
TRAIN_STEPS, LORA_STEPS, VAE_STEPS = 900, 700, demo.VAE_STEPS
# Attention alone, as in diffusers' script, is little of so small a network.
TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.2", "conv1", "conv2"]


def commands(folder: Path, train_steps: int, lora_steps: int, vae_steps: int) -> list[list[str]]:
    """Return the demo's commands in order; the last but one trains the adapter."""
    export, make_tiny, train, recognise, _ = demo.commands(folder, train_steps, vae_steps)
    old, new, base, lora = (str(folder / name) for name in ("old", "new", "sd-old", "lora-new"))
    plain = uniform_twin(changed(train, validation_prompts=None, validation_steps=None)) or []
    adapt = [short(SCRIPT) if word == short(demo.SCRIPT) else word for word in train]
    return [
        export,
        changed(export, output_dir=[old], digits=OLD),
        changed(export, output_dir=[new], digits=NEW),
        make_tiny,
        changed(plain, train_data_dir=[old], output_dir=[base]),
        changed(
            adapt,
            pretrained_model_name_or_path=[base],
            train_data_dir=[new],
            output_dir=[lora],
            max_train_steps=[str(lora_steps)],
            prediction_type=None,  # that of the base
            rank=["16"],
            lora_target_modules=TARGETS,
            curriculum_patience=["8"],
            validation_prompts=None,
            validation_prompt=["a handwritten seven"],
        ),
        changed(recognise, before=[base], after=[lora], uniform=[f"{lora}{UNIFORM}"], learned=NEW),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description="Teach a tiny Stable Diffusion digits by LoRA.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-lora"))
    parser.add_argument("--max_train_steps", type=int, default=TRAIN_STEPS, help="of the base")
    parser.add_argument("--lora_steps", type=int, default=LORA_STEPS)
    parser.add_argument("--vae_steps", type=int, default=VAE_STEPS)
    args = parser.parse_args(argv)
    start = time.monotonic()
    run_all(commands(args.output_dir, args.max_train_steps, args.lora_steps, args.vae_steps))
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes. Pictures, and the adapters:")
    for folder in ("pictures", "lora-new", f"lora-new{UNIFORM}"):
        print(f"  {args.output_dir / folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
