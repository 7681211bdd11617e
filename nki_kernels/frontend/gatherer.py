"""Stage G: collect the source of everything that a kernel reaches, from the living Python objects.

Every name and dotted name that is read in a function is looked up in its module; functions and classes found
that way are collected in turn, a class with all of its methods. Follows KLR's interop/klr/gather.c, its order
of visits included, because a name that was stored before it is read counts as a local.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from typing import Any

from nki_kernels.frontend.catalogue import Refusal, refusal
from nki_kernels.frontend.definitions import (
    Class,
    Function,
    Literals,
    Source,
    is_definition,
    is_vendors,
    name_of,
    source_of,
    unwrapped,
    vendor_module,
)

_MISSING = object()
_STATEMENTS = {
    "FunctionDef": "inner function",
    "ClassDef": "inner class",
    "Delete": "del",
    "TypeAlias": "type",
    "AsyncFunctionDef": "async",
    "AsyncFor": "async",
    "AsyncWith": "async",
    "Match": "match",
    "Raise": "raise",
    "Try": "try",
    "TryStar": "try",
    "Import": "import",
    "ImportFrom": "import",
    "Global": "global",
    "Nonlocal": "nonlocal",
}
_KNOWN_STATEMENTS = (
    ast.Pass,
    ast.Expr,
    ast.Assert,
    ast.Return,
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.If,
    ast.For,
    ast.Break,
    ast.Continue,
    ast.While,
    ast.With,
)
_EXPRESSIONS = (
    ast.Constant,
    ast.Name,
    ast.Attribute,
    ast.Tuple,
    ast.List,
    ast.Dict,
    ast.Subscript,
    ast.Slice,
    ast.BoolOp,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.IfExp,
    ast.Call,
    ast.Starred,
    ast.FormattedValue,
    ast.JoinedStr,
)
_SKIPPED = ("numpy.", "enum.")  # what the compiler does not follow


class Program:
    """What was gathered: functions (methods as "Class.method"), classes and module constants by full name,
    and the full name of every name and dotted name in them that refers to something outside.
    """

    def __init__(self, entry: str) -> None:
        self.entry = entry
        self.functions: dict[str, Function] = {}
        self.classes: dict[str, Class] = {}
        self.constants: dict[str, Any] = {}
        self.resolved: dict[ast.AST, str] = {}
        self.refusals: list[Refusal] = []


class _Scope:
    """The function that is being read: its place, its module's names, and the locals stored so far."""

    def __init__(self, source: Source, namespace: Any, own_name: str) -> None:
        self.source, self.namespace = source, namespace
        self.locals = {own_name}
        self.node: ast.AST = source.node


class Gatherer:
    """Works through the list of definitions until nothing new is reached."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        kernel = unwrapped(kernel)
        self.program = Program(name_of(kernel))
        self.place = (str(getattr(getattr(kernel, "__code__", None), "co_filename", kernel)), 0)
        if isinstance(kernel, types.FunctionType):
            self.place = (self.place[0], kernel.__code__.co_firstlineno)
        self.scope: _Scope | None = None
        self.following = True
        self.pending: dict[str, Any] = {}
        self.refused_classes: dict[str, str] = {}
        self.reached: dict[str, list[tuple[str, int]]] = {}  # places that name a definition
        self.work(kernel)

    def run(self) -> Program:
        """Gather everything on the list and what it leads to."""
        while self.pending:
            name, definition = next(iter(self.pending.items()))
            del self.pending[name]
            source = source_of(definition)
            if source is not None:
                self._definition(name, definition, source)
        for name, rule in self.refused_classes.items():
            for file, line in self.reached[name]:
                self.program.refusals.append(refusal(rule, file, line, name))
        return self.program

    def work(self, definition: Any) -> None:
        """Put a function or class on the list."""
        name = name_of(definition)
        if name.startswith(_SKIPPED) or is_vendors(name) or self._has(name):
            return
        self.reached.setdefault(name, []).append(self._here())
        self.pending.setdefault(name, unwrapped(definition))

    def refuse(self, rule: str, found: str = "") -> None:
        """Note a refusal at the current place."""
        self.program.refusals.append(refusal(rule, *self._here(), found))

    def _here(self) -> tuple[str, int]:
        scope = self.scope
        return self.place if scope is None else (scope.source.file, scope.source.place(scope.node))

    def _has(self, name: str) -> bool:
        program = self.program
        own = self.scope is not None and name in self.scope.locals
        return own or name in program.functions or name in program.classes or name in program.constants

    def _definition(self, name: str, definition: Any, source: Source) -> None:
        self.scope = _Scope(source, definition, name)
        if isinstance(source.node, ast.FunctionDef) and isinstance(definition, types.FunctionType):
            self.program.functions[name] = self._function(name, source, source.node)
        elif isinstance(source.node, ast.ClassDef) and isinstance(definition, type):
            self._class(name, definition, source, source.node)
        self.scope = None

    def _function(self, name: str, source: Source, node: ast.FunctionDef, owner: str = "") -> Function:
        assert self.scope is not None
        self.following = False  # decorators are not followed
        for decorator in node.decorator_list:
            self._visit(decorator)
        self.following = True
        # Defaults come before the parameters are locals, keyword-only ones after: gather.c's order.
        arguments = node.args
        for default in arguments.defaults:
            self._visit(default)
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
        self.scope.locals.update(argument.arg for argument in every)
        for keyword_default in arguments.kw_defaults:
            if keyword_default is not None:
                self._visit(keyword_default)
        for statement in node.body:
            self._visit(statement)
        return Function(name, source, node, owner)

    # -- statements and expressions

    def _visit(self, node: ast.AST) -> None:
        scope = self.scope
        assert scope is not None
        outer = scope.node
        if isinstance(node, ast.stmt | ast.expr):
            scope.node = node
        if isinstance(node, ast.stmt):
            self._statement(node)
        elif isinstance(node, ast.expr):
            self._expression(node)
        else:
            for child in ast.iter_child_nodes(node):
                self._visit(child)
        # The innermost statement or expression under way is the place of a refusal.
        scope.node = outer

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, _KNOWN_STATEMENTS):
            for child in _children(node):
                self._visit(child)
            return
        rule = _STATEMENTS.get(type(node).__name__)
        if rule is not None:
            self.refuse(rule)
        else:
            self.refuse("statement", type(node).__name__)

    def _expression(self, node: ast.expr) -> None:
        if not isinstance(node, _EXPRESSIONS):
            self.refuse("expression", type(node).__name__)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, int) and not isinstance(node.value, bool):
                Literals(self, arguments=False).take(node.value, "constant")
        elif isinstance(node, ast.Name):
            self._name(node)
        elif isinstance(node, ast.FormattedValue) and node.format_spec is not None:
            self.refuse("format spec")
        else:
            for child in ast.iter_child_nodes(node):
                self._visit(child)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self._note(node)

    def _name(self, node: ast.Name) -> None:
        assert self.scope is not None
        if isinstance(node.ctx, ast.Load):
            self._note(node)
        elif isinstance(node.ctx, ast.Store):
            self.scope.locals.add(node.id)

    # -- references to what lies outside

    def _note(self, node: ast.Name | ast.Attribute) -> None:
        found = self._reference(node)
        if found is not None:
            self.program.resolved[node] = found[0]

    def _reference(self, node: ast.expr) -> tuple[str, Any] | None:
        """Full name and value of a name or dotted name that starts outside the function."""
        if isinstance(node, ast.Name):
            value = self._lookup(node.id)
            # A local hides the module's name; what is known already needs no second look.
            if self._has(node.id):
                self._compare(node.id, value)
                return None
            if value is _MISSING:
                return None
            value = unwrapped(value)
            name = vendor_module(value.__name__) if isinstance(value, types.ModuleType) else node.id
        elif isinstance(node, ast.Attribute):
            base = self._reference(node.value)
            if base is None or not hasattr(base[1], node.attr):
                return None
            name, value = f"{base[0]}.{node.attr}", getattr(base[1], node.attr)
        else:
            return None
        return self._follow(name, value), value

    def _follow(self, name: str, value: Any) -> str:
        if is_definition(value):
            if self.following:
                self.work(value)
            return name_of(value)
        if self.following and not is_vendors(name) and not self._has(name):
            self.program.constants[name] = value
            if not isinstance(value, types.ModuleType):
                Literals(self, arguments=False).take(value, name)
        return name

    def _lookup(self, name: str) -> Any:
        """A global or built-in of the function that is being read."""
        assert self.scope is not None
        names = getattr(self.scope.namespace, "__globals__", {})
        builtins = getattr(self.scope.namespace, "__builtins__", {})
        return names.get(name, builtins.get(name, _MISSING) if isinstance(builtins, dict) else _MISSING)

    def _compare(self, name: str, value: Any) -> None:
        """Literals are kept by their plain names: the first module that is read gives all of them its
        value.
        """
        assert self.scope is not None
        if name in self.scope.locals or name not in self.program.constants or value is _MISSING:
            return
        kept = self.program.constants[name]
        if kept is not value and isinstance(value, bool | int | float | str | tuple) and kept != value:
            self.refuse("module constant", name)

    # -- classes

    def _class(self, name: str, definition: type, source: Source, node: ast.ClassDef) -> None:
        rule = _refused_head(node)
        if rule is not None:
            self.refused_classes[name] = rule  # told at every place that names it, once all are known
            return
        methods: dict[str, Function] = {}
        for statement in node.body:
            assert self.scope is not None
            self.scope.node = statement
            if isinstance(statement, ast.FunctionDef):
                method = getattr(definition, statement.name)
                self.scope = _Scope(source, method, f"{name}.{statement.name}")
                full = f"{name}.{statement.name}"
                methods[statement.name] = self._function(full, source, statement, name)
            else:
                rule = self._member(definition, statement)
                if rule is not None:
                    self.refuse(rule, type(statement).__name__)
                    return
        self.program.classes[name] = Class(name, source, node, methods)
        for method in methods.values():
            self.program.functions[method.name] = method

    def _member(self, definition: type, statement: ast.stmt) -> str | None:
        """The rule that a field breaks; its value is gathered."""
        if isinstance(statement, ast.Pass):
            return None
        if isinstance(statement, ast.Expr):
            return None if isinstance(statement.value, ast.Constant) else "class expression"
        if isinstance(statement, ast.Assign):
            if len(statement.targets) != 1:
                return "class assignment"
            target = statement.targets[0]
        elif isinstance(statement, ast.AnnAssign):
            target = statement.target
        else:
            return "class statement"
        if not isinstance(target, ast.Name):
            return "class field"
        value = getattr(definition, target.id, None)
        # A slot of a class with __slots__ is no value.
        if not isinstance(value, types.MemberDescriptorType):
            Literals(self, arguments=False).take(value, target.id)
        return None


def _refused_head(node: ast.ClassDef) -> str | None:
    """The rule that the first line of a class breaks."""
    if node.keywords:
        return "class keywords"
    if getattr(node, "type_params", None):
        return "class parameters"
    names = [_last_name(base) for base in node.bases]
    if not node.bases or any(name and "NKIObject" not in name and "Enum" not in name for name in names):
        return "class base"
    return None


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _children(node: ast.stmt) -> Iterator[ast.AST]:
    """In the order of the compiler's visits: the value of an annotated assignment comes first."""
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield node.value
        yield node.target
        yield node.annotation
    else:
        yield from ast.iter_child_nodes(node)
