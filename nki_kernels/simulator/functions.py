"""What the activation functions and ALU operators compute, in fp32. The hardware's piecewise approximations
are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nki_kernels.simulator.rules import require


class Function(str):
    """The name of a function or operator, as kernels pass it (`nl.silu`, `nl.add`)."""

    __slots__ = ()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.float32(1) / (np.float32(1) + np.exp(-x))


UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "copy": lambda x: x,
    "square": np.square,
    "sigmoid": _sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "reciprocal": lambda x: np.float32(1) / x,
}
BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
}
REDUCE: dict[str, Callable[..., np.ndarray]] = {"add": np.sum, "maximum": np.max, "minimum": np.min}


def lookup(table: dict[str, Callable], op: object, instruction: str) -> Callable:
    """The numpy twin of `op`; refuses, by name, what the instruction cannot do."""
    require(
        isinstance(op, Function) and op in table,
        f"{instruction} does not support op {op!r}: expected one of {sorted(table)}",
    )
    assert isinstance(op, Function)
    return table[op]
