"""The stages of a gated MLP over one block of tokens. Every kernel of this package is a choice of them."""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nl
from nki_kernels.kernels.load import load_natural, load_transposed
from nki_kernels.kernels.products import (
    column_tile,
    evict,
    is_source_itself,
    natural_tile,
    transposed_product,
    transposed_tile,
)
from nki_kernels.kernels.workspace import Workspace
from nki_kernels.targets import PMAX
from nki_kernels.tiling import pieces, tile_count

Tensor = Any


def load_input(work: Workspace, dst: Tensor, src: Tensor, first_token: int, tokens: int) -> None:
    """A block of `src` as activation^T on chip; from `[T, features]`, normalised if the plan says so, or from
    `[features, T]`.
    """
    if work.plan.transposed_input:
        load_transposed(dst, src, (0, tile_count(src.shape[0], PMAX)), first_token, tokens)
    else:
        load_natural(work, dst, src, first_token, tokens)
    work.scales.load(work)


def first_products(work: Workspace, tokens: int) -> None:
    """z of gate and of up, from x."""
    products = work.plan.products
    widths = pieces(tokens, work.plan.moving_tokens)
    if work.plan.runs_gate_first:
        transposed_product(work, products.gate_first, 0, work.x, work.gate_z, widths)
    if work.plan.runs_up_first:
        transposed_product(work, products.up_first, 0, work.x, work.up_z, widths)


def gated_product(work: Workspace, tokens: int) -> None:
    """h = silu(gate) * up, tile by tile of the intermediate channels; gate and up leave PSUM only as h."""
    products = work.plan.products
    widths = pieces(tokens, work.plan.moving_tokens)
    gate_source = work.gate_z if work.plan.gate_z_tiles > 0 else work.x
    up_source = work.up_z if work.plan.up_z_tiles > 0 else work.x
    for n in range(products.gate_second.col_tiles()):
        cols = products.gate_second.tile_width(n)
        gate = column_tile(work, products.gate_second, n, gate_source, widths, 0)
        up = column_tile(work, products.up_second, n, up_source, widths, 1)
        for j in range(len(widths)):
            start, width = widths[j]
            # ScalarE leaves silu(gate) in SBUF, in two turns, for VectorE to multiply by up, which is still
            # in PSUM: of two operands only one may be there.
            activated = work.activated[(n * len(widths) + j) % 2][0:cols, 0:width]
            gate_matrix, up_matrix = products.gate_second, products.up_second
            if is_source_itself(gate_matrix, n):
                nisa.activation(dst=activated, op=nl.silu, data=gate[j], bias=work.zero[0:cols, :])
            else:
                evict(work, gate_matrix, n, activated, gate[j], nl.silu)
            there = work.h[0:cols, n, start : start + width]
            if up_matrix.scale_at < 0 or is_source_itself(up_matrix, n):
                nisa.tensor_tensor(dst=there, data1=activated, data2=up[j], op=nl.multiply)
            else:
                nisa.scalar_tensor_tensor(
                    dst=there,
                    data=up[j],
                    op0=nl.multiply,
                    operand0=work.scales.of(up_matrix, n, cols),
                    op1=nl.multiply,
                    operand1=activated,
                )


def down_first_product(work: Workspace, tokens: int) -> None:
    """z of down, from h; the pivots of a compact projection are added to the sum in PSUM, as identity
    blocks.
    """
    widths = pieces(tokens, work.plan.moving_tokens)
    transposed_product(work, work.plan.products.down_first, 0, work.h, work.down_z, widths)


def natural_output(
    work: Workspace, source: Tensor, out: Tensor, residual: Tensor, first_token: int, tokens: int
) -> None:
    """out `[T, columns]` = source W (+ residual), staged in rows of `out_cols` columns so that stores are
    long.
    """
    matrix = work.plan.products.down_second
    tiles = pieces(tokens, PMAX)
    stage = work.output_rows(len(tiles))
    columns = pieces(matrix.cols, work.plan.out_cols)
    for c in range(len(columns)):
        first_col, cols = columns[c]
        # A residual lies in the place of the output itself: each product is added to it as it leaves PSUM.
        if work.plan.with_residual:
            copy_rows(stage, residual, first_token, tiles, columns[c], False)
        if work.plan.spreads_pieces:
            work.scales.spread_rows(work, first_col, cols)
        # `out_cols` is whole column tiles, or all columns: no tile lies in two pieces.
        for n in range(first_col // matrix.tile_cols, tile_count(first_col + cols, matrix.tile_cols)):
            natural_column(work, source, stage, n, n * matrix.tile_cols - first_col, tiles)
        copy_rows(stage, out, first_token, tiles, columns[c], True)


def natural_column(work: Workspace, source: Tensor, stage: Tensor, n: int, at: int, tiles: list) -> None:
    """Column tile `n` of the output into stage[:, :, at:], a group of token tiles at a time."""
    matrix = work.plan.products.down_second
    cols = matrix.tile_width(n)
    mark = work.stream.position
    groups = pieces(len(tiles), work.plan.token_group)
    for g in range(len(groups)):
        first, count = groups[g]
        # Every group of token tiles meets the same weights: back to the first block of the column tile.
        work.stream.seek(mark)
        sums = natural_tile(work, matrix, n, source, tiles[first : first + count])
        for j in range(count):
            size = tiles[first + j][1]
            row = stage[0:size, first + j, at : at + cols]
            if matrix.scale_at >= 0:
                evict_scaled(work, row, sums[j], n * matrix.tile_cols, j)
            elif work.plan.with_residual:
                nisa.tensor_tensor(dst=row, data1=sums[j], data2=row, op=nl.add)
            else:
                op = nl.silu if work.plan.silu else nl.copy
                nisa.activation(dst=row, op=op, data=sums[j], bias=work.zero[0:size, :])


def evict_scaled(work: Workspace, row: Tensor, total: Tensor, col: int, turn: int) -> None:
    """row (residual, if any) (+)= a PSUM tile `[tokens, cols]` times the scales of output columns [col, +
    cols), SiLU behind if the plan says so.
    """
    size, cols = total.shape
    at = col - work.scales.first_col
    scale = work.scales.spread[0:size, at : at + cols]
    if work.plan.with_residual:
        # In two steps: this scale goes by column, so it is a whole operand, and an instruction takes two of
        # those.
        scaled = work.scales.scaled[turn % 2][0:size, 0:cols]
        nisa.tensor_tensor(dst=scaled, data1=total, data2=scale, op=nl.multiply)
        nisa.tensor_tensor(dst=row, data1=scaled, data2=row, op=nl.add)
    else:
        nisa.tensor_tensor(dst=row, data1=total, data2=scale, op=nl.multiply)
        if work.plan.silu:
            nisa.activation(dst=row, op=nl.silu, data=row, bias=work.zero[0:size, :])


def copy_rows(
    stage: Tensor, hbm: Tensor, first_token: int, tiles: list, columns: tuple, to_hbm: bool
) -> None:
    """Staged rows to HBM `[T, columns]`, or from there; columns = (first, count)."""
    first_col, cols = columns
    for i in range(len(tiles)):
        start, size = tiles[i]
        rows = hbm[first_token + start : first_token + start + size, first_col : first_col + cols]
        staged = stage[0:size, i, 0:cols]
        if to_hbm:
            nisa.dma_copy(dst=rows, src=staged, dge_mode=nisa.dge_mode.none)
        else:
            nisa.dma_copy(dst=staged, src=rows, dge_mode=nisa.dge_mode.none)


def transposed_output(work: Workspace, source: Tensor, out: Tensor, first_token: int, tokens: int) -> None:
    """out `[columns, T]` = (source W)^T, staged one column tile at a time in the rows area of the plan."""
    matrix = work.plan.products.down_second
    widths = pieces(tokens, work.plan.moving_tokens)
    turns = work.output_turns()
    for n in range(matrix.col_tiles()):
        cols = matrix.tile_width(n)
        stage = turns[n % 2]
        sums = transposed_tile(work, matrix, n, source, widths, 2)
        for j in range(len(widths)):
            start, width = widths[j]
            op = nl.silu if work.plan.silu else nl.copy
            evict(work, matrix, n, stage[0:cols, start : start + width], sums[j], op)
        nisa.dma_copy(
            dst=out[n * PMAX : n * PMAX + cols, first_token : first_token + tokens],
            src=stage[0:cols, 0:tokens],
            dge_mode=nisa.dge_mode.none,
        )


def finish(work: Workspace, out: Tensor, residual: Tensor, first_token: int, tokens: int) -> None:
    """The down projection of a block, from h on chip to HBM: natural or transposed."""
    if work.plan.runs_down_first:
        down_first_product(work, tokens)
    last_product(work, out, residual, first_token, tokens)


def last_product(work: Workspace, out: Tensor, residual: Tensor, first_token: int, tokens: int) -> None:
    """The product that leaves the chip, from z or, where down is dense, from h."""
    source = work.down_z if work.plan.runs_down_first else work.h
    if work.plan.natural_output:
        natural_output(work, source, out, residual, first_token, tokens)
    else:
        transposed_output(work, source, out, first_token, tokens)
