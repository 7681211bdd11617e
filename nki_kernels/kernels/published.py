"""Two more published algorithms, written afresh, for the cost model to be held against: what the paper
measured, on either side.

`matmul_spilling` is AWS's fully optimised matmul (as `plain_matmul.matmul_blocked`) where the running sums of
a block of columns do not fit on chip: a compiler then keeps them in HBM and every block of K reads, adds and
writes them. `matmul_wide` is the tutorial's step before it. `blocked_xuv` is the paper's fused kernel: x^T U
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
    """Free dimensions blocked: all of K for a block of rows and of columns is loaded before it is multiplied."""
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
    """Rows (start, size) of the output; a function of its own so that its strip is let go before the next is
    loaded.
    """
    stationary = load_strip(lhs_t, row[0], row[1])
    for n in range(0, rhs.shape[1], cols):
        wide_block(stationary, rhs, out, row, (n, cols))


def wide_block(stationary: list, rhs: Tensor, out: Tensor, row: tuple, col: tuple) -> None:
    """One block of rows and columns, each given as (start, size)."""
    moving = load_strip(rhs, col[0], col[1])
    for i in range(0, row[1], PMAX):
        for j in range(0, col[1], MOVING_COLS):
            total = nl.ndarray((PMAX, MOVING_COLS), dtype=nl.float32, buffer=nl.psum)
            for k in range(len(moving)):
                matmul(total, stationary[k][:, i : i + PMAX], moving[k][:, j : j + MOVING_COLS], k == 0)
            store_sum(out, row[0] + i, col[0] + j, total)


def load_strip(src: Tensor, col: int, cols: int) -> list:
    """Columns [col, + cols) of src as fresh SBUF tiles of 128 rows each."""
    tiles = []
    for row in range(0, src.shape[0], PMAX):
        tiles.append(load_tile(src, row, col, cols, PMAX))
    return tiles


@nki.jit
def matmul_spilling(
    lhs_t: Tensor, rhs: Tensor, m_tiles: int = 8, n_tiles: int = 2, k_tiles: int = 8
) -> Tensor:
    """lhsT `[K, M]`, rhs `[K, N]` -> `[M, N]`; the running sums go by way of the output tensor in HBM."""
    k_size, m_size = lhs_t.shape
    rows, cols = m_tiles * PMAX, n_tiles * MOVING_COLS
    check_multiple("K", k_size, k_tiles * PMAX)
    check_multiple("M", m_size, rows)
    check_multiple("N", rhs.shape[1], cols)
    out = nl.ndarray((m_size, rhs.shape[1]), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    for col in range(0, rhs.shape[1], cols):
        for k in range(0, k_size, k_tiles * PMAX):
            moving = load_block(rhs, k, k_tiles, col, cols)
            for m in range(0, m_size, rows):
                stationary = load_block(lhs_t, k, k_tiles, m, rows)
                for i in range(0, rows, PMAX):
                    add_spilled(
                        out[m + i : m + i + PMAX, col : col + cols], stationary, i // PMAX, moving, k == 0
                    )
    return out


def add_spilled(home: Tensor, stationary: Tensor, i: int, moving: Tensor, first: bool) -> None:
    """home `[128, cols]` in HBM (+)= the product of column tile i of stationary over this block of K."""
    sums = nl.ndarray((PMAX, 1, home.shape[1]), dtype=home.dtype, buffer=nl.sbuf)
    if not first:
        nisa.dma_copy(dst=sums[:, 0, :], src=home)
    add_block_products(sums, 0, stationary, (0, i), moving, first)
    nisa.dma_copy(dst=home, src=sums[:, 0, :])


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
