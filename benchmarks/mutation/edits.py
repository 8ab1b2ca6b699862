"""Which small changes of a source could be faults: pure functions of its text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.mutation.text import Edit, Text

COMPARISONS: dict[type, tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}
ARITHMETIC: dict[type, tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
SIGNS: dict[type, str] = {ast.Not: "not", ast.USub: "-", ast.Invert: "~"}
OPPOSITES = {"min": "max", "minimum": "maximum", "amin": "amax", "clamp_min": "clamp_max"}
OPPOSITES |= {"floor": "ceil", "any": "all"}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}
# What is said to a reader, not done: messages, log lines, catalogue entries; and zip, whose only
# option, strict, is an assertion of its own.
WORDS = {"Entry", "register", "isinstance", "super", "warn", "warning", "info", "debug"}
WHOLE = {"zip"}


class Mutant(NamedTuple):
    """One change of one file.

    Attributes:
        path: the file, relative to the root of the tree.
        edit: what is replaced.
        kind: what sort of change it is.
        line: first line of the change, from 1.
        before: the source line as it is.
        after: the same line, changed.
    """

    path: str
    edit: Edit
    kind: str
    line: int
    before: str
    after: str

    @property
    def name(self) -> str:
        """What finds the mutant again after lines have moved."""
        return f"{self.path}: {self.before} -> {self.after}"


def mutants(source: str, path: str) -> list[Mutant]:
    """Every mutant of a source in order of position; :func:`is_program` leaves some out."""
    text, tree = Text(source), ast.parse(source)
    kinds = {edit: kind for kind, edit in _edits(tree, text)}
    return [Mutant(path, edit, kinds[edit], *text.around(edit)) for edit in sorted(kinds)]


def is_program(mutant: Mutant, source: str) -> bool:
    """Whether the mutant parses, to another syntax tree than that of the source."""
    try:
        tree = ast.parse(Text(source).changed(mutant.edit))
    except SyntaxError:
        return False
    return ast.dump(tree) != ast.dump(ast.parse(source))


def _edits(node: ast.AST, text: Text) -> Iterator[tuple[str, Edit]]:
    yield from _of(node, text)
    for child in _children(node):
        yield from _edits(child, text)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that do something: no annotations, decorators, messages."""
    if isinstance(node, ast.Raise | ast.JoinedStr):
        return
    if isinstance(node, ast.Call) and called(node) in WORDS:
        return
    idle = {"annotation", "returns", "decorator_list"}
    if isinstance(node, ast.Call) and called(node) in WHOLE:
        idle.add("keywords")
    for name, value in ast.iter_fields(node):
        if name not in idle:
            parts = value if isinstance(value, list) else [value]
            yield from (part for part in parts if isinstance(part, ast.AST))


def called(call: ast.Call) -> str:
    """The last name of what is called: "clamp_min" of ``x.clamp_min(0)``."""
    function = call.func
    return getattr(function, "attr", None) or getattr(function, "id", "")


def _of(node: ast.AST, text: Text) -> Iterator[tuple[str, Edit]]:
    """The changes of one node itself."""
    if isinstance(node, ast.Compare):
        yield from _compare(node, text)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_type(node):
        yield "arithmetic", text.between(node.left, node.right, *ARITHMETIC[type(node.op)])
    elif isinstance(node, ast.BoolOp):
        swap = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for first, second in zip(node.values, node.values[1:], strict=False):
            yield "and, or", text.between(first, second, *swap)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        yield "sign", text.before(node, node.operand, SIGNS[type(node.op)])
    elif isinstance(node, ast.Constant):
        yield from (("constant", text.whole(node, value)) for value in _others(node.value))
    elif isinstance(node, ast.Call):
        yield from _call(node, text)
    else:
        yield from _statement(node, text)


def _compare(node: ast.Compare, text: Text) -> Iterator[tuple[str, Edit]]:
    sides = [node.left, *node.comparators]
    for first, operator, second in zip(sides, node.ops, sides[1:], strict=False):
        sign, others = COMPARISONS[type(operator)]
        for other in others:
            yield "comparison", text.between(first, second, sign, other)


def _is_type(node: ast.BinOp) -> bool:
    """Whether it is a union of types, ``int | None``."""
    names = {"int", "float", "str", "bool", "list", "dict", "None", "Tensor"}
    sides = {ast.unparse(node.left), ast.unparse(node.right)}
    return isinstance(node.op, ast.BitOr) and bool(sides & names)


def _others(value: object) -> Iterator[str]:
    """Constants that could stand there by mistake."""
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield str(value + 1)
        yield str(value - 1) if value > 0 else "-1"
    elif isinstance(value, float):
        yield repr(value + 1.0)
        if value:
            yield repr(value / 2)


def _call(node: ast.Call, text: Text) -> Iterator[tuple[str, Edit]]:
    name = called(node)
    if name in WORDS | WHOLE:
        return
    if name in OPPOSITES:
        yield "opposite", text.last_name(node.func, name, OPPOSITES[name])
    given = sorted([*node.args, *node.keywords], key=lambda a: (a.lineno, a.col_offset))
    for index, argument in enumerate(given):
        optional = isinstance(argument, ast.keyword) and argument.arg is not None
        if optional or (index == len(given) - 1 and index > 0):
            yield "argument", text.without(given, index)


def _statement(node: ast.AST, text: Text) -> Iterator[tuple[str, Edit]]:
    if isinstance(node, ast.Return) and node.value is not None:
        if not isinstance(node.value, ast.Constant):
            yield "returned value", text.whole(node.value, "None")
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "dropped call", text.whole(node, "pass")
    elif isinstance(node, ast.If | ast.IfExp | ast.While) and _is_plain(node.test):
        yield "condition", text.whole(node.test, f"(not {ast.unparse(node.test)})")


def _is_plain(test: ast.AST) -> bool:
    """Whether a condition holds no operator that is changed anyway."""
    return isinstance(test, ast.Name | ast.Attribute | ast.Call)
