"""`diffusers-curriculum demo`: the demonstration on scanned digits, from an installation alone."""

from __future__ import annotations

import argparse
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# where it is edited in a checkout, and where pip puts it
_PLACES = (_PACKAGE.parent / "examples" / "text_to_image", _PACKAGE / "examples")
_FLAGS = {
    "output_dir": "where everything is written (default outputs/demo)",
    "max_train_steps": "training steps (default 600)",
    "vae_steps": "training steps of the autoencoder (default 250)",
}


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="fine-tune a tiny Stable Diffusion on scanned digits, in minutes without a GPU",
        description="Build a tiny Stable Diffusion, fine-tune it on the scanned digits of"
        " scikit-learn by a curriculum and, beside it, on uniform timesteps, and draw pictures. The"
        " commands are shown as they would be typed. Nothing is downloaded.",
    )
    for name, text in _FLAGS.items():
        parser.add_argument(f"--{name}", help=text)
    parser.set_defaults(handler=_demo)


def _demo(args: argparse.Namespace) -> tuple[str, int]:
    if find_spec("sklearn") is None:
        raise ValueError("the digits come from scikit-learn: pip install scikit-learn.")
    file = next(place / "demo.py" for place in _PLACES if (place / "demo.py").is_file())
    given = {name: vars(args)[name] for name in _FLAGS if vars(args)[name] is not None}
    sys.argv = [str(file), *(word for name in given for word in (f"--{name}", given[name]))]
    sys.path.insert(0, str(file.parent))  # as Python does for a script
    runpy.run_path(str(file), run_name="__main__")
    return "", 0
