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

from nki_kernels.backend import nki, nl
from nki_kernels.kernels.load import load_transposed, store_transposed
from nki_kernels.kernels.products import (
    add_transposed,
    evict_transposed_tile,
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

    `weights`: `[128, C]` from `packing.pack(plan.layout, ...)`. `norm_weight`, if `plan.with_norm`: `[128,
    ceil(H / 128)]` fp32 from `packing.pack_norm`. `residual` `[T, H]`, if `plan.with_residual`, is added to y
    in fp32 before y is rounded; for a Llama layer it is x.
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
    are summed side by side, in all banks of PSUM, a chunk of each at a time as the rows for it come. Every
    sum has the terms and the order that it has in `transposed_product`.
    """
    matrix = work.plan.products.down_first
    widths = pieces(tokens, work.plan.moving_tokens)
    early = work.plan.early_tiles
    sums = []
    for n in range(early):
        sums.append(transposed_banks(work, matrix, n, widths))
    tiles = pieces(matrix.row_tiles(), work.plan.ring_cols // PMAX)
    for i in range(len(tiles)):
        load_transposed(work.h, src, tiles[i], 0, tokens)
        for n in range(early):
            work.stream.seek((n * matrix.row_tiles() + tiles[i][0]) * PMAX)
            blocks = matrix.blocks(n)[tiles[i][0] : tiles[i][0] + tiles[i][1]]
            add_transposed(work, blocks, i == 0, sums[n], work.h, widths, -1)
    for n in range(early):
        evict_transposed_tile(work, matrix, n, work.h, work.down_z, sums[n], widths)
    transposed_product(work, matrix, early, work.h, work.down_z, widths)


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
