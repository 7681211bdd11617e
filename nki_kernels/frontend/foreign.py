"""Get hold of somebody's kernel: `FILE.py:KERNEL` or `package.module:KERNEL`."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys
from types import ModuleType
from typing import Any

from nki_kernels.simulator import standin


class LoadError(ValueError):
    """The kernel could not be found or its file could not be read; one sentence."""


def load(target: str) -> tuple[Any, ModuleType]:
    """The kernel that `target` names, and its module. `import nki` works in it, with or without nki."""
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise LoadError(f"{target}: expected FILE:KERNEL, e.g. my_kernels.py:matmul.")
    standin.provide()
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
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
