"""`python -m nki_kernels.frontend FILE:KERNEL`: what would the NKI compiler say?

Exit code 0: nothing to refuse; 1: refused; 2: there was no kernel to read.
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType
from typing import Any

from nki_kernels.frontend.catalogue import RefusedError
from nki_kernels.frontend.foreign import LoadError, UnmodelledError, load
from nki_kernels.frontend.gatherer import Gatherer
from nki_kernels.frontend.verdict import check
from nki_kernels.frontend.versions import REFERENCE, VERSIONS, UnknownVersionError
from nki_kernels.simulator import NkiValidationError, simulate


def main(argv: list[str] | None = None) -> int:
    """Print every refusal and warning, one a line, then the verdict."""
    options = _parser().parse_args(argv)
    try:
        kernel, module = load(options.kernel)
        arguments = _arguments(module, options.arguments)
        refusals: list[Any] = list(check(kernel, arguments or (), target=options.target))
        program = Gatherer(kernel).run()
    except (LoadError, UnknownVersionError) as error:
        print(error, file=sys.stderr)
        return 2
    unseen = ""
    if not any(not refusal.warns for refusal in refusals):
        unseen = _run(kernel, arguments, options.target, refusals)
    for refusal in refusals:
        print(refusal)
    refused = sum(not getattr(refusal, "warns", False) for refusal in refusals)
    places = "in one place" if refused == 1 else f"in {refused} places"
    verdict = f"refused {places}" if refused else "accepted"
    print(f"read {len(program.functions)} functions in {len(program.classes)} classes and outside")
    print(f"{options.kernel}: {verdict} by our front end of nki {options.target}{unseen}")
    return int(refused > 0)


def _run(kernel: Any, arguments: tuple[Any, ...] | None, target: str, refusals: list[Any]) -> str:
    """Let the simulator walk through the kernel: views, names and sizes show only then. What keeps it from
    doing so, in brackets.
    """
    if arguments is None:
        return " (views, names and sizes: give --arguments)"
    try:
        simulate(kernel, dry=True, api=target, language=True)(*arguments)
    except RefusedError as error:
        refusals += error.refusals
    except NkiValidationError as error:
        refusals.append(f"refused by the simulator of trn1: {error}")
    except UnmodelledError as error:
        return f" (views, names and sizes: {error})"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nki_kernels.frontend",
        description="Read a kernel as the compiler of an nki version reads it, and say what it would refuse.",
    )
    parser.add_argument("kernel", metavar="FILE:KERNEL", help="a Python file, or a module's dotted name")
    parser.add_argument(
        "--target",
        default=REFERENCE,
        metavar="VERSION",
        help=f"version of nki, one of {', '.join(VERSIONS)} (default {REFERENCE})",
    )
    parser.add_argument(
        "--arguments",
        metavar="NAME",
        help="a tuple in the same file, or a function that returns one: the kernel's arguments, with which "
        "it is walked through",
    )
    return parser


def _arguments(module: ModuleType, name: str | None) -> tuple[Any, ...] | None:
    if name is None:
        return None
    if not hasattr(module, name):
        raise LoadError(f"{module.__name__}: expected arguments named {name!r}, found no such name.")
    value = getattr(module, name)
    value = value() if callable(value) else value
    if not isinstance(value, tuple):
        raise LoadError(f"{name}: expected a tuple of arguments, found {type(value).__name__}.")
    return value


if __name__ == "__main__":
    sys.exit(main())
