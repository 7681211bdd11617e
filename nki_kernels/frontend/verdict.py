"""`check(kernel, arguments)`: everything that the compiler would refuse, before anything runs. `verdict` asks
whoever knows best: the vendor's own compiler where `nki` is installed, our front end elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nki_kernels import backend
from nki_kernels.frontend.catalogue import Refusal, RefusedError, refusal
from nki_kernels.frontend.definitions import Literals, unwrapped
from nki_kernels.frontend.evaluation import check_evaluation
from nki_kernels.frontend.gatherer import Gatherer
from nki_kernels.frontend.syntax import check_syntax
from nki_kernels.frontend.versions import REFERENCE, Version, read_as, version_of


def check(
    kernel: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    target: str = REFERENCE,
) -> list[Refusal]:
    """All refusals and warnings of `kernel` with these arguments under nki `target`, first stage first.

    The source is read once for a kernel, the classes among its arguments, and a version.
    """
    version = version_of(target)
    if not version.reads_source:
        return []
    kernel = unwrapped(kernel)
    given = _Given(kernel, version)
    walk = Literals(given, arguments=True)
    for name, value in named(kernel, args, kwargs or {}):
        given.argument(name, value)
        walk.take(value, name)
    return [*given.refusals, *_read(kernel, tuple(given.definitions), version)]


def accept(
    kernel: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], target: str = REFERENCE
) -> None:
    """Raise RefusedError if the compiler would refuse `kernel`; warnings pass."""
    refused = tuple(found for found in check(kernel, args, kwargs, target) if not found.warns)
    if refused:
        raise RefusedError(getattr(kernel, "__name__", str(kernel)), refused)


def parameters(kernel: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a kernel's parameters."""
    code = getattr(unwrapped(kernel), "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def named(
    kernel: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Arguments by the kernel's own names for them."""
    names = list(parameters(kernel))
    names += [f"argument {i}" for i in range(len(names), len(args))]
    return [*zip(names, args, strict=False), *kwargs.items()]


@functools.lru_cache(maxsize=1024)
def _read(kernel: Callable[..., Any], definitions: tuple[Any, ...], version: Version) -> tuple[Refusal, ...]:
    gatherer = Gatherer(kernel)
    for definition in definitions:
        gatherer.work(definition)
    program = gatherer.run()
    found = program.refusals + check_syntax(program, version) + check_evaluation(program, version)
    return tuple(dict.fromkeys(found))


class _Given:
    """What the arguments of one call reach: definitions to read, and what they may not be."""

    def __init__(self, kernel: Callable[..., Any], version: Version) -> None:
        self.kernel, self.version = kernel, version
        self.definitions: dict[Any, None] = {}
        self.refusals: list[Refusal] = []

    def work(self, definition: Any) -> None:
        self.definitions[definition] = None

    def refuse(self, rule: str, found: str = "") -> None:
        code = getattr(self.kernel, "__code__", None)
        file, line = (code.co_filename, code.co_firstlineno) if code else (str(self.kernel), 0)
        self.refusals.append(refusal(rule, file, line, found))

    def argument(self, name: str, value: Any) -> None:
        """What is refused of an argument as a whole."""
        if isinstance(value, list) and self.version.since_3:
            self.refuse("argument list", name)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`who` answered, in words, and what it refuses: no sentence at all, or the compiler's."""

    who: str
    refusals: tuple[str, ...]


def verdict(
    kernel: Callable[..., Any], arguments: Sequence[Any], platform: str = "trn1", target: str | None = None
) -> Verdict:
    """Would the compiler take `kernel` with these arguments, without a chip?

    `nki.trace(kernel, grid=None, platform_target=platform).specialize(*arguments)` decides where that exists;
    otherwise our front end does, for nki `target` (by default the version installed, or that of the reference
    stack).
    """
    installed = _installed()
    if installed is not None:
        import nki

        if hasattr(nki, "trace"):
            try:
                nki.trace(kernel, grid=None, platform_target=platform).specialize(*arguments)
            except Exception as error:  # whatever the vendor's compiler raises is its answer
                return Verdict(f"nki {installed} ({platform})", (f"{type(error).__name__}: {error}",))
            return Verdict(f"nki {installed} ({platform})", ())
    target = target or read_as(installed or REFERENCE)
    refused = tuple(str(refusal) for refusal in check(kernel, arguments, target=target) if not refusal.warns)
    reason = "no nki here" if installed is None else f"nki {installed} has no trace"
    return Verdict(f"our front end of nki {target} ({reason})", refused)


def _installed() -> str | None:
    """The version of the vendor's nki, if our kernels are written against it in this process."""
    if not backend.HAS_NKI:
        return None
    try:
        return importlib.metadata.version("nki")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
