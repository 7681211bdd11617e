"""The source of one function or class, as the compiler gets hold of it, and the names that it goes by."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from typing import Any

# Our stand-in for nki, by the module names that kernels would see with the vendor's package.
STAND_INS = (
    ("nki_kernels.simulator.language", "nki.language"),
    ("nki_kernels.simulator.isa", "nki.isa"),
    ("nki_kernels.simulator", "nki"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A parsed definition. `line` is the file's line of the definition's first line."""

    file: str
    line: int
    node: ast.stmt

    def place(self, node: ast.AST) -> int:
        """The file's line of `node`."""
        return self.line + getattr(node, "lineno", 1) - 1


@dataclasses.dataclass(frozen=True)
class Function:
    """A function or method that was gathered. `owner` is the name of its class, or ""."""

    name: str
    source: Source
    node: ast.FunctionDef
    owner: str = ""


@dataclasses.dataclass(frozen=True)
class Class:
    """A class that was gathered, with the methods by their own names."""

    name: str
    source: Source
    node: ast.ClassDef
    methods: dict[str, Function]


@functools.lru_cache(maxsize=4096)
def source_of(definition: Any) -> Source | None:
    """The one statement that defines a function or class; None where there is no such source, which the
    compiler does not count as an error.
    """
    try:
        file = inspect.getsourcefile(definition)
        lines, first = inspect.getsourcelines(definition)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    if file is None or len(tree.body) != 1:
        return None
    return Source(file, max(first, 1), tree.body[0])


def vendor_module(name: str) -> str:
    """`name`, or for a module of our stand-in that of nki's which it stands for."""
    for own, vendors in STAND_INS:
        if name == own or name.startswith(own + "."):
            return vendors
    return name


def is_vendors(name: str) -> bool:
    """Whether a dotted name belongs to nki, whose own source nobody needs to check."""
    return name == "nki" or name.startswith("nki.")


def name_of(definition: Any) -> str:
    """The full name of a function or class: module and name."""
    module = vendor_module(str(getattr(definition, "__module__", "")))
    return f"{module}.{getattr(definition, '__name__', '')}"


def unwrapped(value: Any) -> Any:
    """What a decorator that says so has wrapped."""
    return inspect.getattr_static(value, "__wrapped__", value) if callable(value) else value


def is_definition(value: Any) -> bool:
    """Functions and classes are gathered by source; every other value is a constant."""
    return isinstance(value, types.FunctionType | type)
