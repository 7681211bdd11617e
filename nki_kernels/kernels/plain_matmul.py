"""Matrix products as AWS's NKI tutorial teaches them, written afresh: the baselines that ours are compared
with.

All take lhsT `[K, M]` and rhs `[K, N]` in HBM and return `[M, N]`. Sizes must be multiples of the tiles (128,
512) and of the blocks, as in the tutorial. To run one twice on factors: z^T = matmul(U, x^T), then
matmul(z^T, V). And X U V in its two obvious forms, to read before `xuv`: two products through HBM, and fusing
without a cache.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nki, nl
from nki_kernels.kernels.matmul import matmul
from nki_kernels.targets import PMAX
from nki_kernels.tiling import MOVING_COLS, pieces

Tensor = Any


def check_multiple(what: str, size: int, step: int) -> None:
    """Refuse sizes that the tutorial's kernels do not handle."""
    assert size % step == 0, (
        f"{what}: expected a multiple of {step}, found {size}; choose other sizes or blocks"
    )


def load_tile(src: Tensor, row: int, col: int, cols: int, rows: int) -> Tensor:
    """A fresh SBUF tile `[rows, cols]` of src at (row, col)."""
    tile = nl.ndarray((rows, cols), dtype=src.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=src[row : row + rows, col : col + cols])
    return tile


def store_sum(out: Tensor, row: int, col: int, total: Tensor) -> None:
    """A PSUM tile to HBM by way of SBUF."""
    rows, cols = total.shape
    tile = nl.ndarray((rows, cols), dtype=out.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=total)
    nisa.dma_copy(dst=out[row : row + rows, col : col + cols], src=tile)


def check_tiles(lhs_t: Tensor, rhs: Tensor) -> None:
    check_multiple("K", lhs_t.shape[0], PMAX)
    check_multiple("M", lhs_t.shape[1], PMAX)
    check_multiple("N", rhs.shape[1], MOVING_COLS)


@nki.jit
def matmul_tiled(lhs_t: Tensor, rhs: Tensor) -> Tensor:
    """Both operand tiles are loaded for every single nc_matmul."""
    check_tiles(lhs_t, rhs)
    k_size, m_size = lhs_t.shape
    out = nl.ndarray((m_size, rhs.shape[1]), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    for m in range(0, m_size, PMAX):
        for n in range(0, rhs.shape[1], MOVING_COLS):
            total = nl.ndarray((PMAX, MOVING_COLS), dtype=nl.float32, buffer=nl.psum)
            for k in range(0, k_size, PMAX):
                matmul(
                    total, load_tile(lhs_t, k, m, PMAX, PMAX), load_tile(rhs, k, n, MOVING_COLS, PMAX), k == 0
                )
            store_sum(out, m, n, total)
    return out


@nki.jit
def matmul_hoisted(lhs_t: Tensor, rhs: Tensor) -> Tensor:
    """The stationary tiles of a row of output are loaded once."""
    check_tiles(lhs_t, rhs)
    k_size, m_size = lhs_t.shape
    out = nl.ndarray((m_size, rhs.shape[1]), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    for m in range(0, m_size, PMAX):
        stationary = []
        for k in range(0, k_size, PMAX):
            stationary.append(load_tile(lhs_t, k, m, PMAX, PMAX))
        for n in range(0, rhs.shape[1], MOVING_COLS):
            total = nl.ndarray((PMAX, MOVING_COLS), dtype=nl.float32, buffer=nl.psum)
            for k in range(0, k_size, PMAX):
                matmul(total, stationary[k // PMAX], load_tile(rhs, k, n, MOVING_COLS, PMAX), k == 0)
            store_sum(out, m, n, total)
    return out


@nki.jit
def matmul_blocked(
    lhs_t: Tensor, rhs: Tensor, m_tiles: int = 16, n_tiles: int = 2, k_tiles: int = 8
) -> Tensor:
    """Blocked in all three dimensions; the sums over blocks of K are kept in SBUF, in the inputs' element
    type, as the tutorial does. Fewer columns than a moving tile are one narrower tile, as in the paper's
    copy.

    The tutorial keeps all M rows of a block of columns on chip and relies on spilling where they do not fit.
    Here M is cut into as many passes as SBUF needs instead, which is kinder to it.
    """
    k_size, m_size = lhs_t.shape
    check_multiple("K", k_size, k_tiles * PMAX)
    check_multiple("M", m_size, m_tiles * PMAX)
    cols = n_tiles * min(MOVING_COLS, rhs.shape[1])
    check_multiple("N", rhs.shape[1], cols)
    out = nl.ndarray((m_size, rhs.shape[1]), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    rows = pass_rows(m_size, m_tiles * PMAX, n_tiles)
    for first_row in range(0, m_size, rows):
        for col in range(0, rhs.shape[1], cols):
            blocked_columns(
                lhs_t, rhs, out, (first_row, min(rows, m_size - first_row), col), (m_tiles, cols, k_tiles)
            )
    return out


# Per partition, for the running sums; the rest of SBUF is for two turns of both operands.
PASS_BYTES = 96 * 1024


def pass_rows(m_size: int, block_rows: int, n_tiles: int) -> int:
    """Rows of output, in whole blocks, whose bf16 sums over one block of columns fit PASS_BYTES."""
    tile_bytes = n_tiles * MOVING_COLS * 2
    blocks = max(1, PASS_BYTES // (tile_bytes * (block_rows // PMAX)))
    return min(m_size, blocks * block_rows)


def blocked_columns(lhs_t: Tensor, rhs: Tensor, out: Tensor, where: tuple, block: tuple) -> None:
    """Rows [first_row, + rows) of one block of columns: where = (first_row, rows, col), block = (m_tiles,
    cols, k_tiles).
    """
    first_row, rows, col = where
    m_tiles, cols, k_tiles = block
    results = nl.ndarray((PMAX, rows // PMAX, cols), dtype=lhs_t.dtype, buffer=nl.sbuf)
    for k in range(0, lhs_t.shape[0], k_tiles * PMAX):
        moving = load_block(rhs, k, k_tiles, col, cols)
        for m in range(0, rows, m_tiles * PMAX):
            stationary = load_block(lhs_t, k, k_tiles, first_row + m, m_tiles * PMAX)
            for i in range(m_tiles):
                add_block_products(results, m // PMAX + i, stationary, (0, i), moving, k == 0)
    for i in range(rows // PMAX):
        row = first_row + i * PMAX
        nisa.dma_copy(dst=out[row : row + PMAX, col : col + cols], src=results[:, i, :])


def load_block(src: Tensor, row: int, row_tiles: int, col: int, cols: int) -> Tensor:
    """A fresh SBUF block `[128, row tiles, cols]` of src at (row, col)."""
    block = nl.ndarray((PMAX, row_tiles, cols), dtype=src.dtype, buffer=nl.sbuf)
    for i in range(row_tiles):
        nisa.dma_copy(dst=block[:, i, :], src=src[row + i * PMAX : row + (i + 1) * PMAX, col : col + cols])
    return block


def add_block_products(
    results: Tensor, tile: int, stationary: Tensor, where: tuple, moving: Tensor, first: bool
) -> None:
    """results[:, tile, :] (+)= a product over the row tiles of moving `[128, row tiles, cols]`; where = (row
    tile of stationary that they begin at, its column tile).
    """
    row, col = where[0], where[1] * PMAX
    width = min(MOVING_COLS, moving.shape[2])
    for n in range(0, moving.shape[2], width):
        total = nl.ndarray((PMAX, width), dtype=nl.float32, buffer=nl.psum)
        for i in range(moving.shape[1]):
            left = stationary[:, row + i, col : col + PMAX]
            matmul(total, left, moving[:, i, n : n + width], i == 0)
        # PSUM holds one block of K: what the blocks come to is added up in SBUF, rounded to the operands'
        # type each time.
        there = results[:, tile, n : n + width]
        if first:
            nisa.tensor_copy(dst=there, src=total)
        else:
            nisa.tensor_tensor(dst=there, data1=there, data2=total, op=nl.add)


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
