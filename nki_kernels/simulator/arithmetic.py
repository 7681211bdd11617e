"""Element types, the names that kernels use as numpy types, and what the activation functions and ALU
operators compute, in fp32. tfloat32 is not modelled (numpy has no storage for it), nor are the hardware's
piecewise approximations.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from nki_kernels.simulator.rules import require

float32 = np.dtype(np.float32)
float16 = np.dtype(np.float16)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
float8_e4m3 = np.dtype(ml_dtypes.float8_e4m3)  # up to 240: the variant of trn1 and trn2
float8_e5m2 = np.dtype(ml_dtypes.float8_e5m2)
int32 = np.dtype(np.int32)
uint32 = np.dtype(np.uint32)
int16 = np.dtype(np.int16)
uint16 = np.dtype(np.uint16)
int8 = np.dtype(np.int8)
uint8 = np.dtype(np.uint8)

FLOATS = (float32, float16, bfloat16, float8_e4m3, float8_e5m2)
MATMUL_INPUTS = tuple(dtype.name for dtype in FLOATS)
BIAS = (float32, float16, bfloat16)
UNWRITTEN_INT = 4  # what the vendor's simulator leaves in integer memory


def fill_unwritten(data: np.ndarray) -> None:
    """What memory holds before anyone writes it: NaN, or 4 for integers."""
    data.fill(np.nan if data.dtype in FLOATS else UNWRITTEN_INT)


def round_to(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """fp32 results as `dtype`: to nearest even; integers saturate."""
    if dtype in FLOATS:
        return values.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)


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
