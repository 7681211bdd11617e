"""For every rule of the front end a kernel that obeys and one that breaks it, as text.

A text is the body of `kernel(x, plan)`, or a whole module where it has a line `def kernel`. `x` is a tensor
`[128, 8]` in HBM. Bodies that say how they break a rule only when they run return the output like any kernel.
"""

HEAD = """\
from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np

import nki
import nki.isa as nisa
import nki.language as nl


"""
OUTPUT = """\
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray((128, 8), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    nisa.dma_copy(dst=out, src=tile)
    return out
"""


def module(text: str) -> str:
    """The whole module of a case."""
    if "def kernel" in text:
        return HEAD + text
    body = "\n".join("    " + line for line in text.strip("\n").splitlines())
    return f"{HEAD}@nki.jit\ndef kernel(x, plan=None):\n{body}\n{OUTPUT}"


def _class(head: str, body: str = "    size: int = 4", before: str = "") -> str:
    """A kernel that uses an object of a class with this head and body."""
    return f"{before}{head}\n{body}\n\n\n@nki.jit\ndef kernel(x, plan=None):\n    box = Box()\n{OUTPUT}"


def _decorated(decorator: str) -> str:
    body = f"    size: int = 4\n\n    {decorator}\n    def twice():\n        return 2"
    return _class("class Box(nl.NKIObject):", body)


def _with_helper(helper: str, call: str) -> str:
    return f"{helper}\n\n\n@nki.jit\ndef kernel(x, plan=None):\n    {call}\n{OUTPUT}"


PAIR = "def helper(a, b=1):\n    return a + b"
BOX = (
    "class Box(nl.NKIObject):\n    def __init__(self):\n        self.size = 4\n\n\nclass "
    "Outer(nl.NKIObject):\n"
)
BOX += "    def __init__(self):\n        self.box = Box()"
TILE = "t = nl.ndarray((128, 4, 8), dtype=x.dtype, buffer=nl.sbuf)\n"
JITTED = "@nki.jit\ndef inner(x):\n    return x"

# rule -> (obeys, breaks)
SOURCE = {
    "expression": ("a = []\nfor i in range(3):\n    a.append(i)", "a = [i for i in range(3)]"),
    "format spec": ('a = f"{1}"', 'a = f"{1:3}"'),
    "inner function": (
        _with_helper("def f():\n    return 1", "a = f()"),
        "def f():\n    return 1\na = f()",
    ),
    "inner class": (_class("class Box(nl.NKIObject):"), "class Box(nl.NKIObject):\n    size = 4"),
    "del": ("a = 1\na = None", "a = 1\ndel a"),
    "type": ("a = 1", "type A = int"),
    "async": ("pass", "async def f():\n    pass"),
    "match": ("if 1 == 1:\n    a = 2", "match 1:\n    case 1:\n        a = 2"),
    "raise": ('assert 1 == 1, "no"', 'if 1 == 2:\n    raise ValueError("no")'),
    "try": ("a = 1", "try:\n    a = 1\nexcept ValueError:\n    a = 2"),
    "import": ("a = math.pi", "import math\na = 1"),
    "global": ("a = 1", "global a\na = 1"),
    "nonlocal": ("a = 1", None),  # Python itself wants an outer function, which is refused first
    "statement": ("pass", None),  # every statement that Python has is named by another rule
    "class keywords": ("a: int = 1", "a: Any = 1"),
    "class parameters": (_class("class Box(nl.NKIObject):"), _class("class Box[T](nl.NKIObject):")),
    "class base": (_class("class Box(nl.NKIObject):"), _class("class Box:")),
    "class expression": (
        _class("class Box(nl.NKIObject):", '    """Words."""'),
        _class("class Box(nl.NKIObject):", "    print"),
    ),
    "class assignment": (
        _class("class Box(nl.NKIObject):", "    a = 1\n    b = 1"),
        _class("class Box(nl.NKIObject):", "    a = b = 1"),
    ),
    "class field": (
        _class("class Box(nl.NKIObject):", "    a = 1\n    b = 1"),
        _class("class Box(nl.NKIObject):", "    a, b = 1, 1"),
    ),
    "class statement": (
        _class("class Box(nl.NKIObject):", "    a = 1"),
        _class("class Box(nl.NKIObject):", "    for a in (1,):\n        pass"),
    ),
    "integer": (f"a = {2**31 - 1}", f"a = {2**31}"),
    "numpy dtype": (
        _with_helper("DTYPE = nl.float32", "a = DTYPE"),
        _with_helper("DTYPE = np.dtype(np.float64)", "a = DTYPE"),
    ),
    "argument kind": (
        _with_helper("SIZE = 4", "a = SIZE"),
        _with_helper("SIZE = np.int64(4)", "a = SIZE"),
    ),
    "for target": ("for i in ((1, 2),):\n    a, b = i", "for a, b in ((1, 2),):\n    pass"),
    "for else": ("for i in range(2):\n    pass", "for i in range(2):\n    pass\nelse:\n    a = 1"),
    "while else": ("a = 1\nwhile a > 1:\n    pass", "while 1 > 2:\n    pass\nelse:\n    a = 1"),
    "with binding": ("with nl.no_reorder():\n    pass", "with nl.no_reorder() as a:\n    pass"),
    "with arguments": ("with nl.no_reorder():\n    pass", "with nl.no_reorder(1):\n    pass"),
    "with": ("with nl.no_reorder():\n    pass", "with nl.no_reorder:\n    pass"),
    "with context": ("with nl.no_reorder():\n    pass", "with nl.loop():\n    pass"),
    "ellipsis": (TILE + "u = t[...]", "a = ..."),
    "dict key": ('a = {"one": 1}', "a = {1: 1}"),
    "starred": ("a = [1, 2]", "a = [*(1, 2)]"),
    "keyword expansion": (_with_helper(PAIR, "a = helper(a=1, b=2)"), _with_helper(PAIR, "a = helper(**{})")),
    "varargs": (
        _with_helper("def f(a):\n    return a", "a = f((1, 2))"),
        _with_helper("def f(*a):\n    return a", "a = f(1, 2)"),
    ),
    "kwargs": (
        _with_helper("def f(a):\n    return a", "a = f(a=1)"),
        _with_helper("def f(a, **b):\n    return a", "a = f(1)"),
    ),
    "chained in": ("a = 1 in (1, 2) and 2 > 1", "a = 1 in (1, 2) in ((1, 2),)"),
    "is": ("a = 1 == 2\nb = a is None", "a = 1\nb = a is True"),
    "is not": ("a = 1 == 2\nb = a is not None", "a = 1\nb = a is not True"),
    "matmul": ("a = 1 * 2", "a = 1 @ 2"),
    "pattern": ("a, (b, c) = 1, (2, 3)", "a = [0]\na[0], b = 1, 2"),
    "pattern name": (
        _with_helper(BOX, "box = Box(); size, b = 1, 2; box.size = size"),
        _with_helper(BOX, "box = Box(); box.size, b = 1, 2"),
    ),
    "two mutations": ("a = [0]\na[0] = 1\na[0] = 2", "a = [0, 1]\na[0] = a[1] = 2"),
    "declaration": ("a: int\na = 1", "a = [0]\na[0]: int"),
    "decorator": (_decorated("@staticmethod"), _decorated("@classmethod")),
    "base class": (
        _class("class Box(enum.Enum):", "    A = 1").replace("Box()", "Box.A"),
        _class("class Box(enum.IntEnum):", "    A = 1").replace("Box()", "Box.A"),
    ),
    "entry": ("pass", "kernel = lambda x: x  # def kernel"),
    "name": (
        "a = (4, 5)\nfor i in range(len(a)):\n    b = a[i]",
        "for pair in enumerate((4, 5)):\n    a, b = pair",
    ),
    "undefined name": ("a = 1\nif a > 1:\n    b = a", "a = 1\nif a > 1:\n    b = c"),
    "module word": ("a = math.sqrt(2.0)", "a = math.prod((1, 2))"),
    "builtin": ("a = max(1, 2)", "a = sum((1, 2))"),
    "range": ("for i in range(3):\n    a = i", "a = range(3)"),
    "condition": (
        "a = [x]\nb = a[0]\nif b.shape[0] > 1:\n    c = 1",
        "a = [x]\nif a[0].shape[0] > 1:\n    c = 1",
    ),
    "eager": ("a = [x]\nb = a[0]\nc = len(a) > 0 and b.shape", "a = [x]\nc = len(a) > 0 and a[0].shape"),
    "nested attribute": (
        _with_helper(BOX, "outer = Outer(); box = outer.box; box.size = 5"),
        _with_helper(BOX, "outer = Outer(); outer.box.size = 5"),
    ),
    "mutation": ("a = [0]\na[0] = 1", 'a = {"b": 0}\na["b", "c"] = 1'),
    "isa result": ("a = nisa.get_nc_version() == nisa.nc_version.gen2", "a = nisa.get_nc_version()"),
    "evaluated twice": (
        _with_helper(BOX, "box = Box(); size = max(1, 2); box.size = size"),
        _with_helper(BOX, "box = Box(); size = box.size = max(1, 2)"),
    ),
    "minmax": ("a = max(1, max(2, 3))", "a = max(1, 2, 3)"),
    "string method": ('a = "one"\nb = f"{a}two"', 'a = "-".join(("one", "two"))'),
    "tensor attribute": ("a = len(x.shape)", "a = x.ndim"),
    "keyword name": (_with_helper(PAIR, "a = helper(1, b=2)"), _with_helper(PAIR, "a = helper(1, c=2)")),
    "too many arguments": (_with_helper(PAIR, "a = helper(1, 2)"), _with_helper(PAIR, "a = helper(1, 2, 3)")),
    "missing argument": (_with_helper(PAIR, "a = helper(1)"), _with_helper(PAIR, "a = helper(b=1)")),
    "kernel call": (_with_helper(PAIR, "a = helper(1, 2)"), _with_helper(JITTED, "a = inner(x)")),
}
SINCE_3 = {
    "helper default": (_with_helper(PAIR, "a = helper(1, 2)"), _with_helper(PAIR, "a = helper(1)")),
    "keyword-only": (
        f"@nki.jit\ndef kernel(x, plan):\n{OUTPUT}",
        f"@nki.jit\ndef kernel(x, *, plan=None):\n{OUTPUT}",
    ),
}
RUNNING = {
    "reshape of a slice": (TILE + "u = t.reshape((128, 32))", TILE + "u = t[:, 0:2, :].reshape((128, 16))"),
    "slice after index": (TILE + "u = t[:, 1, 0:4]", TILE + "u = t[:, 1, :][:, 0:4]"),
    "slice of a slice": (TILE + "u = t[0:64, 1:2, 0:4]", TILE + "u = t[0:64, :, :][:, 1:2, 0:4]"),
    "pattern of a slice": (
        TILE + "u = t.ap([[32, 64], [2, 16]], offset=32)",
        TILE + "u = t[0:64, :, :].ap([[32, 64], [2, 16]])",
    ),
    "slice of a pattern": (
        TILE + "u = t.ap([[32, 128], [1, 4]])",
        TILE + "u = t.ap([[32, 128], [1, 8]])[:, 0:4]",
    ),
    "strided slice": (TILE + "u = t[:, 0:4, :]", TILE + "u = t[:, 0:4:2, :]"),
    "tensor name": (
        'a = nl.ndarray((128, 4), dtype=x.dtype, buffer=nl.sbuf, name="a")',
        'for i in range(2):\n    a = nl.ndarray((128, 4), dtype=x.dtype, buffer=nl.sbuf, name="a")',
    ),
    "arithmetic": ("a = x == None", "a = x + 1"),
    "integer size": (
        "a = nl.ndarray((128, 8 // 2), dtype=x.dtype, buffer=nl.sbuf)",
        "a = nl.ndarray((128, 8 / 2), dtype=x.dtype, buffer=nl.sbuf)",
    ),
}
