"""Pushing a finished pipeline to the Hub: everything that can fail fails before training.

Call these from the main process only. A token is given or comes from the login; it is passed to
the client and neither stored nor logged. What leaves the machine is a list of known files.
"""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from diffusers_curriculum.models.loading import PART_MODULES
from diffusers_curriculum.pipelines.self_contained import PIPELINE_MODULE, is_own_pipeline
from diffusers_curriculum.samplers.files import CONFIG, FOLDER, STATE
from diffusers_curriculum.training.arguments.environment import REMOTE_FOLDER, check_repository_name
from diffusers_curriculum.training.errors import HubError
from diffusers_curriculum.training.process.hub_client import explained, make_client
from diffusers_curriculum.training.publish.card import CardFacts, build_model_card
from diffusers_curriculum.training.storage.components import is_known_file
from diffusers_curriculum.training.storage.manifest import MANIFEST, read_manifest

logger = logging.getLogger(__name__)

COMMIT_MESSAGE = "End of training"
_SAMPLER = (CONFIG, STATE)
_FOR_A_TIME, _WAITS = (429, 500, 502, 503, 504), (2, 10, 60)  # statuses, and seconds
_LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
_PICTURE = re.compile(r"\w[\w.-]*\.png", re.ASCII)
_ROOT_FILES = re.compile(r"README\.md|model_index\.json|" + re.escape(_LORA_WEIGHTS))


def prepare_repository(
    facts: CardFacts, *, token: str | None = None, private: bool = False, api: HfApi | None = None
) -> str:
    """Create the repository before training and return its full name, "owner/name".

    The card is built once for trial first, so that no run of hours ends in an error there and no
    empty repository is left behind by a bad name. ``private`` hides a new one only.

    Raises:
        HubError: bad name or licence, no token, or the Hub refused.
    """
    check_repository_name(facts.repo_id)
    build_model_card(facts)
    client = make_client(token, api)
    advice = "check the name and that the token may write, or leave out --push_to_hub"
    with explained(f"repository {facts.repo_id!r} could not be created", advice, client.token):
        settings: dict[str, Any] = {"private": True} if private else {}
        return client.create_repo(facts.repo_id, exist_ok=True, **settings).repo_id


def write_model_card(facts: CardFacts, output_dir: str | Path) -> Path:
    """Write README.md into the output folder and return its path."""
    path = Path(output_dir) / "README.md"
    build_model_card(facts).save(path)
    return path


def push(
    output_dir: str | Path,
    repo_id: str,
    *,
    checkpoint: Path | None = None,
    token: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload the pipeline, and a checkpoint to resume from, in one commit and return its address.

    The client tries again what was refused for a time or broke off, and what an earlier try has
    brought is not sent again; a file that has not changed is left out.

    Raises:
        HubError: there is nothing to upload, no token, or the Hub refused; the folder is left as it
            was.
    """
    check_repository_name(repo_id)
    folder, message = Path(output_dir), COMMIT_MESSAGE
    files = {name: folder / name for name in files_to_upload(folder)}
    if checkpoint is not None:
        manifest = read_manifest(checkpoint)
        message = f"Step {manifest['step']}"
        files |= {f"{REMOTE_FOLDER}/{n}": checkpoint / n for n in (MANIFEST, *manifest["files"])}
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    client = make_client(token, api)
    advice = f"the pipeline is whole in {str(folder)!r}, upload it again when the Hub answers"
    with explained(f"upload to {repo_id!r} failed", advice, client.token):
        commit = _commit(client, repo_id, additions, message)
    logger.info("uploaded %d files to %s", len(additions), repo_id)
    return str(commit.commit_url)


def _commit(client: HfApi, repo_id: str, additions: list[Any], message: str) -> Any:
    """A commit; the client itself asks again for all that is sent before it, and not for it."""
    for wait in _WAITS:
        try:
            return client.create_commit(repo_id, additions, commit_message=message)
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status not in _FOR_A_TIME:
                raise
            logger.warning("The Hub is busy (%d): asking again in %d s.", status, wait)
        time.sleep(wait)
    return client.create_commit(repo_id, additions, commit_message=message)


def files_to_upload(output_dir: str | Path) -> list[str]:
    """The files of a saved pipeline that may leave the machine, as sorted relative paths.

    Only files known by name in the folder itself, in that of the sampler and in the components that
    model_index.json lists: no checkpoints, logs, run files, hidden files or links. A HubError says
    that the folder holds neither a pipeline nor LoRA weights.
    """
    folder = Path(output_dir)
    index = folder / "model_index.json"
    entries: dict[str, Any] = json.loads(index.read_text("utf-8")) if index.is_file() else {}
    names = [path.name for path in _regular_files(folder) if _ROOT_FILES.fullmatch(path.name)]
    names += pictures(folder)
    if not {index.name, _LORA_WEIGHTS} & set(names):
        raise HubError(f"{str(folder)!r} holds no pipeline: neither model_index.json nor LoRA")
    if is_own_pipeline(entries.get("_class_name")):
        names += [f.name for f in _regular_files(folder) if f.name == f"{PIPELINE_MODULE}.py"]
    law = [file for file in _regular_files(folder / FOLDER) if file.name in _SAMPLER]
    names += [f"{FOLDER}/{file.name}" for file in law]
    for name, entry in _components(entries).items():
        known = [f for f in _regular_files(folder / name) if _belongs(f.name, entry)]
        names += [f"{name}/{file.name}" for file in known]
    return sorted(names)


def pictures(output_dir: str | Path) -> list[str]:
    """The pictures in the folder itself, all of which are uploaded."""
    names = (file.name for file in _regular_files(Path(output_dir)))
    return sorted(name for name in names if _PICTURE.fullmatch(name))


def _components(entries: dict[str, Any]) -> dict[str, list[Any]]:
    """The sub-folders that model_index.json names as components, with library and class."""
    filled = {k: v for k, v in entries.items() if isinstance(v, list) and any(v)}
    return {name: entry for name, entry in filled.items() if re.fullmatch(r"[A-Za-z]\w*", name)}


def _belongs(file: str, entry: list[Any]) -> bool:
    """Whether a file is one of a component: known by name, or the module of its class."""
    module, _ = PART_MODULES.get(str(entry[-1]), (None, None))
    return is_known_file(file) or (entry[0] == module and file == f"{module}.py")


def _regular_files(folder: Path) -> list[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
