"""Classes that a pipeline is asked for by number or by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class ClassNames:
    """Of pipelines whose config has ``id2label``: class number to name, as in DiTPipeline, synonyms
    with commas between them.

    Attributes:
        labels: each name's class number.
    """

    labels: dict[str, int]

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return the classes of one name or several: a whole label, or one of its synonyms; a
        ValueError refuses a name that no class has, or several have."""
        return [self._label_id(name) for name in ([label] if isinstance(label, str) else label)]

    def _register_names(self: Any, id2label: dict[int, str] | None, null: int) -> None:
        """Keep the names of classes below ``null``; a ValueError refuses those of others."""
        wrong = [label for label in id2label or {} if not 0 <= int(label) < null]
        if wrong:
            raise ValueError(
                f"id2label names the classes {wrong}, and the network has 0 to {null - 1}: give it "
                "the names of these only."
            )
        self.register_to_config(id2label=id2label)
        known = self._names().items()
        pairs = sorted((name.strip(), label) for label, names in known for name in names.split(","))
        self.labels = dict(pairs)

    def _names(self: Any) -> dict[int, str]:
        return {int(label): name for label, name in (self.config["id2label"] or {}).items()}

    def _label_id(self, name: str) -> int:
        known = self._names().items()
        whole = [label for label, names in known if names == name]
        found = whole or [n for n, names in known if name in map(str.strip, names.split(","))]
        if len(found) != 1:
            some = ", ".join(list(self.labels)[:20]) or "none: the pipeline has no id2label"
            raise ValueError(
                f"{name!r} is the name of {len(found)} classes {found}: give the number of one, or "
                f"another name (known: {some})."
            )
        return found[0]

    def _classes(self, labels: int | str | Sequence[int | str] | Tensor, null: int) -> list[int]:
        """The numbers of classes, ``null`` for an image of any; a ValueError refuses others."""
        if isinstance(labels, Tensor):
            labels = labels.reshape(-1).tolist()
        given = [labels] if isinstance(labels, int | str) else list(labels)
        ids = [self._label_id(one) if isinstance(one, str) else int(one) for one in given]
        allowed = {*(self._names() or range(null)), null}
        wrong = [label for label in ids if label not in allowed]
        if wrong or not ids:
            raise ValueError(
                f"class_labels={given}: {wrong or 'nothing'} is no class of this pipeline: give "
                f"some of {min(allowed)} to {max(allowed - {null}, default=null)}, or {null} for "
                "an image of any class."
            )
        return ids
