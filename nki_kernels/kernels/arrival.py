"""The first product of a launch, begun before all of its operand is there."""

from __future__ import annotations

from typing import Any

from nki_kernels.kernels.load import load_transposed
from nki_kernels.kernels.products import (
    add_transposed,
    evict_transposed_tile,
    transposed_banks,
    transposed_product,
)
from nki_kernels.kernels.workspace import Workspace
from nki_kernels.targets import PMAX
from nki_kernels.tiling import pieces

Tensor = Any


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
