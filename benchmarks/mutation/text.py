"""A source as bytes, which is how syntax trees count, and replacements in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple


class Edit(NamedTuple):
    """Bytes ``start`` to ``end`` of a source become ``text``."""

    start: int
    end: int
    text: str


class Text:
    """A source, and edits of the places where nodes of its syntax tree stand."""

    def __init__(self, source: str) -> None:
        self.bytes = source.encode()
        self._lines = list(accumulate(map(len, self.bytes.splitlines(keepends=True)), initial=0))

    def changed(self, edit: Edit) -> str:
        """The source after an edit."""
        return (self.bytes[: edit.start] + edit.text.encode() + self.bytes[edit.end :]).decode()

    def around(self, edit: Edit) -> tuple[int, str, str]:
        """(number of its first line, the lines it touches, the same after it), on one line each."""
        first = self.bytes.rfind(b"\n", 0, edit.start) + 1
        last = self.bytes.find(b"\n", edit.end)
        last = len(self.bytes) if last < 0 else last
        before = self.bytes[first:last].decode()
        after = (
            self.bytes[first : edit.start] + edit.text.encode() + self.bytes[edit.end : last]
        ).decode()
        number = self.bytes.count(b"\n", 0, edit.start) + 1
        return number, " ".join(before.split()), " ".join(after.split())

    def whole(self, node: Any, text: str) -> Edit:
        """A node becomes ``text``."""
        return Edit(self._start(node), self._end(node), text)

    def between(self, first: ast.AST, second: ast.AST, sign: str, other: str) -> Edit:
        """The sign between two operands becomes another."""
        return self._first(self._end(first), self._start(second), sign, other)

    def before(self, node: ast.AST, operand: ast.AST, sign: str) -> Edit:
        """The sign before an operand goes."""
        return self._first(self._start(node), self._start(operand), sign, "")

    def last_name(self, function: ast.AST, name: str, other: str) -> Edit:
        """The last name of a called function becomes another."""
        end = self._end(function)
        return Edit(end - len(name), end, other)

    def without(self, given: Sequence[ast.AST], index: int) -> Edit:
        """One of the arguments of a call goes, with the comma before or after it."""
        if index > 0:
            return Edit(self._end(given[index - 1]), self._end(given[index]), "")
        following = given[1:]
        end = self._start(following[0]) if following else self._end(given[0])
        return Edit(self._start(given[0]), end, "")

    def _first(self, start: int, end: int, sign: str, other: str) -> Edit:
        pattern = re.escape(sign).replace(r"\ ", r"\s+").encode()
        found = re.search(pattern, self.bytes[start:end])
        if found is None:
            raise ValueError(f"no {sign!r} in {self.bytes[start:end]!r}")
        return Edit(start + found.start(), start + found.end(), other)

    def _start(self, node: Any) -> int:
        return self._lines[node.lineno - 1] + node.col_offset

    def _end(self, node: Any) -> int:
        return self._lines[node.end_lineno - 1] + node.end_col_offset
