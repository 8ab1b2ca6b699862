"""Whether the parts of a text-to-image pipeline fit one another, as their configs tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.formulations import pipeline_index
from diffusers_curriculum.training.parts.families.base import Config, ModelFamily, text_config
from diffusers_curriculum.training.process.pipeline_files import components, read_json_file


def check_parts(family: ModelFamily, args: Arguments) -> None:
    """Read the configs of the base pipeline; no weight is loaded.

    Raises:
        UsageError: a part is missing, of another class, or does not fit the others, and the message
            names each of them; or the installed diffusers is too old for the pipeline.
    """
    family.check_installed()
    path, index = args.pretrained_model_name_or_path, pipeline_index(args)
    faults = list(_class_faults(family, index))
    if not faults:
        configs = {part: part_config(family, args, part) for part in family.weighted}
        family.check_resolution(args, configs)
        faults = list(family.misfits(configs))
    if faults:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r}, a {index.get('_class_name')}, cannot be "
            f"trained by this script: {'; '.join(faults)}. Give {family.title}, which makes images "
            "of captions alone."
        )


def check_tokenizers(family: ModelFamily, args: Arguments, tokenizers: Mapping[str, Any]) -> None:
    """Refuse tokenizers that make what their text encoders have no embeddings for.

    Raises:
        UsageError: both numbers, and the remedy.
    """
    for name, tokenizer in tokenizers.items():
        part = name.replace("tokenizer", "text_encoder")
        encoder = text_config(part_config(family, args, part))
        source = family.source(args, part)
        fault = _token_fault(name, tokenizer, part, encoder)
        if fault:
            raise UsageError(f"--{source.flag} {source.path!r}: {fault}")


def _token_fault(name: str, tokenizer: Any, part: str, encoder: Config) -> str:
    words = encoder.get("vocab_size", 49408)  # the defaults are a CLIP's
    if len(tokenizer) > words:
        return (
            f"its {name} has {len(tokenizer)} tokens, and its {part} embeddings for {words}: "
            "remove the tokens that were added, or save the pipeline after "
            f"{part}.resize_token_embeddings(len({name}))."
        )
    longest = encoder.get("max_position_embeddings", 77)
    positions = encoder.get("model_type", "clip").startswith("clip")  # others are told a length
    if positions and tokenizer.model_max_length > longest:
        return (
            f"its {name}'s model_max_length is {tokenizer.model_max_length}, and its {part} has "
            f"{longest} positions: write {longest} into {name}/tokenizer_config.json."
        )
    return ""


def _class_faults(family: ModelFamily, index: Config) -> Iterator[str]:
    """Parts that are missing, or of a class that is not trained with."""
    listed = components(dict(index))
    missing = [name for name in (*family.parts, "scheduler") if name not in listed]
    if missing:
        yield f"it has no {' and no '.join(missing)}"
    for name, allowed in family.parts.items():
        if name in listed and listed[name][1] not in allowed:
            yield f"its {name} is a {listed[name][1]}, and this script takes a {allowed[0]}"


def part_config(family: ModelFamily, args: Arguments, part: str) -> Config:
    """The config.json of a part."""
    source = family.source(args, part)
    name = "/".join(word for word in (source.subfolder, "config.json") if word)
    return read_json_file(source.path, source.revision, name)
