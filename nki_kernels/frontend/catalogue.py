"""Every rule by name: what the compiler says, and what to write instead.

The sentences are those of KLR at 7ccd18c (interop/klr/gather.c, KLR/NKI/Simplify.lean, KLR/Trace/*.lean), so
that whoever meets one in a compiler's log finds it here. Rules in which KLR accepts what the vendor's
documents exclude say so in the text. A refusal has its stage, the compiler's words, and the place.
"""

from __future__ import annotations

import dataclasses

# Stages, in the order in which the compiler runs them: it collects source, checks its syntax, evaluates it.
GATHER, SYNTAX, TRACE = "G", "S", "T"
NAMES = {GATHER: "gathering", SYNTAX: "syntax", TRACE: "evaluation"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One thing that the compiler does not take.

    `message` is the compiler's own sentence, with {found} for the part that names something. `instead` says
    what to write. `warns`: accepted, but with another meaning than in Python, or on some versions only.
    """

    stage: str
    message: str
    instead: str
    warns: bool = False


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A rule broken at a place: `file` as Python names it, `line` from 1 (0 where there is none)."""

    rule: str
    stage: str
    message: str
    instead: str
    file: str
    line: int
    warns: bool = False

    def __str__(self) -> str:
        severity = "warning" if self.warns else "refused"
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {severity} in {NAMES[self.stage]} [{self.stage}]: {self.message}; {self.instead}"


class RefusedError(AssertionError):
    """The compiler would refuse this kernel; `refusals` says where and why."""

    def __init__(self, kernel: str, refusals: tuple[Refusal, ...]) -> None:
        self.refusals = refusals
        count = "one place" if len(refusals) == 1 else f"{len(refusals)} places"
        lines = "\n  ".join(str(refusal) for refusal in refusals)
        super().__init__(f"{kernel}: the NKI compiler would refuse it in {count}:\n  {lines}")


def _statement(words: str, instead: str) -> Rule:
    return Rule(GATHER, f"NKI does not support {words}", instead)


_GATHERED = {
    "expression": Rule(
        GATHER, "unsupported expression ({found})", "write a loop, an if or an assignment instead"
    ),
    "format spec": Rule(
        GATHER, "NKI does no support format specifiers", "leave the part after the colon out"
    ),
    "inner function": _statement("inner function definitions", "move it to the top of the module"),
    "inner class": _statement("'class' definitions within a function", "move it to the top of the module"),
    "del": _statement("'del' statements at this time", "leave it out, or assign None"),
    "type": _statement("'type' statements at this time", "write it at the top of the module"),
    "async": _statement("'async'", "use only synchronous functions"),
    "match": _statement("'match' statements at this time", "use if and elif"),
    "raise": _statement("'raise' statements", 'use assert condition, f"sentence"'),
    "try": _statement("'try' statements", "use if and else"),
    "import": _statement("'import' statements within a function", "import at the top of the module"),
    "global": _statement("'global' statements", "pass an object and set its attributes"),
    "nonlocal": _statement("'nonlocal' statements", "pass an object and set its attributes"),
    "statement": Rule(GATHER, "This statement is not supported in NKI. ({found})", "write it another way"),
    "class keywords": Rule(
        GATHER,
        "class keywords are not supported in NKI ({found})",
        "do not reach this class: no such annotation inside a function, no such base",
    ),
    "class parameters": Rule(
        GATHER, "class type parameters are not supported in NKI ({found})", "write a class without them"
    ),
    "class base": Rule(
        GATHER,
        "NKI classes must inherit from either Enum or NKIObject ({found})",
        "derive it from nl.NKIObject, or do not name it in a function, method or argument of a kernel",
    ),
    "class expression": Rule(
        GATHER, "Expression statements not supported in NKI classes", "keep fields and methods only"
    ),
    "class assignment": Rule(
        GATHER, "invalid assignment in NKI class", "assign one name at a time: field = value"
    ),
    "class field": Rule(
        GATHER, "invalid left-hand side in assignment", "assign plain names in the body of a class"
    ),
    "class statement": Rule(
        GATHER, "Statement not supported in NKI classes ({found})", "keep fields and methods only"
    ),
    "integer": Rule(GATHER, "integer value ({found}) does not fit 32 bits", "use integers of 32 bits"),
    "numpy dtype": Rule(
        GATHER,
        "numpy dtypes are not supported as arguments ({found})",
        "take the dtype of a tensor, or pass the name of one of nki.language",
    ),
    "argument kind": Rule(
        GATHER,
        "{found}, which silently becomes None",
        "pass a tensor, int, float, str, bool, None, a tuple, list or dict of them, or an NKIObject",
    ),
    "argument list": Rule(
        GATHER, "lists are not supported as kernel arguments since 0.3 ({found})", "pass a tuple"
    ),
    "module constant": Rule(
        GATHER,
        "two modules give the name {found} different values, and the compiler keeps one of them for both",
        "give one of the two another name",
        warns=True,
    ),
}
_SYNTAX = {
    "for target": Rule(
        SYNTAX, "expecting simple variable", "loop over one name and take it apart in the body: a, b = item"
    ),
    "for else": Rule(
        SYNTAX, "for-orelse is not supported in NKI", "set a name in the loop and test it after"
    ),
    "while else": Rule(
        SYNTAX, "while-orelse is not supported in NKI", "set a name in the loop and test it after"
    ),
    "with binding": Rule(
        SYNTAX, "NKI does not support name bindings in with statements", "leave `as name` out"
    ),
    "with arguments": Rule(
        SYNTAX, "NKI does not support function call arguments in with contexts", "use nl.no_reorder()"
    ),
    "with": Rule(
        SYNTAX,
        "NKI only supports with statements with a single, simple function call as context",
        "use nl.no_reorder(), the only context there is",
    ),
    "with context": Rule(
        SYNTAX, "invalid with context {found} (only no_reorder is supported)", "use nl.no_reorder()"
    ),
    "ellipsis": Rule(SYNTAX, "invalid use of ellipsis", "use ... inside an index only, pass elsewhere"),
    "dict key": Rule(SYNTAX, "expecting string", "keys of a dict display are string constants"),
    "starred": Rule(SYNTAX, "tuple expansion is not supported", "write the elements one by one"),
    "keyword expansion": Rule(SYNTAX, "keyword expansion is not supported", "write name=value for each"),
    "varargs": Rule(SYNTAX, "varargs are not supported in NKI", "take a tuple as one parameter"),
    "kwargs": Rule(
        SYNTAX, "variable keyword arguments are not supported in NKI", "name the parameters", warns=True
    ),
    "keyword-only": Rule(
        SYNTAX,
        "keyword-only parameters are refused in kernels since 0.3",
        "leave the * out of the parameters of the kernel",
    ),
    "chained in": Rule(
        SYNTAX, "the 'in' operator is not supported in NKI", "write each comparison by itself: a in b and ..."
    ),
    "is": Rule(SYNTAX, "the 'is' operator is not supported in NKI, use ==", "use ==", warns=True),
    "is not": Rule(SYNTAX, "the 'is not' operator is not supported in NKI, use !=", "use !=", warns=True),
    "matmul": Rule(SYNTAX, "the matmul operator is not supported in NKI", "use nki.isa.nc_matmul"),
    "pattern": Rule(SYNTAX, "expecting pattern", "take a tuple apart into plain names, then assign those"),
    "pattern name": Rule(
        SYNTAX, "expecting simple variable", "take a tuple apart into plain names, then assign those"
    ),
    "two mutations": Rule(
        SYNTAX, "mutating assignments must be in separate statements", "write one assignment a line"
    ),
    "declaration": Rule(SYNTAX, "invalid declaration", "declare plain names only, or assign a value"),
    "decorator": Rule(
        SYNTAX,
        "unsupported decorator {found}",
        "keep @staticmethod, @dataclass, and @nki.jit by that dotted name; make a property a method",
    ),
    "base class": Rule(
        SYNTAX, "unsupported base class {found}", "derive from NKIObject, Enum or NamedTuple directly"
    ),
    "entry": Rule(
        SYNTAX, "entry function {found} not found", "write the kernel as a def at the top of a module"
    ),
}
_TRACED = {
    "name": Rule(
        TRACE, "{found} not found!", "write a loop over range(...) and do with the built-ins that NKI knows"
    ),
    "undefined name": Rule(
        TRACE,
        "{found} not found! (if this line is reached)",
        "write a name that the function or its module has",
        warns=True,
    ),
    "module word": Rule(
        TRACE,
        "{found} not found!",
        "import the word itself, or the module under another name: one that is named like its module is not "
        "followed; of math there are ceil, floor, gcd, log2, log10, pow, sqrt, pi, e, inf and nan",
    ),
    "builtin": Rule(
        TRACE, "'none' is not a callable type ({found})", "write a loop; NKI knows few built-ins"
    ),
    "range": Rule(
        TRACE, "range not found!", "use range as the iterator of a for loop only, without keywords"
    ),
    "condition": Rule(
        TRACE,
        "x.1 not found. (the value before .{found} is taken inside the body, after the condition)",
        "give it a name in the line before, then ask that name",
    ),
    "eager": Rule(
        TRACE,
        "the value before .{found} is taken before the whole statement, whatever and, or and if decide",
        "give it a name in the line before, or make the statement an if",
        warns=True,
    ),
    "nested attribute": Rule(
        TRACE, "{found} is immutable", "give the inner object a name, then set its attribute"
    ),
    "mutation": Rule(TRACE, "mutation not supported", "set one index of a list or one key of a dict"),
    "isa result": Rule(
        TRACE,
        "Mutating assignment (a[...] = foo(...)) form is deprecated. Use foo(..., dst=a[...]) instead",
        "an instruction returns nothing: pass dst, or use the value inside a larger expression",
    ),
    "evaluated twice": Rule(
        TRACE,
        "the value is evaluated once for each of the two targets",
        "assign one, then the other from it",
        warns=True,
    ),
    "minmax": Rule(
        TRACE, "invalid arguments ({found})", "give min and max two numbers, or one list or tuple"
    ),
    "string method": Rule(TRACE, "unsupported attribute {found}", "use f-strings: strings have no methods"),
    "tensor attribute": Rule(
        TRACE,
        "unsupported attribute {found} (type is tensor access)",
        "tensors have shape, dtype, buffer and name: compute it from the shape",
    ),
    # Python says these, too, where such a line runs; here they are told of every line that could.
    "keyword name": Rule(
        TRACE,
        "unexpected keyword argument '{found}' (if this line is reached)",
        "name a parameter of the function",
        warns=True,
    ),
    "too many arguments": Rule(
        TRACE,
        "too many arguments given (varargs not supported) (if this line is reached)",
        "pass no more than the function takes",
        warns=True,
    ),
    "missing argument": Rule(
        TRACE, "argument '{found}' not supplied (if this line is reached)", "pass it", warns=True
    ),
    "helper default": Rule(
        TRACE,
        "the default of '{found}' is used; since 0.3 users report that defaults of helpers are dropped",
        "pass every argument of a helper",
        warns=True,
    ),
    "kernel call": Rule(
        TRACE,
        "the kernel {found} is called by another (the migration guide allows @nki.jit on the entry only)",
        "move the body into a function without @nki.jit and let both call that",
    ),
    "reshape of a slice": Rule(
        TRACE, "cannot reshape a complex access pattern", "reshape the whole tensor, then slice once"
    ),
    "pattern of a slice": Rule(
        TRACE,
        "cannot specify an access pattern on an already indexed tensor",
        "give .ap to the whole tensor, with an offset",
    ),
    "slice after index": Rule(
        TRACE,
        "index out of range of tensor dimension (an integer index stays as a dimension of size 1)",
        "slice once, at the instruction",
    ),
    "slice of a slice": Rule(
        TRACE,
        "slicing of a slice (the migration guide calls it not available, KLR allows two levels)",
        "slice once, at the instruction",
    ),
    "slice of a pattern": Rule(
        TRACE, "subscript not supported, for 'access'", "say all of it in the pattern of .ap"
    ),
    "strided slice": Rule(
        TRACE,
        "the step of a slice is dropped, its count is kept (KLR 7ccd18c)",
        "use .ap(pattern=[[step, count], ...])",
    ),
    "tensor name": Rule(
        TRACE,
        "Tensor name '{found}' already in use",
        "leave name= out, or make it unique over loops, calls and the kernel's parameters",
    ),
    "arithmetic": Rule(
        TRACE,
        "binary operators on tensors not supported. Use nki.isa directly. ({found})",
        "use an instruction of nki.isa",
    ),
    "integer size": Rule(
        TRACE, "expecting 'integer', got '{found}'", "use // instead of /, and Python's own integers"
    ),
}
RULES: dict[str, Rule] = {**_GATHERED, **_SYNTAX, **_TRACED}


def refusal(rule: str, file: str, line: int, found: str = "") -> Refusal:
    """The refusal of a place by the rule of that name."""
    entry = RULES[rule]
    message = entry.message.format(found=found) if "{found}" in entry.message else entry.message
    return Refusal(rule, entry.stage, message, entry.instead, file, line, entry.warns)
