"""nc_matmul under either call convention."""

from __future__ import annotations

from typing import Any

from nki_kernels import backend
from nki_kernels.backend import nisa

Tensor = Any


def matmul(dst: Tensor, stationary: Tensor, moving: Tensor, first: bool) -> None:
    """One nc_matmul that starts a sum or adds to it; before 0.3 the first one into a fresh tile starts it by
    itself.
    """
    if backend.TAKES_ACCUMULATE:
        nisa.nc_matmul(dst, stationary, moving, accumulate=not first)
    else:
        nisa.nc_matmul(dst, stationary, moving)
