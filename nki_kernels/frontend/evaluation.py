"""Stage T, as far as the source alone shows it: names, calls and the order in which values are taken.

Follows KLR/Trace/NKI.lean, Term.lean, Python.lean and Builtin.lean, and the two rewritings of
KLR/NKI/Simplify.lean that change what a program means. What only values show (views, names of tensors, sizes)
is seen while the simulator runs: `simulator.rules`. Only functions that a kernel can come to run are
evaluated. A method is reached where its name is read as an attribute of anything, since the compiler's own
types are not known before it runs; special methods always are.
"""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Iterator

from nki_kernels.frontend.catalogue import Refusal, refusal
from nki_kernels.frontend.definitions import Function
from nki_kernels.frontend.gatherer import Program
from nki_kernels.frontend.syntax import Found, dotted, is_entry_mark, is_nki_call
from nki_kernels.frontend.versions import Version


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


# Built-ins that the evaluator has (KLR/Trace/Python.lean); range is known to for loops alone.
BUILTINS = frozenset(
    (
        *("isinstance", "type", "slice", "print", "min", "max", "abs", "str", "bool", "int", "float"),
        *("divmod", "tuple", "list", "dict", "len"),
    )
)
# What arrays have and tensors of NKI have not.
ARRAY_ATTRIBUTES = frozenset(
    ("ndim", "size", "T", "astype", "nbytes", "itemsize", "strides", "numel", "transpose", "copy_", "fill")
)
MATH = ("ceil", "floor", "gcd", "log2", "log10", "pow", "sqrt", "pi", "e", "inf", "nan")
MODULES = ("nki", "math", "numpy")  # known without an import
RANGES = ("range", "static_range", "affine_range", "sequential_range", "dynamic_range")


def check_evaluation(program: Program, version: Version) -> list[Refusal]:
    """All refusals of stage T that can be read off the functions that the kernel reaches."""
    refusals = []
    by_method = methods_by_name(program)
    attributes = frozenset(by_method) | _attributes(program)
    for function in reached(program):
        for rule, node, what in _Evaluation(program, version, function, by_method, attributes).findings():
            source = function.source
            refusals.append(refusal(rule, source.file, source.place(node), what))
    return refusals


class _Evaluation:
    """One function."""

    def __init__(
        self,
        program: Program,
        version: Version,
        function: Function,
        by_method: dict[str, list[Function]],
        attributes: frozenset[str],
    ) -> None:
        self.program, self.version, self.of = program, version, function
        self.by_method, self.attributes = by_method, attributes
        arguments = function.node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        self.locals = {argument.arg for argument in every}
        self.loop_ranges: set[ast.AST] = set()
        for node in ast.walk(function.node):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.locals.add(node.id)
            elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and not node.iter.keywords:
                # range is a word of the loop's, not a function: anywhere else its name is unknown.
                self.loop_ranges.add(node.iter.func)

    def findings(self) -> Iterator[Found]:
        if self.of.name != self.program.entry:
            for decorator in self.of.node.decorator_list:
                if is_entry_mark(decorator, self.program):
                    yield "kernel call", decorator, self.of.name
        for statement in self.of.node.body:
            for node in ast.walk(statement):
                yield from self._order(node)
                yield from self._assignment(node)
                yield from self._value(node)
        for node in self._unannotated():
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                yield from self._name(node)

    def _unannotated(self) -> Iterator[ast.AST]:
        """Every node that is evaluated: annotations are gathered, but not evaluated."""
        waiting: list[ast.AST] = list(self.of.node.body)
        while waiting:
            node = waiting.pop(0)
            yield node
            annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
            waiting += [child for child in ast.iter_child_nodes(node) if child is not annotation]

    def _name(self, node: ast.Name) -> Iterator[Found]:
        if node.id in self.locals:
            return
        name = full_name(node, self.program)
        short = (name or node.id).rpartition(".")[2]
        constants = self.program.constants
        if short in RANGES and (not name or name.startswith(("builtins.", "nki."))):
            if node not in self.loop_ranges:
                yield "range", node, ""
        elif name.startswith("builtins.") and short not in BUILTINS:
            yield "name", node, name
        # The default, self, is no constant of anybody's: a name that is no built-in never matches.
        elif constants.get(node.id) is getattr(builtins, node.id, self) and node.id not in BUILTINS:
            yield "builtin", node, node.id
        elif not name and node.id not in constants and node.id not in MODULES:
            yield "undefined name", node, node.id

    def _module_word(self, node: ast.Attribute) -> Iterator[Found]:
        """`import helpers; helpers.f` is looked for, but not gathered: the module has taken the name."""
        if (
            not isinstance(node.value, ast.Name)
            or node.value.id in self.locals
            or node in self.program.resolved
        ):
            return
        name = dotted(node, self.program) or ""
        module = name.rpartition(".")[0]
        unknown = node.attr not in MATH if module == "math" else module != "numpy"
        if unknown and isinstance(self.program.constants.get(module), types.ModuleType):
            yield "module word", node, name

    # -- when values are taken

    def _order(self, node: ast.AST) -> Iterator[Found]:
        """`e.a` with any e but a name is rewritten to `x = e` before the statement and `x.a` inside. That
        reaches a condition only when its body runs, and asks nobody about and, or and if.
        """
        test: ast.expr | None = None
        if isinstance(node, ast.If | ast.While):
            test = node.test
        elif isinstance(node, ast.For):
            test = node.iter
        if test is not None:
            for attribute in _taken_before(test):
                yield "condition", attribute, attribute.attr
        late: list[ast.expr] = []
        if isinstance(node, ast.BoolOp):
            late = node.values[1:]
        elif isinstance(node, ast.IfExp):
            late = [node.body, node.orelse]
        for part in late:
            for attribute in _taken_before(part):
                yield "eager", attribute, attribute.attr

    # -- assignments

    def _assignment(self, node: ast.AST) -> Iterator[Found]:
        if isinstance(node, ast.Assign):
            yield from self._result(node)
            sets = any(not isinstance(target, ast.Name | ast.Tuple) for target in node.targets)
            calls = any(isinstance(part, ast.Call) for part in ast.walk(node.value))
            if len(node.targets) > 1 and sets and calls:
                yield "evaluated twice", node, ""
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Attribute):
                yield "nested attribute", node, ast.unparse(node)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            if isinstance(node.slice, ast.Tuple):
                yield "mutation", node, ""
        elif isinstance(node, ast.List) and isinstance(node.ctx, ast.Store):
            yield "mutation", node, ""

    def _result(self, node: ast.Assign) -> Iterator[Found]:
        """`x = nisa.op(...)` is the older way to write nisa.op(x, ...)."""
        word = is_nki_call(node.value, "nki.isa", self.program)
        if word not in (None, "register_alloc") and isinstance(node.targets[0], ast.Name):
            yield "isa result", node, ""

    # -- calls and attributes

    def _value(self, node: ast.AST) -> Iterator[Found]:
        if isinstance(node, ast.Attribute):
            yield from self._module_word(node)
            if isinstance(node.value, ast.JoinedStr | ast.Constant):
                yield "string method", node, node.attr
            elif node.attr in ARRAY_ATTRIBUTES - self.attributes and node not in self.program.resolved:
                yield "tensor attribute", node, node.attr
        if not isinstance(node, ast.Call):
            return
        name = dotted(node.func, self.program)
        numbers = len(node.args)
        if name in ("min", "max") and name not in self.locals and (node.keywords or numbers not in (1, 2)):
            yield "minmax", node, f"{numbers} arguments"
        yield from check_call(node, self.program, self.by_method, self.version)


def _attributes(program: Program) -> set[str]:
    """Every name that a gathered class has as a field, or as an attribute that is set anywhere in it."""
    found: set[str] = set()
    for cls in program.classes.values():
        for node in ast.walk(cls.node):
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def _taken_before(node: ast.expr) -> Iterator[ast.Attribute]:
    """Attributes of something that is no name."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and not isinstance(part.value, ast.Name | ast.Attribute):
            yield part
