"""`product.c`, compiled for this machine on first use and kept in the user's cache; None where there is no C
compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable

import torch
from vllm.logger import init_logger

from neuronmlp_plugin.serving.cpu.compiler import find_compiler

logger = init_logger("vllm.neuronmlp")
_SOURCE = pathlib.Path(__file__).with_name("product.c")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fopenmp")


class Product(ctypes.Structure):
    """One product of a chain; the fields are those of `product.c`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("stage", "k", "n", "x_at", "x_width", "y_at", "y_width")),
        *((name, ctypes.c_int64) for name in ("add_at", "add_width", "x_of", "y_of", "add_of", "dtype")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale")),
    )


@functools.cache
def load_products() -> Callable[..., None] | None:
    """`neuronmlp_products(products, count, input, output, scratch, tokens)`, or None, with the reason in the
    log.
    """
    compiler = find_compiler()
    if compiler is None:
        logger.warning(
            "neuronmlp: no C compiler found, so the products of an MLP run one by one through vLLM; install gcc for the fast path"
        )
        return None
    try:
        function = ctypes.CDLL(str(_build(compiler))).neuronmlp_products
    except (subprocess.CalledProcessError, OSError) as error:
        words = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or error
        logger.warning(
            "neuronmlp: %s could not be compiled (%s), so the products of an MLP run one by one through vLLM",
            _SOURCE.name,
            words,
        )
        return None
    function.restype = None
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 3, ctypes.c_int64)
    return function


def _build(compiler: str) -> pathlib.Path:
    """The shared library for this source, compiler, processor and OpenMP runtime; written whole, since other
    ranks build it too.
    """
    openmp = _loaded_openmp()
    key = hashlib.sha256(
        "\n".join([_SOURCE.read_text(), compiler, _processor(), *_FLAGS, *openmp]).encode()
    ).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "neuronmlp"
    library = folder / f"product-{key}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = pathlib.Path(scratch) / library.name
            subprocess.run(
                [compiler, *_FLAGS, str(_SOURCE), "-o", str(output), *openmp], check=True, capture_output=True
            )
            output.replace(library)
    return library


def _loaded_openmp() -> list[str]:
    """The OpenMP library that torch brought. A second one (other packages bring theirs) would keep a second
    pool of threads, and the two pools would wait for the same cores: decoding lost all that the chains gain.
    """
    return sorted(map(str, (pathlib.Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))[:1]


def _processor() -> str:
    flags = re.search(
        r"^(?:flags|Features)\s*:.*$", pathlib.Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE
    )
    return flags[0] if flags else platform.machine()
