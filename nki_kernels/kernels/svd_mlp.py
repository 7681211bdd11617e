"""The kernels of one launch.

`svd_mlp` is the whole gated MLP, y = down(silu(gate(x)) * up(x)), RMSNorm in front and residual behind if
wanted. x^T, the z of all three projections and the activation h^T of a block of tokens stay on chip; x and y
cross HBM once and the weights once per block of tokens. Prefill and decode are the same program: with few
tokens it streams weights and waits for DMA, with many it computes.

`xuv` is O = X U V, the product that the paper fuses: X U of a block of tokens stays on chip, transposed by
construction, for V to consume. `gated_up` is silu(x Ug Vg) * (x Uu Vu), the first half of an MLP, its result
transposed for `down` to consume without a transpose: `xuv` with `plan.transposed_input`.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nki, nl
from nki_kernels.kernels.load import load_transposed, store_transposed
from nki_kernels.kernels.products import (
    add_transposed,
    transposed_banks,
    transposed_product,
)
from nki_kernels.kernels.stages import finish, first_products, gated_product, last_product, load_input
from nki_kernels.kernels.workspace import Workspace, check_given
from nki_kernels.targets import PMAX
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import pieces

Tensor = Any


@nki.jit
def svd_mlp(
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    norm_weight: Tensor = None,
    residual: Tensor = None,
    scales: Tensor = None,
) -> Tensor:
    """x `[T, H]` (`[H, T]` if `plan.transposed_input`) -> y `[T, H]`, in the element type of the weights.

    `weights`: `[128, C]` from `packing.pack`, of `layout_of(plan.products, plan.external_z)`. `norm_weight`,
    if `plan.with_norm`: `[128, ceil(H / 128)]` fp32 from `packing.pack_norm`. `residual` `[T, H]`, if
    `plan.with_residual`, is added to y in fp32 before y is rounded; for a Llama layer it is x.
    """
    check_given("residual", residual, plan.with_residual)
    products = plan.products
    y = nl.ndarray((plan.tokens, products.down_second.cols), dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight, scales, x.dtype)
    blocks = pieces(plan.tokens, plan.block_tokens)
    for b in range(len(blocks)):
        first_token, tokens = blocks[b]
        work.open_block()
        load_input(work, work.x, x, first_token, tokens)
        first_products(work, tokens)
        gated_product(work, tokens)
        finish(work, y, residual, first_token, tokens)
    return y


def product_on_arrival(work: Workspace, src: Tensor, tokens: int) -> None:
    """z of down for the launch's first block, from src `[features, T]` in HBM, which stays on chip as h.

    Rows of x^T are short and so slow to come, and a sum needs all of them. So `plan.early_tiles` column tiles
    are summed over the rows that have come, a chunk of weights each, and their sums so far wait in SBUF, in
    fp32. The first `plan.early_group` of them take the first rows side by side, one by one as they come.
    """
    matrix = work.plan.products.down_first
    widths = pieces(tokens, work.plan.moving_tokens)
    sums = work.early_sums()
    rows = pieces(matrix.row_tiles(), work.plan.ring_cols // PMAX)
    for i in range(len(rows)):
        group = work.plan.early_group if i == 0 else 1
        # Weights come faster than rows: those that the first products need are not kept behind them.
        for n in range(group):
            # Block (k, n) begins at packed column (n row_tiles + k) 128: down_first is the first matrix here,
            # without pivots or groups, and early column tiles are whole ones (`arrival.early_tiles`).
            work.stream.ask((n * matrix.row_tiles() + rows[i][0]) * PMAX)
        load_transposed(work.h, src, rows[i], 0, tokens)
        done = 0
        while done < work.plan.early_tiles:
            banks = early_banks(work, (done, group), rows[i], widths)
            for j in range(group):
                keep_early(work, sums, banks[j], done + j, (i == 0, i == len(rows) - 1), widths)
            done += group
            group = 1  # the others one after another, as their weights come
    transposed_product(work, matrix, work.plan.early_tiles, work.h, work.down_z, widths)


def early_banks(work: Workspace, tiles: tuple, rows: tuple, widths: list) -> list:
    """PSUM tiles of column tiles (first, count), summed over row tiles (first, count) alone: a list over the
    column tiles of lists over `widths`.
    """
    matrix = work.plan.products.down_first
    banks = []
    blocks = []
    for j in range(tiles[1]):
        banks.append(transposed_banks(work, matrix, tiles[0] + j, widths))
        blocks.append(matrix.blocks(tiles[0] + j))
    # Rows outside: as soon as one is there, all column tiles of the group use it.
    for k in range(rows[0], rows[0] + rows[1]):
        for j in range(tiles[1]):
            work.stream.seek(((tiles[0] + j) * matrix.row_tiles() + k) * PMAX)
            block = blocks[j][k : k + 1]
            add_transposed(work, block, k == rows[0], banks[j], work.h, widths, -1)
    return banks


def keep_early(work: Workspace, sums: Tensor, banks: list, n: int, ends: tuple, widths: list) -> None:
    """Column tile `n` out of PSUM: added to its sums so far or, with the last rows, to z; ends = (whether
    these rows are the first, the last).
    """
    first, last = ends
    for j in range(len(widths)):
        start, width = widths[j]
        so_far = sums[:, n, start : start + width]
        if first:
            nisa.tensor_copy(dst=so_far, src=banks[j])
        elif last:
            # z is rounded once, when all rows are in the sum.
            there = work.down_z[:, n, start : start + width]
            nisa.tensor_tensor(dst=there, data1=banks[j], data2=so_far, op=nl.add)
        else:
            nisa.tensor_tensor(dst=so_far, data1=banks[j], data2=so_far, op=nl.add)


@nki.jit
def xuv(x: Tensor, weights: Tensor, plan: Plan, residual: Tensor = None, scales: Tensor = None) -> Tensor:
    """x `[T, K]` (`[K, T]` if `plan.transposed_input`) -> `[T, N]`, or `[N, T]` for a layout with transposed
    output.

    The layout comes from `chain_layout`: `uv`, input-pivoted `compact`, or one `dense` matrix. SiLU behind if
    `plan.silu`; `residual` `[T, N]`, if `plan.with_residual`, is added to natural output in fp32.
    """
    check_given("residual", residual, plan.with_residual)
    products = plan.products
    cols = products.down_second.cols
    shape = (plan.tokens, cols) if plan.natural_output else (cols, plan.tokens)
    out = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, None, scales, x.dtype)
    blocks = pieces(plan.tokens, plan.block_tokens)
    for b in range(len(blocks)):
        first_token, tokens = blocks[b]
        work.open_block()
        if b == 0 and plan.early_tiles > 0:
            product_on_arrival(work, x, tokens)
            last_product(work, out, residual, first_token, tokens)
        else:
            # A projection by itself is run as a down projection, whose input is h.
            load_input(work, work.h, x, first_token, tokens)
            finish(work, out, residual, first_token, tokens)
    return out


down = xuv


@nki.jit
def gated_up(
    x: Tensor, weights: Tensor, plan: Plan, norm_weight: Tensor = None, scales: Tensor = None
) -> Tensor:
    """x `[T, H]` (or `[H, T]`) -> h^T `[I, T]`; gate and up of any forms and ranks, x loaded once. Layout:
    `gated_layout`.
    """
    h = nl.ndarray((plan.intermediate, plan.tokens), dtype=x.dtype, buffer=nl.shared_hbm)
    work = Workspace(plan, weights, norm_weight, scales, x.dtype)
    blocks = pieces(plan.tokens, plan.block_tokens)
    for b in range(len(blocks)):
        first_token, tokens = blocks[b]
        work.open_block()
        load_input(work, work.x, x, first_token, tokens)
        first_products(work, tokens)
        gated_product(work, tokens)
        store_transposed(h, 0, work.h, plan.intermediate, blocks[b])
    return h
