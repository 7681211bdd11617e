"""X U V in its two obvious forms, to read before `xuv`: two products through HBM, and fusing without a cache.

Both take x^T `[K, T]`, u `[K, R]` and v `[R, N]` as they are, any sizes, and return `[T, N]`.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nki, nl
from nki_kernels.kernels.matmul import matmul
from nki_kernels.kernels.plain_matmul import load_tile, store_sum
from nki_kernels.targets import PMAX
from nki_kernels.tiling import MOVING_COLS, pieces

Tensor = Any


def product_tile(lhs_t: Tensor, rhs: Tensor, row: tuple, col: tuple) -> Tensor:
    """(lhsT^T rhs)[row, col] in PSUM, both operands read from HBM tile by tile."""
    total = nl.ndarray((row[1], col[1]), dtype=nl.float32, buffer=nl.psum)
    for depth in pieces(lhs_t.shape[0], PMAX):
        left, right = (
            load_tile(lhs_t, depth[0], row[0], row[1], depth[1]),
            load_tile(rhs, depth[0], col[0], col[1], depth[1]),
        )
        matmul(total, left, right, depth[0] == 0)
    return total


def product(lhs_t: Tensor, rhs: Tensor, out: Tensor) -> None:
    """out `[M, N]` = lhsT^T rhs, in HBM."""
    for row in pieces(out.shape[0], PMAX):
        for col in pieces(out.shape[1], MOVING_COLS):
            store_sum(out, row[0], col[0], product_tile(lhs_t, rhs, row, col))


@nki.jit
def unfused_xuv(x_t: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """z^T = U^T x^T goes to HBM and comes back for z V."""
    z_t = nl.ndarray((u.shape[1], x_t.shape[1]), dtype=x_t.dtype, buffer=nl.private_hbm)
    out = nl.ndarray((x_t.shape[1], v.shape[1]), dtype=x_t.dtype, buffer=nl.shared_hbm)
    product(u, x_t, z_t)
    product(z_t, v, out)
    return out


@nki.jit
def naive_fused_xuv(x_t: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """z^T stays on chip, but nobody keeps it: it is computed anew for every 512 columns of output."""
    out = nl.ndarray((x_t.shape[1], v.shape[1]), dtype=x_t.dtype, buffer=nl.shared_hbm)
    for row in pieces(out.shape[0], PMAX):
        for col in pieces(out.shape[1], MOVING_COLS):
            total = nl.ndarray((row[1], col[1]), dtype=nl.float32, buffer=nl.psum)
            for depth in pieces(u.shape[1], PMAX):
                z_t = nl.ndarray((depth[1], row[1]), dtype=x_t.dtype, buffer=nl.sbuf)
                nisa.tensor_copy(dst=z_t, src=product_tile(u, x_t, depth, row))
                matmul(total, z_t, load_tile(v, depth[0], col[0], col[1], depth[1]), depth[0] == 0)
            store_sum(out, row[0], col[0], total)
    return out
