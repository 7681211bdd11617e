"""Which of the gathered functions a kernel can come to run: only those are evaluated.

A method is reached where its name is read as an attribute of anything, since the compiler's own types are not
known before it runs; special methods always are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from nki_kernels.frontend.definition import Function
from nki_kernels.frontend.gather import Program


def reached(program: Program) -> list[Function]:
    """The entry function, then what it reaches, each once."""
    if program.entry not in program.functions:
        return []
    by_method = methods_by_name(program)
    order: dict[str, Function] = {}
    waiting = [program.functions[program.entry]]
    for functions in by_method.values():
        waiting += [function for function in functions if _is_special(function)]
    while waiting:
        function = waiting.pop(0)
        if function.name not in order:
            order[function.name] = function
            waiting += _named_in(function, program, by_method)
    return list(order.values())


def methods_by_name(program: Program) -> dict[str, list[Function]]:
    """All gathered methods, by the name that a call gives."""
    found: dict[str, list[Function]] = {}
    for cls in program.classes.values():
        for name, method in cls.methods.items():
            found.setdefault(name, []).append(method)
    return found


def callee(call: ast.Call, program: Program, by_method: dict[str, list[Function]]) -> Function | None:
    """The function that a call is sure to run, if that can be read off: a function by its name, the
    `__init__` of a class, or a method that only one class has.
    """
    name = full_name(call.func, program)
    if name in program.functions:
        return program.functions[name]
    if name in program.classes:
        return program.classes[name].methods.get("__init__")
    if isinstance(call.func, ast.Attribute) and call.func not in program.resolved:
        methods = by_method.get(call.func.attr, [])
        return methods[0] if len(methods) == 1 else None
    return None


def full_name(node: ast.expr, program: Program) -> str:
    """The full name of what a name or dotted name refers to outside the function, or ""."""
    return program.resolved.get(node, "")


def _is_special(function: Function) -> bool:
    name = function.node.name
    return name.startswith("__") and name.endswith("__") and name not in ("__init__", "__post_init__")


def _named_in(
    function: Function, program: Program, by_method: dict[str, list[Function]]
) -> Iterator[Function]:
    for node in ast.walk(function.node):
        if not isinstance(node, ast.Name | ast.Attribute):
            continue
        name = full_name(node, program)
        if name in program.functions:
            yield program.functions[name]
        elif name in program.classes:
            methods = program.classes[name].methods
            yield from (methods[own] for own in ("__init__", "__post_init__") if own in methods)
        elif isinstance(node, ast.Attribute) and node not in program.resolved:
            yield from by_method.get(node.attr, [])
