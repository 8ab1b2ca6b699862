"""The facts of a run of an earlier version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_curriculum.samplers.description import upgraded_config
from diffusers_curriculum.training.storage.fingerprints import hash_config


def told_today(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As this version tells them: no modules were imported, nothing was compiled, and what was
    chosen by a default that has changed is named."""
    settings = facts.get("sampler")
    kept = upgraded_config(settings)
    changed = {} if kept == settings else {"sampler": kept, "sampler_sha256": hash_config(kept)}
    return {"imports": {}, "compile": {}, **facts, **changed}
