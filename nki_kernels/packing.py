"""Weights into the layout that kernels stream, once and offline, and back again, exactly.

Works on numpy arrays and torch tensors alike: it only slices, transposes views and assigns. Pass `out` to
choose the container (torch needs it; numpy allocates by itself). bf16 torch weights can also travel as numpy:
`t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)`.

`weights` maps matrix names (see layout.STAGES) to what FORMAT.md stores for them, in Linear layout `[out,
in]`; `factors_by_name` makes that mapping from a layer's projections. The identity of a compact factor is not
part of the input and not returned by `unpack`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nki_kernels.layout import MATRICES, Layout, scale_cols
from nki_kernels.targets import PMAX
from nki_kernels.tiling import Block, Matrix, tile_count

Array = Any  # numpy.ndarray or torch.Tensor
# (projection, suffix in FORMAT.md) -> matrix of a layout.
MATRIX_OF = {
    ("gate_proj", "weight"): "gate_second",
    ("gate_proj", "u.weight"): "gate_first",
    ("gate_proj", "v.weight"): "gate_second",
    ("gate_proj", "c.weight"): "gate_second",
    ("up_proj", "weight"): "up_second",
    ("up_proj", "u.weight"): "up_first",
    ("up_proj", "v.weight"): "up_second",
    ("up_proj", "c.weight"): "up_second",
    ("down_proj", "weight"): "down_second",
    ("down_proj", "u.weight"): "down_first",
    ("down_proj", "c.weight"): "down_first",
    ("down_proj", "v.weight"): "down_second",
}


def factors_by_name(projections: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """`{"gate_proj": {"u.weight": ..., "c.weight": ...}, ...}` -> matrix name -> tensor `[out, in]`."""
    return {
        MATRIX_OF[projection, suffix]: tensor
        for projection, tensors in projections.items()
        for suffix, tensor in tensors.items()
    }


def stored_shape(matrix: Matrix) -> tuple[int, int]:
    """`[out, in]` of the tensor that a matrix is packed from: without the identity of a compact factor, and
    without the zeros of a block-diagonal one, whose blocks follow one another along `out`.
    """
    out, rows = matrix.cols, matrix.group_rows() if is_block_diagonal(matrix) else matrix.rows
    if matrix.pivot_axis == "cols":
        return out - matrix.col_groups * matrix.pivots, rows
    if matrix.pivot_axis == "rows":
        return out, rows - matrix.pivots
    return out, rows


def is_block_diagonal(matrix: Matrix) -> bool:
    """Whether rows and columns are both grouped."""
    return matrix.row_groups > 1 and matrix.col_groups > 1


def pack(layout: Layout, weights: Mapping[str, Array], out: Array | None = None) -> Array:
    """The packed array `[128, C]`; rows beyond the last row tile of a matrix are zero. A dense 3 -> 2 is its
    transpose in the first two columns, and the identity of 128 behind:

    >>> from nki_kernels.layout import DENSE, chain_layout
    >>> packed = pack(chain_layout(3, 2, DENSE), {"down_second": np.array([[1, 2, 3], [4, 5, 6]])})
    >>> packed.shape, packed[:4, :3].tolist()
    ((128, 130), [[1, 4, 1], [2, 5, 0], [3, 6, 0], [0, 0, 0]])

    `out`, if given, must be `[128, layout.packed_cols]` and all zeros. Raises ValueError for a tensor of
    another shape than the layout's.
    """
    _check_shapes(layout, weights)
    if out is None:
        dtype = next(iter(weights.values())).dtype
        out = np.zeros((PMAX, layout.packed_cols), dtype)
    for name, matrix, n, block, offset in layout.blocks():
        # A SHARED block comes to the columns of a stored one, in the other half of the partitions.
        _copy_block(matrix, n, block, weights[name].T, out, offset, packing=True)
        if not matrix.adds_pivots():
            _write_identity(matrix, n, block, out, offset)
    for i in range(PMAX):  # the operand of transposes, which TensorE does as products with the identity
        out[i, layout.stored_cols + i] = 1
    return out


def unpack(layout: Layout, packed: Array, out: dict[str, Array] | None = None) -> dict[str, Array]:
    """The exact inverse of `pack`: matrix name -> tensor `[out, in]`. `out`, if given, is filled (torch needs
    it).
    """
    if out is None:
        named = [(name, layout.matrix(name)) for name in MATRICES]
        out = {
            name: np.zeros(stored_shape(matrix), packed.dtype) for name, matrix in named if matrix is not None
        }
    for name, matrix, n, block, offset in layout.blocks():
        _copy_block(matrix, n, block, out[name].T, packed, offset, packing=False)
    return out


def pack_scales(layout: Layout, scales: Mapping[str, Array], out: Array | None = None) -> Array:
    """The scales of an int8 layout, `[128, layout.scale_cols]` fp32, from matrix name -> scales `[out]` of
    what `pack` is given.

    Element p of column scale_at + n belongs to column 128 n + p of the matrix. Pivots of gate and up are z as
    it is: their scale is 1. `out`, if given, must be ones. Raises ValueError for scales of another length.
    """
    if out is None:
        out = np.ones((PMAX, layout.scale_cols), np.float32)
    for name in MATRICES:
        matrix = layout.matrix(name)
        if matrix is None:
            continue
        expected, found = stored_shape(matrix)[0], tuple(scales[name].shape) if name in scales else None
        if found != (expected,):
            raise ValueError(
                f"{name}: expected {expected} scales, found {found}; pack with the layout of these weights."
            )
        _copy_scales(matrix, scales[name], out)
    return out


def _copy_scales(matrix: Matrix, scales: Array, out: Array) -> None:
    """Group by group, behind the pivots of a matrix that has them among its columns."""
    pivots = matrix.pivots if matrix.pivot_axis == "cols" else 0
    cols = matrix.group_cols()
    # A column of 128 scales for each tile of a group; groups begin with a column of their own.
    tiles = scale_cols(matrix) // matrix.col_groups
    for group in range(matrix.col_groups):
        mine = scales[group * (cols - pivots) : (group + 1) * (cols - pivots)]
        # Tiles of pivots alone keep their ones; a mixed tile has ones for its first columns.
        for tile in range(pivots // PMAX, tiles):
            start, end = max(pivots, tile * PMAX), min(cols, (tile + 1) * PMAX)
            where = slice(start - tile * PMAX, end - tile * PMAX)
            out[where, matrix.scale_at + group * tiles + tile] = mine[start - pivots : end - pivots]


def pack_norm(weight: Array, out: Array | None = None) -> Array:
    """An RMSNorm weight `[H]` as `[128, ceil(H / 128)]` fp32: element p, k belongs to channel 128 k + p."""
    size = weight.shape[0]
    if out is None:
        out = np.zeros((PMAX, tile_count(size)), np.float32)
    for k in range(tile_count(size)):
        out[: min(PMAX, size - k * PMAX), k] = weight[k * PMAX : (k + 1) * PMAX]
    return out


def _check_shapes(layout: Layout, weights: Mapping[str, Array]) -> None:
    for name in MATRICES:
        matrix = layout.matrix(name)
        expected = None if matrix is None else stored_shape(matrix)
        found = tuple(weights[name].shape) if name in weights else None
        if expected != found:
            raise ValueError(
                f"{name}: expected a tensor of shape {expected}, found {found}; pack with the layout of "
                "these weights."
            )


def _copy_block(
    matrix: Matrix, n: int, block: Block, weight: Array, packed: Array, offset: int, packing: bool
) -> None:
    """Copy what a block of column tile `n` has outside the identity; `weight` is the stored tensor as `[in,
    out]`.
    """
    k, first, rows, _ = block
    row, col = _within_group(matrix, k, n)
    skip_rows = min(rows, max(0, matrix.pivots - row)) if matrix.pivot_axis == "rows" else 0
    width = matrix.tile_width(n)
    skip_cols = min(width, max(0, matrix.pivots - col)) if matrix.pivot_axis == "cols" else 0
    if skip_rows == rows or skip_cols == width:
        return
    # Stored are the groups one after another, each without its pivots.
    pivot_rows = matrix.pivots if matrix.pivot_axis == "rows" else 0
    pivot_cols = matrix.pivots if matrix.pivot_axis == "cols" else 0
    # Blocks of a block-diagonal tensor are stacked along `out` (`stored_shape`): each begins at row 0 of it.
    row_group = 0 if is_block_diagonal(matrix) else k // matrix.group_row_tiles()
    first_row = row_group * matrix.group_rows() + row + skip_rows - pivot_rows
    col_group = n // matrix.group_col_tiles()
    first_col = col_group * (matrix.group_cols() - pivot_cols) + col + skip_cols - pivot_cols
    here = (slice(first + skip_rows, first + rows), slice(offset + skip_cols, offset + width))
    there = (slice(first_row, first_row + rows - skip_rows), slice(first_col, first_col + width - skip_cols))
    if packing:
        packed[here] = weight[there]
    else:
        weight[there] = packed[here]


def _within_group(matrix: Matrix, k: int, n: int) -> tuple[int, int]:
    """First row and column of block (k, n), counted from those of its group."""
    return k % matrix.group_row_tiles() * PMAX, n % matrix.group_col_tiles() * matrix.tile_cols


def _write_identity(matrix: Matrix, n: int, block: Block, out: Array, offset: int) -> None:
    """The ones of a stored block that overlaps the identity of a compact factor.

    In a mixed "rows" block (some pivots, some not) the pivot rows hold their identity too: the kernel sums
    the block as it is.
    """
    k, first, rows, _ = block
    by_column = matrix.pivot_axis == "cols"
    row, col = _within_group(matrix, k, n)
    start, count = (col, matrix.tile_width(n)) if by_column else (row, rows)
    for i in range(start, min(matrix.pivots, start + count)):
        # W[shift + i, i] = 1 by columns, W[i, shift + i] = 1 by rows (`tiling.Matrix`), counted from this
        # block's corner.
        r, c = (matrix.shift + i - row, i - col) if by_column else (i - row, matrix.shift + i - col)
        if 0 <= r < rows and 0 <= c < matrix.tile_width(n):
            out[first + r, offset + c] = 1
