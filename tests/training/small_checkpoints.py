"""Checkpoints of three small files, for the tests of what happens to checkpoints."""

from __future__ import annotations

from pathlib import Path

from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint


def write(folder: Path, content: str = "weights") -> None:
    """A checkpoint of three files, one of them in a folder."""
    (folder / "unet").mkdir()
    for name in ("unet/config.json", "unet/model.bytes", "state.json"):
        with open(folder / name, "w", encoding="utf-8") as file:
            file.write(f"{content} of {name}")


def save(root: Path, step: int, limit: int | None = None, content: str = "weights") -> Path:
    return save_checkpoint(root, step, lambda f: write(f, content), {"world_size": 1}, limit)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def content_of(folder: Path) -> str:
    return (folder / "state.json").read_text().split(" of ")[0]
