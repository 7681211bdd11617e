"""Get hold of somebody's kernel, `FILE.py:KERNEL` or `package.module:KERNEL`, nki installed or not.

Words that our simulator models are the simulator's; every other word of nki is a `Word`, which can be named,
called and subscripted and does nothing outside a run. What is gathered and checked is the file's own source.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Sequence
from types import ModuleType
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


class LoadError(ValueError):
    """The kernel could not be found or its file could not be read; one sentence."""


def load(target: str) -> tuple[Any, ModuleType]:
    """The kernel that `target` names, and its module. `import nki` works in it, with or without nki."""
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise LoadError(f"{target}: expected FILE:KERNEL, e.g. my_kernels.py:matmul.")
    provide()
    module = _module(where)
    if not hasattr(module, name):
        found = ", ".join(key for key, value in vars(module).items() if callable(value)) or "none"
        raise LoadError(f"{where}: expected a kernel named {name!r}, found the functions {found}.")
    return getattr(module, name), module


def _module(where: str) -> ModuleType:
    path = pathlib.Path(where)
    if path.suffix == ".py" and not path.is_file():
        raise LoadError(f"{where}: expected a Python file, found none.")
    try:
        return _from_file(path) if path.suffix == ".py" else importlib.import_module(where)
    except SyntaxError as error:
        raise LoadError(
            f"{error.filename or where}:{error.lineno}: expected Python, found {error.msg}; mend the file "
            "first."
        ) from error
    except Exception as error:  # whatever the file does when it is imported
        raise LoadError(
            f"{where}: expected a file that can be imported, found {type(error).__name__}: {error}."
        ) from error


def _from_file(path: pathlib.Path) -> ModuleType:
    """A file inside a package is imported by its package's name, so that relative imports work."""
    parts, folder = [path.stem], path.resolve().parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    sys.path.insert(0, str(folder))
    if len(parts) > 1:
        return importlib.import_module(".".join(part for part in parts if part != "__init__"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks a class's module up by its name.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
