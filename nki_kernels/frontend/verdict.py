"""`check(kernel, arguments)`: everything that the compiler would refuse, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nki_kernels.frontend.gather import Gatherer, Program
from nki_kernels.frontend.refusal import Refusal
from nki_kernels.frontend.syntax import check_syntax
from nki_kernels.frontend.versions import REFERENCE, version_of


def check(
    kernel: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    target: str = REFERENCE,
) -> list[Refusal]:
    """All refusals and warnings of `kernel` with these arguments under nki `target`, first stage first."""
    version = version_of(target)
    if not version.reads_source:
        return []
    program = gathered(kernel, args, kwargs or {})
    return _unique(program.refusals + check_syntax(program, version))


def gathered(kernel: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """The source that `kernel` and its arguments reach."""
    gatherer = Gatherer(kernel)
    gatherer.take(named(kernel, args, kwargs))
    return gatherer.run()


def named(
    kernel: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Arguments by the kernel's own names for them."""
    names = list(inspect.signature(kernel).parameters)
    names += [f"argument {i}" for i in range(len(names), len(args))]
    return [*zip(names, args, strict=False), *kwargs.items()]


def _unique(refusals: list[Refusal]) -> list[Refusal]:
    return list(dict.fromkeys(refusals))
