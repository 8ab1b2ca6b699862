"""A checkpoint from the Hub: of a run that pushed it (``--hub_strategy every_save``)."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from diffusers_curriculum.training.arguments.environment import REMOTE, REMOTE_FOLDER
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process.hub_client import explained
from diffusers_curriculum.training.storage.folders import aside, checkpoints, publish, sync_tree
from diffusers_curriculum.training.storage.manifest import (
    MANIFEST,
    read_manifest,
    verify_checkpoint,
)

logger = logging.getLogger(__name__)


def local_request(accelerator: Any, args: Any) -> str | None:
    """The checkpoint that ``--resume_from_checkpoint`` asks for; one on the Hub is fetched, and is
    the only one in the output folder then."""
    request = args.resume_from_checkpoint
    if request is None or not request.startswith(REMOTE):
        return request
    if accelerator.is_main_process:
        fetch_checkpoint(args.output_dir, request, args.hub_token)
    accelerator.wait_for_everyone()
    return "latest"


def fetch_checkpoint(output_dir: str | Path, request: str, token: str | None = None) -> Path:
    """Put the checkpoint of ``hub:OWNER/NAME`` (or ``hub:OWNER/NAME@REVISION``) into the output
    folder, under its own name, once it is verified; call it on the main process.

    A download that broke off goes on where it stopped, as huggingface_hub keeps what it has.

    Raises:
        UsageError: the folder holds checkpoints, which could be of another run.
        HubError: the repository holds no checkpoint, or cannot be read.
        CheckpointError: what came is damaged.
    """
    root = Path(output_dir).resolve()
    if found := checkpoints(root):
        raise UsageError(
            f"--resume_from_checkpoint is {request}, and --output_dir {output_dir} holds "
            f"{found[-1].name} already: go on with it by --resume_from_checkpoint latest, or give "
            "another folder."
        )
    name, _, revision = request.removeprefix(REMOTE).partition("@")
    advice = "check the name and revision, that the token may read it (`hf auth login`), and that "
    advice += "its run pushed with --hub_strategy every_save"
    with explained(f"the checkpoint of {name!r} could not be had", advice, token):
        found = snapshot_download(
            name, revision=revision or None, token=token, allow_patterns=f"{REMOTE_FOLDER}/*"
        )
    source = Path(found, REMOTE_FOLDER)
    manifest = read_manifest(source)
    final = root / f"checkpoint-{manifest['step']}"
    folder = aside(final, "tmp")
    try:
        for file in (MANIFEST, *manifest["files"]):  # and nothing else that may lie there
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, folder / file)
        verify_checkpoint(folder)
        sync_tree(folder)
        publish(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("%s comes from %s.", final, name)
    return final
