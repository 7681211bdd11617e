"""Whether the arguments of a call fit the function that it runs: KLR/Trace/NKI.lean, `bindArgs`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from nki_kernels.frontend.definition import Function
from nki_kernels.frontend.gather import Program
from nki_kernels.frontend.reach import callee
from nki_kernels.frontend.syntax import Found
from nki_kernels.frontend.versions import Version


def check_call(
    call: ast.Call, program: Program, by_method: dict[str, list[Function]], version: Version
) -> Iterator[Found]:
    """What the compiler would say about the arguments; nothing where the function is not known."""
    function = callee(call, program, by_method)
    spread = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg is None)]
    if function is None or (function.owner and function.node.decorator_list):
        return
    if any(isinstance(argument, ast.Starred) for argument in spread) or len(spread) != len(call.args):
        return  # refused as syntax
    names = _names(function)
    given = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    if len(call.args) + len(given) > len(names):
        yield "too many arguments", call, ""
        return
    for name in given:
        if name not in names:
            yield "keyword name", call, name
    with_default = _defaults(function)
    for name in names[len(call.args) :]:
        if name in given:
            continue
        if name not in with_default:
            yield "missing argument", call, name
        elif version.since_3 and function.name != program.entry:
            yield "helper default", call, f"{name} of {function.node.name}"


def _names(function: Function) -> list[str]:
    arguments = function.node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in every][1 if function.owner else 0 :]


def _defaults(function: Function) -> set[str]:
    arguments = function.node.args
    positional = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    keyword_only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return set(positional[len(positional) - len(arguments.defaults) :]) | {
        argument.arg for argument, default in keyword_only if default is not None
    }
