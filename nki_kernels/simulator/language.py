"""The part of `nki.language` that is modelled: element types, memories, ranges, and the names of functions
and operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nki_kernels.simulator.arithmetic import (
    BINARY,
    UNARY,
    Function,
    bfloat16,
    float8_e4m3,
    float8_e5m2,
    float16,
    float32,
    int8,
    int16,
    int32,
    uint8,
    uint16,
    uint32,
)
from nki_kernels.simulator.memory import current
from nki_kernels.simulator.rules import check_sizes
from nki_kernels.simulator.tensor import Tensor
from nki_kernels.targets import PMAX

__all__ = [
    "NKIObject",
    "affine_range",
    "bfloat16",
    "ds",
    "float8_e4m3",
    "float8_e5m2",
    "float16",
    "float32",
    "int8",
    "int16",
    "int32",
    "ndarray",
    "sequential_range",
    "static_range",
    "tile_size",
    "uint8",
    "uint16",
    "uint32",
    "zeros",
]

sbuf, psum, hbm, private_hbm, shared_hbm = "sbuf", "psum", "hbm", "private_hbm", "shared_hbm"
affine_range = static_range = sequential_range = range  # every range is unrolled, as in the vendor's compiler

for _name in (*UNARY, *BINARY):
    globals()[_name] = Function(_name)


class NKIObject:
    """Base that the vendor's compiler asks of classes whose instances kernels take as arguments."""


class _TileSize:
    pmax = PMAX

    @property
    def gemm_stationary_fmax(self) -> int:
        return current().target.stationary_fmax

    @property
    def gemm_moving_fmax(self) -> int:
        return current().target.moving_fmax_fp32

    @property
    def psum_bank_fmax(self) -> int:
        return current().target.psum_bank_bytes // 4


tile_size = _TileSize()


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"nki.language.{name} is outside the subset that nki 0.2 to 0.7 share and that the simulator models"
    )


def ndarray(
    shape: Sequence[int],
    dtype: np.dtype,
    buffer: str = sbuf,
    name: str = "",
    address: tuple[int, int] | None = None,
) -> Tensor:
    """A fresh tensor with unwritten contents; on chip, from `address` = (partition, byte of each partition)
    on, or wherever there is room.
    """
    names = current().names
    if names is not None:
        check_sizes(tuple(shape))
        if name:
            names.take(name)
    return Tensor.whole(current().allocate(shape, np.dtype(dtype), buffer, name, address))


def zeros(shape: Sequence[int], dtype: np.dtype, buffer: str = sbuf, name: str = "") -> Tensor:
    """A fresh on-chip tensor of zeros (one memset)."""
    from nki_kernels.simulator.isa import memset

    tensor = ndarray(shape, dtype, buffer, name)
    memset(tensor, 0 if tensor.dtype.kind in "iu" else 0.0)
    return tensor


def ds(start: int, size: int) -> slice:
    """`size` elements from `start`."""
    return slice(start, start + size)
