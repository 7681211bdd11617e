"""The two matrix products that everything is built of. Sums stay in fp32 in PSUM from the first block to the
last.

Transposed: stationary = weight block [K 128, M 128], moving = activation^T tile [K 128, N <= 512 tokens], so
that the result is the transposed activation that the next product takes as it is. Natural: stationary =
activation^T tile [K 128, M 128 tokens], moving = weight block [K 128, N 512], for results that leave in
[tokens, columns].
"""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nl
from nki_kernels.kernels.matmul import matmul
from nki_kernels.kernels.workspace import Workspace
from nki_kernels.tiling import HALF, IDENTITY, SHARED, Matrix

Tensor = Any


def evict(work: Workspace, matrix: Matrix, n: int, dst: Tensor, data: Tensor, op: Any) -> None:
    """dst = op(column tile `n` of a transposed product), times the scales of int8 weights: both free on the
    way out of PSUM.
    """
    cols = matrix.tile_width(n)
    bias = work.zero[0:cols, :]
    if matrix.scale_at >= 0:
        nisa.activation(dst=dst, op=op, data=data, bias=bias, scale=work.scales.of(matrix, n, cols))
    else:
        nisa.activation(dst=dst, op=op, data=data, bias=bias)


def block_of(work: Workspace, kind: int, owner: int, k: int, cols: int) -> tuple:
    """(tensor, first column) of a weight block of row tile `k`; owner as in `WeightStream.take_stored`."""
    if kind == IDENTITY:
        return work.identity, 0
    if kind == SHARED:
        return work.stream.take_shared(owner, k)
    return work.stream.take_stored(cols, owner, k) if owner >= 0 else work.stream.take(cols)


def transposed_tile(
    work: Workspace, matrix: Matrix, n: int, source: Tensor, widths: list, owner: int
) -> list:
    """Column tile `n` of (source W), transposed: PSUM tiles [cols, width], one for each (start, width) of
    `widths` over the tokens.

    `source` is an activation^T `[128, row tiles, tokens]` in SBUF. `owner`: 0 gate, 1 up, 2 down for a matrix
    that shares blocks, -1 for others.
    """
    sums = transposed_banks(work, matrix, n, widths)
    add_transposed(work, matrix.blocks(n), True, sums, source, widths, owner)
    return sums


def transposed_banks(work: Workspace, matrix: Matrix, n: int, widths: list) -> list:
    """Fresh PSUM tiles for column tile `n` of a transposed product."""
    sums = []
    for j in range(len(widths)):
        sums.append(work.banks.tile((matrix.tile_width(n), widths[j][1])))
    return sums


def add_transposed(
    work: Workspace, blocks: list, begins: bool, sums: list, source: Tensor, widths: list, owner: int
) -> None:
    """The products with some blocks of a column tile into its sums; the first one begins them, if they are
    the tile's first blocks.
    """
    cols = sums[0].shape[0]
    # Blocks outside, tokens inside: the stream hands out a block once, and every piece of the tokens meets it
    # then.
    for i in range(len(blocks)):
        k, first, rows, kind = blocks[i]
        block, at = block_of(work, kind, owner, k, cols)
        end = first + rows
        for j in range(len(widths)):
            start, width = widths[j]
            # `first` is 0 or HALF, where an operand of at most 64 partitions may begin.
            weights, moving = block[first:end, at : at + cols], source[first:end, k, start : start + width]
            matmul(sums[j], weights, moving, begins and i == 0)


def is_source_itself(matrix: Matrix, n: int) -> bool:
    """Whether column tile `n` of (source W) is a row tile of source: the pivots of an output-pivoted
    projection.
    """
    blocks = matrix.blocks(n)
    return len(blocks) == 1 and blocks[0][3] == IDENTITY


def column_tile(work: Workspace, matrix: Matrix, n: int, source: Tensor, widths: list, owner: int) -> list:
    """As `transposed_tile`, but without arithmetic where the result is there already."""
    if not is_source_itself(matrix, n):
        return transposed_tile(work, matrix, n, source, widths, owner)
    k, _first, rows, _kind = matrix.blocks(n)[0]
    tiles = []
    for j in range(len(widths)):
        start, width = widths[j]
        tiles.append(source[0:rows, k, start : start + width])
    return tiles


def transposed_product(
    work: Workspace, matrix: Matrix, first: int, source: Tensor, dst: Tensor, widths: list
) -> None:
    """dst `[128, column tiles, tokens]` = (source W)^T from column tile `first` on, rounded once to its
    element type.
    """
    for n in range(first, matrix.col_tiles()):
        sums = transposed_tile(work, matrix, n, source, widths, -1)
        evict_transposed_tile(work, matrix, n, source, dst, sums, widths)


def evict_transposed_tile(
    work: Workspace, matrix: Matrix, n: int, source: Tensor, dst: Tensor, sums: list, widths: list
) -> None:
    """Column tile `n` out of PSUM into its place in dst."""
    cols = matrix.tile_width(n)
    for j in range(len(widths)):
        start, width = widths[j]
        there = dst[0:cols, n, start : start + width]
        added = matrix.added_rows(n)
        # Of int8 down: rows behind the pivots cannot be evicted alone, since an access may begin at few
        # partitions. So all are, and the pivots' are written again, with what is added to them.
        if added < cols:
            evict(work, matrix, n, there, sums[j], nl.copy)
        if added > 0:
            nisa.scalar_tensor_tensor(
                dst=dst[0:added, n, start : start + width],
                data=sums[j][0:added, :],
                op0=nl.multiply,
                operand0=work.scales.of(matrix, n, added),
                op1=nl.add,
                operand1=source[0:added, matrix.added_tile(n), start : start + width],
            )
        if matrix.is_kept_twice(n):
            nisa.tensor_copy(dst=dst[HALF : HALF + cols, n, start : start + width], src=there)


def natural_tile(work: Workspace, matrix: Matrix, n: int, source: Tensor, tiles: list) -> list:
    """Column tile `n` of (source W): PSUM tiles [size, cols], one for each (start, size) of `tiles`, each of
    at most 128 tokens.
    """
    cols = matrix.tile_width(n)
    blocks = matrix.blocks(n)
    sums = []
    for j in range(len(tiles)):
        sums.append(work.banks.tile((tiles[j][1], cols)))
    # As in `add_transposed`, with the operands exchanged: activations are stationary, weights move.
    for i in range(len(blocks)):
        k, first, rows, kind = blocks[i]
        block, at = block_of(work, kind, 2, k, cols)
        end = first + rows
        for j in range(len(tiles)):
            start, size = tiles[j]
            matmul(
                sums[j], source[first:end, k, start : start + size], block[first:end, at : at + cols], i == 0
            )
    return sums
