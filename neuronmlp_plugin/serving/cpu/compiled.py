"""`product.c` as a function of this process; None, with the reason in the log, where it cannot be had."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from vllm.logger import init_logger

from neuronmlp_plugin.serving.cpu.compiler import find_compiler
from neuronmlp_plugin.serving.cpu.library import SOURCE, CompileError, open_library

logger = init_logger("vllm.neuronmlp")


class Product(ctypes.Structure):
    """One product of a chain; the fields are those of `product.c`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("stage", "dtype", "k", "n")),
        *((name, ctypes.c_int64) for name in ("x_of", "x_at", "y_of", "y_at", "add_of", "add_at")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale")),
    )


class Norm(ctypes.Structure):
    """The RMS norm of `norm.h`."""

    _fields_ = (("weight", ctypes.c_void_p), ("n", ctypes.c_int64), ("epsilon", ctypes.c_double))


class ProductChain(ctypes.Structure):
    """`Chain` of `product.c`: products in the order of their stages, the row lengths of input, output and
    scratch, and the norm of calls that bring a residual.
    """

    _fields_ = (
        ("products", ctypes.POINTER(Product)),
        ("count", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("widths", ctypes.c_int64 * 3),
        ("norm", Norm),
    )


@functools.cache
def load_products() -> Callable[..., None] | None:
    """`neuronmlp_products(chain, input, output, scratch, residual, tokens)`, or None, with the reason in the
    log.
    """
    compiler = find_compiler()
    if compiler is None:
        logger.warning(
            "neuronmlp: no C compiler found, so the products of an MLP run one by one through vLLM; install "
            "gcc for the fast path"
        )
        return None
    try:
        function = open_library(compiler).neuronmlp_products
    except (CompileError, OSError, AttributeError) as error:
        logger.warning(
            "neuronmlp: %s could not be compiled (%s), so the products of an MLP run one by one through vLLM",
            SOURCE.name,
            error,
        )
        return None
    function.restype = None
    # Without argtypes ctypes would pass addresses as C ints, which have 32 bits.
    function.argtypes = (*(ctypes.c_void_p,) * 5, ctypes.c_int64)
    return function
