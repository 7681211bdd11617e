"""Lets a file that imports `nki` be read where nki is not installed.

Words that our simulator models are the simulator's; every other word of nki is a `Word`, which can be named,
called and subscripted and does nothing outside a run. What is gathered and checked is the file's own source.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from nki_kernels.simulator import isa, language
from nki_kernels.simulator.memory import is_running


class UnmodelledError(NotImplementedError):
    """A kernel that runs in the simulator calls a word of nki that the simulator does not have."""


class Word:
    """A name of nki that nothing here knows more about."""

    __module__ = "nki"

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Word:
        if name.startswith("__"):
            raise AttributeError(name)
        return Word(f"{self.__name__}.{name}")

    def __call__(self, *_args: Any, **_kwargs: Any) -> Word:
        if is_running():
            raise UnmodelledError(f"{self.__name__} is not modelled")
        return self

    def __getitem__(self, _key: Any) -> Word:
        return self

    def __or__(self, _other: Any) -> Word:
        return self

    __ror__ = __or__

    def __repr__(self) -> str:
        return self.__name__


def jit(kernel: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
    """Marks an entry kernel, `@nki.jit` and `@nki.jit(...)` alike."""
    return kernel if kernel is not None else jit


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes `nki` and any module below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "nki" and not fullname.startswith("nki."):
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        model = {"nki.language": language, "nki.isa": isa}.get(module.__name__)
        known = {"jit": jit} if module.__name__ == "nki" else vars(model) if model else {}
        for name, value in known.items():
            if not name.startswith("__") and name != "tile_size":
                setattr(module, name, value)

        def word(name: str) -> Word:
            if name.startswith("__"):
                raise AttributeError(name)
            return Word(f"{module.__name__}.{name}")

        module.__getattr__ = word  # type: ignore[method-assign]


def provide() -> bool:
    """Make `import nki` work; False where the vendor's package does already."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return True
    if importlib.util.find_spec("nki") is not None:
        return False
    sys.meta_path.append(_Finder())
    return True
