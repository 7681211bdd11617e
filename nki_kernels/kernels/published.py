"""Two more published algorithms, written afresh, for the cost model to be held against: what the paper
measured, on either side.

`matmul_spilling` is AWS's fully optimised matmul (as `plain_matmul.matmul_blocked`) where the running sums of
a block of columns do not fit on chip: a compiler then keeps what does not fit in HBM, in fp32, and every
block of K reads, adds and writes it (published traffic: docs/cost_model.md). `matmul_wide` is the tutorial's
step before it. `blocked_xuv` is the paper's fused kernel: x^T U
of a block of tokens cached on chip, sums over blocks of K and R kept in SBUF in bf16. Sizes must be multiples
of the blocks.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nki, nl
from nki_kernels.kernels.matmul import matmul
from nki_kernels.kernels.plain_matmul import (
    add_block_products,
    check_multiple,
    check_tiles,
    load_block,
    load_tile,
    store_sum,
)
from nki_kernels.targets import PMAX
from nki_kernels.tiling import MOVING_COLS

Tensor = Any
BLOCK = 8 * PMAX  # of tokens, K and R, and of N: the authors' 1024
BLOCK_TILES = 8


@nki.jit
def matmul_wide(lhs_t: Tensor, rhs: Tensor, m_tiles: int = 2, n_tiles: int = 2) -> Tensor:
    """Free dimensions blocked: all of K for a block of rows and of columns is loaded before it is multiplied,
    tile by tile as in the tutorial: rows of 128 and of 512 elements.
    """
    check_tiles(lhs_t, rhs)
    m_size = lhs_t.shape[1]
    rows, cols = m_tiles * PMAX, n_tiles * MOVING_COLS
    check_multiple("M", m_size, rows)
    check_multiple("N", rhs.shape[1], cols)
    out = nl.ndarray((m_size, rhs.shape[1]), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    for m in range(0, m_size, rows):
        wide_rows(lhs_t, rhs, out, (m, rows), cols)
    return out


def wide_rows(lhs_t: Tensor, rhs: Tensor, out: Tensor, row: tuple, cols: int) -> None:
    """Rows (start, size) of the output; a function of its own so that its tiles are let go before the next
    are loaded.
    """
    stationary = load_tiles(lhs_t, row[0], row[1], PMAX)
    for n in range(0, rhs.shape[1], cols):
        wide_block(stationary, rhs, out, row, (n, cols))


def wide_block(stationary: list, rhs: Tensor, out: Tensor, row: tuple, col: tuple) -> None:
    """One block of rows and columns, each given as (start, size)."""
    moving = load_tiles(rhs, col[0], col[1], MOVING_COLS)
    for i in range(len(stationary)):
        for j in range(len(moving)):
            total = nl.ndarray((PMAX, MOVING_COLS), dtype=nl.float32, buffer=nl.psum)
            for k in range(len(moving[j])):
                matmul(total, stationary[i][k], moving[j][k], k == 0)
            store_sum(out, row[0] + i * PMAX, col[0] + j * MOVING_COLS, total)


def load_tiles(src: Tensor, col: int, cols: int, width: int) -> list:
    """Columns [col, + cols) of src as fresh SBUF tiles `[128, width]`: a list over columns of lists over
    rows.
    """
    found = []
    for start in range(col, col + cols, width):
        tiles = []
        for row in range(0, src.shape[0], PMAX):
            tiles.append(load_tile(src, row, start, width, PMAX))
        found.append(tiles)
    return found


@nki.jit
def matmul_spilling(
    lhs_t: Tensor, rhs: Tensor, held_tiles: int, m_tiles: int = 8, n_tiles: int = 2, k_tiles: int = 8
) -> Tensor:
    """lhsT `[K, M]`, rhs `[K, N]` -> `[M, N]`. The running sums of a block of columns are fp32; those of the
    first `held_tiles` row tiles stay in SBUF, those of the others go by way of HBM, a row tile at a time.
    """
    k_size, m_size = lhs_t.shape
    rows, cols = m_tiles * PMAX, n_tiles * MOVING_COLS
    check_multiple("K", k_size, k_tiles * PMAX)
    check_multiple("M", m_size, rows)
    check_multiple("N", rhs.shape[1], cols)
    out = nl.ndarray((m_size, rhs.shape[1]), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    home = nl.ndarray((m_size, cols), dtype=nl.float32, buffer=nl.private_hbm)
    for col in range(0, rhs.shape[1], cols):
        spilling_columns(lhs_t, rhs, (out, home), col, (m_tiles, k_tiles, held_tiles))
    return out


def spilling_columns(lhs_t: Tensor, rhs: Tensor, to: tuple, col: int, block: tuple) -> None:
    """One block of columns: to = (out, home), block = (m_tiles, k_tiles, held_tiles). A function of its own
    so that its sums are let go before the next block's. Operands have one place each: the sums take the rest.
    """
    out, home = to
    m_tiles, k_tiles, held_tiles = block
    rows, cols = m_tiles * PMAX, home.shape[1]
    held = nl.ndarray((PMAX, max(1, held_tiles), cols), dtype=nl.float32, buffer=nl.sbuf)
    moving = nl.ndarray((PMAX, k_tiles, cols), dtype=rhs.dtype, buffer=nl.sbuf)
    stationary = nl.ndarray((PMAX, k_tiles, rows), dtype=lhs_t.dtype, buffer=nl.sbuf)
    for k in range(0, lhs_t.shape[0], k_tiles * PMAX):
        fill_block(moving, rhs, k, col)
        for m in range(0, lhs_t.shape[1], rows):
            fill_block(stationary, lhs_t, k, m)
            for i in range(m_tiles):
                add_row_tile((held, home), stationary, moving, (m // PMAX, i, held_tiles), k == 0)
    store_rows(out, col, held, home, held_tiles)


def fill_block(block: Tensor, src: Tensor, row: int, col: int) -> None:
    """src at (row, col) into block `[128, row tiles, cols]`."""
    cols = block.shape[2]
    for i in range(block.shape[1]):
        tile = src[row + i * PMAX : row + (i + 1) * PMAX, col : col + cols]
        nisa.dma_copy(dst=block[:, i, :], src=tile)


def add_row_tile(sums: tuple, stationary: Tensor, moving: Tensor, where: tuple, first: bool) -> None:
    """Row tile where[0] + where[1] of the sums (held, home) (+)= its product over this block of K; the first
    where[2] tiles are held on chip.
    """
    held, home = sums
    tile, cols = where[0] + where[1], moving.shape[2]
    if tile < where[2]:
        add_block_products(held, tile, stationary, (0, where[1]), moving, first)
    else:
        there = home[tile * PMAX : (tile + 1) * PMAX, :]
        spilled = nl.ndarray((PMAX, 1, cols), dtype=nl.float32, buffer=nl.sbuf)
        if not first:
            nisa.dma_copy(dst=spilled[:, 0, :], src=there)
        add_block_products(spilled, 0, stationary, (0, where[1]), moving, first)
        nisa.dma_copy(dst=there, src=spilled[:, 0, :])


def store_rows(out: Tensor, col: int, held: Tensor, home: Tensor, held_tiles: int) -> None:
    """A block of columns, rounded to the output's type and stored a row tile at a time."""
    cols = home.shape[1]
    for i in range(out.shape[0] // PMAX):
        packed = nl.ndarray((PMAX, cols), dtype=out.dtype, buffer=nl.sbuf)
        if i < held_tiles:
            nisa.tensor_copy(dst=packed, src=held[:, i, :])
        else:
            nisa.tensor_copy(dst=packed, src=load_tile(home, i * PMAX, 0, cols, PMAX))
        nisa.dma_copy(dst=out[i * PMAX : (i + 1) * PMAX, col : col + cols], src=packed)


@nki.jit
def blocked_xuv(x_t: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """x^T `[K, T]`, u `[K, R]`, v `[R, N]` -> `[T, N]`."""
    check_multiple("T", x_t.shape[1], BLOCK)
    check_multiple("K", x_t.shape[0], BLOCK)
    check_multiple("R", u.shape[1], BLOCK)
    check_multiple("N", v.shape[1], BLOCK)
    out = nl.ndarray((x_t.shape[1], v.shape[1]), dtype=x_t.dtype, buffer=nl.shared_hbm)
    for token in range(0, x_t.shape[1], BLOCK):
        z_t = first_phase(x_t, u, token)
        second_phase(z_t, v, out, token)
    return out


def first_phase(x_t: Tensor, u: Tensor, token: int) -> Tensor:
    """(x U)^T of a block of tokens, `[128, R / 128, 1024]`: R on the partitions by construction."""
    z_t = nl.ndarray((PMAX, u.shape[1] // PMAX, BLOCK), dtype=x_t.dtype, buffer=nl.sbuf)
    for k in range(0, x_t.shape[0], BLOCK):
        moving = load_block(x_t, k, BLOCK_TILES, token, BLOCK)
        for r in range(0, u.shape[1], BLOCK):
            stationary = load_block(u, k, BLOCK_TILES, r, BLOCK)
            for i in range(BLOCK_TILES):
                add_block_products(z_t, r // PMAX + i, stationary, (0, i), moving, k == 0)
    return z_t


def second_phase(z_t: Tensor, v: Tensor, out: Tensor, token: int) -> None:
    """A block of tokens of z V, block of columns by block of columns."""
    for n in range(0, v.shape[1], BLOCK):
        sums = nl.ndarray((PMAX, BLOCK_TILES, BLOCK), dtype=out.dtype, buffer=nl.sbuf)
        for r in range(0, v.shape[0], BLOCK):
            moving = load_block(v, r, BLOCK_TILES, n, BLOCK)
            for i in range(BLOCK_TILES):
                add_block_products(sums, i, z_t, (r // PMAX, i), moving, r == 0)
        for i in range(BLOCK_TILES):
            row = token + i * PMAX
            nisa.dma_copy(dst=out[row : row + PMAX, n : n + BLOCK], src=sums[:, i, :])
