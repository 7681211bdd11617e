"""How ScalarE and VectorE share the casting of int8 weights: so that both are done with a block of tokens at
the same time, whatever else they have to do for it.

Both cast one element a cycle and partition, at 1.4 and 1.12 GHz on trn1 (documented; no faster mode there).
"""

from __future__ import annotations

from nki_kernels.layout import Layout
from nki_kernels.targets import PMAX, Target
from nki_kernels.tiling import MOVING_COLS, Matrix, pieces, tile_count

MIN_CYCLES = 64  # of any instruction
# What the engines of later generations do differently does not matter here: a share is never wrong, only late.


def scalar_share(layout: Layout, tokens: int, moving: int, norm: bool, residual: bool, target: Target) -> int:
    """Of 128 columns, how many ScalarE casts; `moving` is the width of a moving tile of `tokens`."""
    scalar = _scalar_cycles(layout, tokens, moving, norm) / target.scalar_ghz
    vector = _vector_cycles(layout, tokens, moving, residual) / target.vector_ghz
    columns = layout.stored_cols
    even = (columns / target.vector_ghz + vector - scalar) / (
        columns / target.scalar_ghz + columns / target.vector_ghz
    )
    return round(PMAX * min(1.0, max(0.0, even)))


def _tile_cycles(tokens: int, moving: int) -> int:
    """One pass over a column tile of a transposed product."""
    return sum(max(MIN_CYCLES, width) for _, width in pieces(tokens, moving))


def _tiles(matrix: Matrix | None) -> int:
    return 0 if matrix is None else matrix.col_tiles()


def _scalar_cycles(layout: Layout, tokens: int, moving: int, norm: bool) -> int:
    """SiLU, z on its way out of PSUM, and x on its way through the transpose."""
    added = layout.down_first is not None and layout.down_first.adds_pivots()
    tiles = _tiles(layout.gate_second) + _tiles(layout.gate_first) + _tiles(layout.up_first)
    tiles += 0 if added else _tiles(layout.down_first)
    x_cycles = tile_count(layout.hidden) * tokens + (tile_count(tokens) * layout.hidden if norm else 0)
    return tiles * _tile_cycles(tokens, moving) + x_cycles


def _vector_cycles(layout: Layout, tokens: int, moving: int, residual: bool) -> int:
    """Products of gate and up, pivots added to z, natural output."""
    added = layout.down_first is not None and layout.down_first.adds_pivots()
    tiles = 2 * _tiles(layout.gate_second) + (2 * _tiles(layout.down_first) if added else 0)
    last = layout.down_second
    natural = last.cols if last is not None and last.tile_cols == MOVING_COLS else 0
    return tiles * _tile_cycles(tokens, moving) + tile_count(tokens) * natural * (3 if residual else 1)
