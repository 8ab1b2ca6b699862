"""`diffusers-curriculum train`: a training script by a short name, with the script's own flags."""

from __future__ import annotations

import argparse
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

SCRIPTS = {
    "text-to-image": "train_text_to_image_curriculum",
    "lora": "train_text_to_image_lora_curriculum",
    "sdxl": "train_text_to_image_sdxl_curriculum",
    "lora-sdxl": "train_text_to_image_lora_sdxl_curriculum",
    "flow": "train_text_to_image_flow_curriculum",
    "class": "train_class_conditional_curriculum",
    "unconditional": "train_unconditional_curriculum",
    "autoencoder": "train_vit_vqgan",
    "image-tokens": "train_image_tokens_curriculum",
}
_CHECKOUT = Path(__file__).parents[2]


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    listed = "\n".join(f"  {name:<14} accelerate launch -m {SCRIPTS[name]}" for name in SCRIPTS)
    parser = commands.add_parser(
        "train",
        usage="diffusers-curriculum train KIND [the script's flags]",
        help="run a training script in this process",
        description="Run a training script in this process; what follows KIND is the script's, "
        "--help among it. For several devices or processes start the same script by accelerate:"
        f"\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", metavar="KIND", choices=SCRIPTS, help=", ".join(SCRIPTS))
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of the script")
    parser.set_defaults(handler=_train)


def script_file(kind: str) -> Path:
    """The file of a script: in a checkout where it is edited, else where pip put it.

    Raises:
        ValueError: it is in neither.
    """
    module = SCRIPTS[kind]
    for file in (_CHECKOUT / f"{module}.py", *_CHECKOUT.glob(f"examples/*/{module}.py")):
        if file.is_file():
            return file
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module}.py is not installed: install diffusers-curriculum again.")
    return Path(spec.origin)


def _train(args: argparse.Namespace) -> tuple[str, int]:
    file = script_file(args.kind)
    sys.argv = [str(file), *args.flags]
    sys.path.insert(0, str(file.parent))  # as Python does for a script
    runpy.run_path(str(file), run_name="__main__")
    return "", 0
