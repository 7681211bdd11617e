"""Stage S: the words and forms of what was gathered. Follows KLR's KLR/NKI/Simplify.lean and
Annotations.lean.

Where KLR stops at the first refusal, this goes on, so that one run shows all of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from nki_kernels.frontend.catalogue import Refusal, refusal
from nki_kernels.frontend.definitions import Class, Function, Source, is_vendors
from nki_kernels.frontend.gatherer import Program
from nki_kernels.frontend.versions import Version

_BASES = ("NKIObject", "Enum", "NamedTuple")
Found = tuple[str, ast.AST, str]  # rule, node, what the sentence names


def check_syntax(program: Program, version: Version) -> list[Refusal]:
    """All refusals of stage S, in order of the definitions."""
    if program.entry not in program.functions:
        return [refusal("entry", program.entry, 0, program.entry)]
    refusals = []
    for cls in program.classes.values():
        refusals += _located(cls.source, _class(cls, program))
    for function in program.functions.values():
        walk = _Walk(program, version, function)
        refusals += _located(function.source, walk.function())
    return refusals


def dotted(node: ast.expr, program: Program) -> str | None:
    """A name or dotted name as the compiler writes it: the first part in full, e.g. `nki.language.ndarray`
    for `nl.ndarray`; a local keeps its own.
    """
    if isinstance(node, ast.Name):
        return program.resolved.get(node, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, program)
        return None if base is None else f"{base}.{node.attr}"
    return None


def is_entry_mark(decorator: ast.expr, program: Program) -> bool:
    """Whether a decorator is `@nki.jit`, with or without arguments."""
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    name = dotted(node, program) or ""
    return name.split(".")[-2:] == ["nki", "jit"]


def _located(source: Source, found: Iterator[Found]) -> list[Refusal]:
    return [refusal(rule, source.file, source.place(node), what) for rule, node, what in found]


def _class(cls: Class, program: Program) -> Iterator[Found]:
    for base in cls.node.bases:
        name = (dotted(base, program) or ast.unparse(base)).rpartition(".")[2]
        if name not in _BASES:
            yield "base class", base, name
    for decorator in cls.node.decorator_list:
        yield from _decorator(decorator, program)


def _decorator(decorator: ast.expr, program: Program) -> Iterator[Found]:
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    name = dotted(node, program) or ast.unparse(node)
    if name.rpartition(".")[2] not in ("staticmethod", "dataclass") and not is_entry_mark(decorator, program):
        yield "decorator", decorator, name


class _Walk:
    """One function, from its decorators to its last statement."""

    def __init__(self, program: Program, version: Version, function: Function) -> None:
        self.program, self.version, self.of = program, version, function

    def function(self) -> Iterator[Found]:
        node = self.of.node
        for decorator in node.decorator_list:
            yield from _decorator(decorator, self.program)
        yield from self._parameters(node)
        for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]:
            yield from self._expression(default)
        yield from self._body(node.body)

    def _parameters(self, node: ast.FunctionDef) -> Iterator[Found]:
        if node.args.vararg is not None:
            yield "varargs", node.args.vararg, ""
        if node.args.kwarg is not None:
            yield "kwargs", node.args.kwarg, ""
        if node.args.kwonlyargs and self.version.since_3 and self.of.name == self.program.entry:
            yield "keyword-only", node.args.kwonlyargs[0], ""

    def _body(self, statements: list[ast.stmt]) -> Iterator[Found]:
        for statement in statements:
            yield from self._statement(statement)

    def _statement(self, node: ast.stmt) -> Iterator[Found]:
        if isinstance(node, ast.Assign):
            yield from self._targets(node.targets)
            yield from self._expressions([*node.targets, node.value])
        elif isinstance(node, ast.AnnAssign):
            yield from self._annotated(node)
        elif isinstance(node, ast.AugAssign):
            if isinstance(node.op, ast.MatMult):
                yield "matmul", node, ""
            yield from self._expressions([node.target, node.value])
        elif isinstance(node, ast.For | ast.While):
            yield from self._loop(node)
        elif isinstance(node, ast.With):
            yield from self._with(node)
        elif isinstance(node, ast.If):
            yield from self._expression(node.test)
            yield from self._body(node.body)
            yield from self._body(node.orelse)
        elif isinstance(node, ast.Expr | ast.Return | ast.Assert):
            for child in ast.iter_child_nodes(node):
                assert isinstance(child, ast.expr)
                yield from self._expression(child)

    def _loop(self, node: ast.For | ast.While) -> Iterator[Found]:
        if node.orelse:
            yield ("for else" if isinstance(node, ast.For) else "while else"), node, ""
        if isinstance(node, ast.For):
            if not isinstance(node.target, ast.Name):
                yield "for target", node.target, ""
            yield from self._expression(node.iter)
        else:
            yield from self._expression(node.test)
        yield from self._body(node.body)

    def _with(self, node: ast.With) -> Iterator[Found]:
        call = node.items[0].context_expr
        if len(node.items) != 1 or not isinstance(call, ast.Call):
            yield "with", node, ""
        elif node.items[0].optional_vars is not None:
            yield "with binding", node, ""
        elif call.args or call.keywords:
            yield "with arguments", node, ""
        elif (dotted(call.func, self.program) or "").rpartition(".")[2] != "no_reorder":
            yield "with context", node, dotted(call.func, self.program) or ast.unparse(call.func)
        yield from self._body(node.body)

    def _annotated(self, node: ast.AnnAssign) -> Iterator[Found]:
        if node.value is not None:
            yield from self._targets([node.target])
            yield from self._expression(node.value)
        elif dotted(node.target, self.program) is None:
            yield "declaration", node, ""
        yield from self._expression(node.annotation)

    def _targets(self, targets: list[ast.expr]) -> Iterator[Found]:
        lets = [target for target in targets if isinstance(target, ast.Name | ast.Tuple)]
        if len(targets) - len(lets) > 1:
            yield "two mutations", targets[0], ""
        for target in lets:
            yield from self._pattern(target)

    def _pattern(self, target: ast.expr) -> Iterator[Found]:
        if isinstance(target, ast.Tuple):
            for part in target.elts:
                yield from self._pattern(part)
        elif isinstance(target, ast.Attribute):
            yield "pattern name", target, ""
        elif not isinstance(target, ast.Name | ast.Starred):  # a starred one is refused as an expression
            yield "pattern", target, ""

    def _expressions(self, nodes: list[ast.expr]) -> Iterator[Found]:
        for node in nodes:
            yield from self._expression(node)

    def _expression(self, node: ast.expr | ast.AST) -> Iterator[Found]:
        if isinstance(node, ast.Subscript):
            yield from self._expression(node.value)
            yield from self._index(node.slice)
            return
        if isinstance(node, ast.Constant) and node.value is ...:
            yield "ellipsis", node, ""
        elif isinstance(node, ast.Starred):
            yield "starred", node, ""
        elif isinstance(node, ast.Dict):
            yield from self._keys(node)
        elif isinstance(node, ast.keyword) and node.arg is None:
            yield "keyword expansion", node.value, ""
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield "matmul", node, ""
        elif isinstance(node, ast.Compare):
            yield from self._comparison(node)
        for child in ast.iter_child_nodes(node):
            yield from self._expression(child)

    def _keys(self, node: ast.Dict) -> Iterator[Found]:
        for key in node.keys:
            if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
                yield "dict key", key or node, ""

    def _index(self, node: ast.expr) -> Iterator[Found]:
        """Inside the brackets an ellipsis and slices are at home, on the outermost level."""
        for part in node.elts if isinstance(node, ast.Tuple | ast.List) else [node]:
            if isinstance(part, ast.Slice):
                yield from self._expressions([p for p in (part.lower, part.upper, part.step) if p])
            elif not (isinstance(part, ast.Constant) and part.value is ...):
                yield from self._expression(part)

    def _comparison(self, node: ast.Compare) -> Iterator[Found]:
        if len(node.ops) > 1 and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
            yield "chained in", node, ""
        for op, right in zip(node.ops, node.comparators, strict=True):
            is_none = len(node.ops) == 1 and isinstance(right, ast.Constant) and right.value is None
            if isinstance(op, ast.Is | ast.IsNot) and not is_none:
                yield ("is" if isinstance(op, ast.Is) else "is not"), node, ""


def is_nki_call(node: ast.AST, module: str, program: Program) -> str | None:
    """The word of `module` ("nki.isa") that a call names, if it calls one."""
    if not isinstance(node, ast.Call):
        return None
    name = dotted(node.func, program) or ""
    return name.rpartition(".")[2] if is_vendors(name) and name.startswith(module + ".") else None
