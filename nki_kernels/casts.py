"""How ScalarE and VectorE share the casting of int8 weights: so that both are done with a block of tokens at
the same time, whatever else they have to do for it.

Both cast one element a cycle and partition, at 1.4 and 1.12 GHz on trn1 (documented; no faster mode there).
"""

from __future__ import annotations

import dataclasses
import functools

from nki_kernels.layout import Layout, stored_cols
from nki_kernels.targets import PMAX, Target
from nki_kernels.tiling import MOVING_COLS, Matrix, pieces, tile_count

MIN_CYCLES = 64  # of any instruction


@dataclasses.dataclass(frozen=True)
class Block:
    """What decides the work of the engines: a block of tokens, and what is done to it besides products."""

    tokens: int
    moving_tokens: int  # width of a moving tile
    norm: bool
    residual: bool


def scalar_shares(layout: Layout, block: Block, target: Target) -> tuple[int, int]:
    """Of 128 columns, how many ScalarE casts: in the transposed products, and in the natural last one."""
    natural, last = natural_cols(layout), natural_stored(layout)
    transposed = _even(
        layout.stored_cols - last, _scalar_cycles(layout, block), _vector_cycles(layout, block), target
    )
    # Passes over natural output (cost/costs.py): one to scale it, with an operand in PSUM; two to add the
    # residual, with both in SBUF.
    vector = tile_count(block.tokens) * natural * (3 if block.residual else 1)
    return transposed, _even(last, 0, vector, target)


def natural_cols(layout: Layout) -> int:
    """Columns of natural output."""
    last = layout.down_second
    return last.cols if last is not None and last.tile_cols == MOVING_COLS else 0


@functools.lru_cache(maxsize=64)
def natural_stored(layout: Layout) -> int:
    """Packed columns of the natural last product."""
    last = layout.down_second
    if last is None or not natural_cols(layout):
        return 0
    return sum(stored_cols(last, n) for n in range(last.col_tiles()))


def _even(columns: int, scalar_cycles: int, vector_cycles: int, target: Target) -> int:
    """ScalarE's share of `columns` with which both engines end together, besides their other cycles."""
    if columns == 0:
        return PMAX // 2
    scalar, vector = 1 / target.scalar_ghz, 1 / target.vector_ghz
    # From share columns scalar + scalar_cycles scalar = (1 - share) columns vector + vector_cycles vector, in
    # ns.
    share = (columns * vector + vector_cycles * vector - scalar_cycles * scalar) / (
        columns * (scalar + vector)
    )
    return round(PMAX * min(1.0, max(0.0, share)))


def _tile_cycles(tokens: int, moving: int) -> int:
    """One pass over a column tile of a transposed product."""
    return sum(max(MIN_CYCLES, width) for _, width in pieces(tokens, moving))


def _tiles(matrix: Matrix | None) -> int:
    return 0 if matrix is None else matrix.col_tiles()


def _adds_pivots(layout: Layout) -> bool:
    return layout.down_first is not None and layout.down_first.adds_pivots()


def _scalar_cycles(layout: Layout, block: Block) -> int:
    """SiLU, z on its way out of PSUM, and x on its way through the transpose."""
    tiles = _tiles(layout.gate_second) + _tiles(layout.gate_first) + _tiles(layout.up_first)
    tiles += 0 if _adds_pivots(layout) else _tiles(layout.down_first)
    norm_cycles = tile_count(block.tokens) * layout.hidden if block.norm else 0
    x_cycles = tile_count(layout.hidden) * block.tokens + norm_cycles
    return tiles * _tile_cycles(block.tokens, block.moving_tokens) + x_cycles


def _vector_cycles(layout: Layout, block: Block) -> int:
    """Products of gate and up, pivots added to z."""
    # Two passes each: with int8 weights both are scalar_tensor_tensor.
    tiles = 2 * _tiles(layout.gate_second) + (2 * _tiles(layout.down_first) if _adds_pivots(layout) else 0)
    return tiles * _tile_cycles(block.tokens, block.moving_tokens)
