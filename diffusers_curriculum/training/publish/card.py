"""The model card of a fine-tuned pipeline, from facts and from nothing else.

Whatever a user wrote (prompts, paths, names) is shown as text: it can neither break the front
matter or the code block, nor bring raw HTML, links or pictures of its own. Paths are asked about
with ``os.path``, which answers False where ``Path`` raises (names too long, say).
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from diffusers_curriculum.training.arguments.environment import is_repository_name
from diffusers_curriculum.training.errors import HubError

TAGS = ("diffusers", "diffusers-training")
_TITLES = {
    "timesteps.png": "Noise levels that were drawn",
    "loss_per_noise_level.png": "Loss by noise level",
    "validation_loss.png": "Loss of samples that were kept apart",
}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*", re.ASCII)
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
# What Markdown would not show as itself: emphasis, code, links (also of bare addresses), HTML.
_MARKUP = re.compile(r"[\\`*\[\]<>&~|$@#]|(?<![^\W_])_|_(?![^\W_])|(?<=/)/|(?<=\w)\.(?=[^\W\d_])")
_LINE_START = re.compile(r"\d*[.)]|[+=-]")  # of lists and rules
_USAGE = """\
```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({repo_id}, torch_dtype=torch.float16)
image = pipeline(prompt={prompt}).images[0]
image.save("image.png")
```"""

_LAW = """\
The law of the noise levels, with what it has learned:

```python
from diffusers_curriculum import TimestepSampler

sampler = TimestepSampler.from_pretrained({repo_id})
```"""
_REPEATED = """\
With these flags as the file run.yaml; folders are named without their paths:

```yaml
{flags}
```

```bash
accelerate launch -m {script} --config run.yaml --output_dir again
```"""


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells about a training run; None or empty is left out.

    Attributes:
        repo_id: the repository, "name" or "owner/name".
        base_model: the pipeline that was fine-tuned; of a local one only the folder's name shows.
            None: trained from scratch.
        dataset_name: the data set on the Hub, None for a local folder.
        sources: the names of several, of those on the Hub; empty for one.
        prompts: the validation prompts or classes, in the order of the pictures.
        image_grid: the file name of the picture grid beside the card.
        pictures: the file names of all others beside it.
        training, sampler: name and value of each thing to say about the training and about the
            timestep sampler.
        flags: by which the training can be repeated; of ``script``, a module.
        versions: of the libraries that the pipeline was made with.
        license: the user's word; by default that of the base model's card.
        prompts_title: what the list of prompts is called.
        title: what the model is called; by default a fine-tuned or trained pipeline.
        usage: Python code that draws a picture, with ``{repo_id}``, ``{base}`` and ``{prompt}``
            where their literals belong.
    """

    repo_id: str
    base_model: str | None = None
    dataset_name: str | None = None
    sources: tuple[str | None, ...] = ()
    prompts: tuple[str, ...] = ()
    image_grid: str | None = None
    pictures: tuple[str, ...] = ()
    training: Mapping[str, object] = field(default_factory=dict)
    sampler: Mapping[str, object] = field(default_factory=dict)
    flags: Mapping[str, object] = field(default_factory=dict)
    script: str = "train_text_to_image_curriculum"
    versions: Mapping[str, object] = field(default_factory=dict)
    license: str | None = None
    tags: tuple[str, ...] = TAGS
    prompts_title: str = "Validation prompts"
    title: str = ""
    usage: str = _USAGE


def build_model_card(facts: CardFacts) -> ModelCard:
    """Make the card; needs no network, no tracker, no prompt and no template engine.

    diffusers' ``load_or_create_model_card`` is not used: it asks the Hub, keeps a stale card of
    an earlier run, and adds a second, empty code block.

    Raises:
        HubError: ``license`` is not one that the Hub accepts. Any ``repo_id`` will do, as a card
            is also written where nothing is pushed.
    """
    data = ModelCardData(
        base_model=_hub_name(facts.base_model),
        datasets=_hub_names(facts.sources) or _hub_name(facts.dataset_name),
        library_name="diffusers",
        license=resolve_license(facts.base_model, facts.license),
        inference=True,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(facts)}\n")
    return populate_model_card(card, tags=list(facts.tags))


def resolve_license(base_model: str | None, given: str | None = None) -> str | None:
    """The given licence, else the one in the base model's card, else None; a HubError says that the
    given one is not an identifier as the Hub writes them."""
    if given is not None and not _LICENSE.fullmatch(given):
        raise HubError(f"licence {given!r} is not an identifier such as 'mit' or 'apache-2.0'")
    return given or _license_of(base_model)


def _license_of(base_model: str | None) -> str | None:
    """The licence that the base model's card names, None where none can be read."""
    local = Path(base_model or "") / "README.md"
    source = local if base_model and os.path.isfile(local) else _hub_name(base_model)
    if source is None:
        return None
    try:
        data = ModelCard.load(source, ignore_metadata_errors=True).data
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError, yaml.YAMLError):
        return None
    stated = getattr(data, "license", None)
    return stated if isinstance(stated, str) and _LICENSE.fullmatch(stated) else None


def _hub_name(name: str | None) -> str | None:
    """The name if it can be a repository on the Hub, None for a local path or anything else."""
    return name if name and is_repository_name(name) and not os.path.exists(name) else None


def _hub_names(names: Iterable[str | None]) -> list[str]:
    """Those of the names that can be repositories, each once."""
    return list(dict.fromkeys(filter(None, map(_hub_name, names))))


def shown_name(name: str) -> str:
    """A model as a card calls it: of a local one only the folder's name shows."""
    return Path(name).resolve().name if os.path.exists(name) else name


def _body(facts: CardFacts) -> str:
    prompt = facts.prompts[0] if facts.prompts else "a prompt of yours"
    made = "Fine-tuned pipeline" if facts.base_model else "Trained pipeline"
    parts = [
        f"# {facts.title or made}: {plain(facts.repo_id)}",
        _introduction(facts),
        _samples(facts),
        "## Usage",
        facts.usage.format(
            repo_id=_literal(facts.repo_id),
            base=_literal(shown_name(facts.base_model or "")),
            prompt=_literal(prompt),
        ),
        "## Training",
        _bullets(facts.training),
    ]
    if facts.sampler:
        law = _LAW.format(repo_id=_literal(facts.repo_id))
        parts += ["## Timestep sampling", _bullets(facts.sampler), law]
    parts += [_picture(_TITLES.get(file, file), file) for file in facts.pictures]
    if facts.flags:
        flags = "\n".join(f"{name}: {_value(value)}" for name, value in facts.flags.items())
        again = _REPEATED.format(flags=flags, script=facts.script)
        parts += ["## To repeat the training", again]
    if facts.versions:
        parts += ["## Versions", _bullets(facts.versions)]
    return "\n\n".join(part for part in parts if part)


def _introduction(facts: CardFacts) -> str:
    data = f"the data set {plain(facts.dataset_name)}" if facts.dataset_name else "a local data set"
    if facts.sources:
        named = [plain(name) for name in _hub_names(facts.sources)]
        data = f"{len(facts.sources)} data sets" + (f" ({', '.join(named)})" if named else "")
    if facts.base_model is None:
        return f"Trained from scratch on {data} with diffusers-curriculum."
    base = plain(shown_name(facts.base_model))
    return f"Fine-tuned from {base} on {data} with diffusers-curriculum."


def _samples(facts: CardFacts) -> str:
    picture = _picture("Samples", facts.image_grid) if facts.image_grid else ""
    prompts = "\n".join(map(_item, facts.prompts))
    shown = f"{facts.prompts_title}:\n\n{prompts}" if prompts else ""
    return "\n\n".join(part for part in (picture, shown) if part)


def _picture(title: str, file: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", file, re.ASCII):
        raise HubError(f"picture {file!r} is not a plain file name")
    return f"![{plain(title)}](./{file})"


def _bullets(facts: Mapping[str, object]) -> str:
    known = {name: value for name, value in facts.items() if value is not None}
    return "\n".join(f"{_item(name)}: {plain(value)}" for name, value in known.items())


def plain(value: object) -> str:
    """``value`` as Markdown that renders as exactly that text, inside a line."""
    control = {"Cc", "Cs", "Zl", "Zp"}
    visible = "".join(" " if unicodedata.category(c) in control else c for c in str(value))
    return _MARKUP.sub(_escape, " ".join(visible.split())) or "(empty)"


def _item(value: object) -> str:
    """``value`` as an item of a list."""
    text = plain(value)
    first = _LINE_START.match(text)
    end = first.end() - 1 if first else 0
    return f"* {text[:end]}\\{text[end:]}" if first else f"* {text}"


def _escape(match: re.Match[str]) -> str:
    return _ENTITIES.get(match[0]) or f"\\{match[0]}"


def _value(value: object) -> str:
    """A value as YAML in a line, without a backtick, so that the block stays whole."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    plain = (c.isprintable() and c != "`" and ord(c) < 0x10000 for c in text)
    return "".join(c if p else f"\\U{ord(c):08x}" for c, p in zip(text, plain, strict=True))


def _literal(text: str) -> str:
    """``text`` as Python source without a backtick, so that the code block stays whole."""
    return repr(text).replace("`", "\\x60")
