"""The source of one function or class, as the compiler gets hold of it, the names that it goes by, and what
becomes of the values that it is given and that its modules hold.

The compiler turns each value into a literal of its own; what it has no literal for becomes None without a
word, which is refused here. Follows `const_expr` and `value` of KLR's gather.c.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from typing import Any, Protocol

import numpy as np

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
        # A method's lines are indented as in its class.
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


TENSORS = ("tensor", "ndarray", "Tensor", "FakeTensor", "ShapedArray", "NkiTensor", "Placeholder")
# Our stand-in writes nki's element types as numpy's of the same names.
NKI_DTYPES = (
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3",
    "float8_e5m2",
    "int32",
    "uint32",
    "int16",
    "uint16",
    "int8",
    "uint8",
)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
_PLAIN = (bool, float, str, type(None))


class Collector(Protocol):
    """Who gathers what a value reaches."""

    def work(self, definition: Any) -> None:
        """Gather the source of a function or class."""

    def refuse(self, rule: str, found: str = "") -> None:
        """Note a refusal at the current place."""


def is_tensor(value: Any) -> bool:
    """Whether the compiler takes a value for a tensor: by the name of its type."""
    return type(value).__name__ in TENSORS


class Literals:
    """Walks values. `arguments`: they come from the caller, so that nothing may be lost on the way."""

    def __init__(self, collector: Collector, arguments: bool) -> None:
        self.collector, self.arguments = collector, arguments
        self.seen: set[int] = set()

    def take(self, value: Any, path: str) -> None:
        """One value, e.g. `plan.products`."""
        if isinstance(value, tuple | list | dict):
            self._container(value, path)
        elif isinstance(value, types.ModuleType) or is_tensor(value) or self._is_vendors(value):
            return
        elif _numpy_type(value) is not None:
            self.collector.refuse("numpy dtype", f"{path} is {_numpy_type(value)}")
        elif isinstance(value, types.FunctionType):
            self.collector.work(value)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            self._object(value, path)
        else:
            self._scalar(value, path)

    def _container(self, value: Any, path: str) -> None:
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if not _is_plain(item):
                self.take(item, f"{path}[{key!r}]")

    def _object(self, value: Any, path: str) -> None:
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        self.collector.work(type(value))
        for key, item in vars(value).items():
            if not _is_plain(item) and key != "__objclass__":  # an enum member's way back to its class
                self.take(item, f"{path}.{key}")

    def _scalar(self, value: Any, path: str) -> None:
        if isinstance(value, bool | float | str) or value is None or value is ...:
            return
        if isinstance(value, int):
            if not INT_MIN <= value <= INT_MAX:
                self.collector.refuse("integer", str(value))
        elif self.arguments or isinstance(value, np.generic):
            self.collector.refuse("argument kind", f"{path} is of type {_type_name(value)}")

    def _is_vendors(self, value: Any) -> bool:
        """Things of nki itself. Our stand-in's element types are numpy's, so that they are told apart from a
        user's only where nki's are written: in the source, not among the arguments.
        """
        if isinstance(value, np.dtype):
            return not self.arguments and value.name in NKI_DTYPES
        return is_vendors(name_of(type(value)))


def _is_plain(value: Any) -> bool:
    """Most values are: numbers of 32 bits, words and None."""
    kind = type(value)
    return INT_MIN <= value <= INT_MAX if kind is int else kind in _PLAIN


def _numpy_type(value: Any) -> str | None:
    kind = value if isinstance(value, type) else getattr(value, "type", None)
    if isinstance(kind, type) and issubclass(kind, np.generic):
        return f"{kind.__module__}.{kind.__name__}"
    return None


def _type_name(value: Any) -> str:
    if isinstance(value, type):
        return "type"
    module = type(value).__module__
    return type(value).__name__ if module == "builtins" else f"{module}.{type(value).__name__}"
