"""How one weight matrix is cut into tiles. Pure arithmetic: the same object rules the packing, the plan and
the kernel.

Kernels take these classes as arguments, so they keep to the words that the compilers before NKI 0.7 know.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nki_kernels.backend import nl
from nki_kernels.targets import PMAX

STATIONARY_COLS = (
    128  # a matrix that serves as stationary operand gives transposed results, this many columns at a time
)
MOVING_COLS = 512  # one that serves as moving operand gives natural results


def tile_count(size: int, tile: int = PMAX) -> int:
    """ceil(size / tile)."""
    return -(-size // tile)


# (k, rows, stored): rows [128 k, 128 k + rows) of a column tile. An identity is not stored: nobody needs to
# read one.
Block = tuple[int, int, bool]


@dataclasses.dataclass(frozen=True)
class Matrix(nl.NKIObject):
    """The right operand W `[rows, cols]` of a product x W, cut into row tiles of 128 and column tiles of
    `tile_cols`.

    A `compact` factor has an identity inside: with `pivot_axis` "cols", W[shift + i, i] = 1 for i < pivots
    and those columns are otherwise zero; with "rows", W[i, shift + i] = 1 for i < pivots and those rows are
    otherwise zero. Blocks that are zero do not exist, and blocks that are exactly an identity are not stored.
    """

    rows: int
    cols: int
    tile_cols: int = STATIONARY_COLS
    pivot_axis: str = ""
    pivots: int = 0
    shift: int = 0

    def row_tiles(self) -> int:
        return tile_count(self.rows, PMAX)

    def col_tiles(self) -> int:
        return tile_count(self.cols, self.tile_cols)

    def tile_width(self, n: int) -> int:
        """Columns of column tile `n`."""
        return min(self.tile_cols, self.cols - n * self.tile_cols)

    def tile_rows(self, k: int) -> int:
        """Rows of row tile `k`."""
        return min(PMAX, self.rows - k * PMAX)

    def blocks(self, n: int) -> list[Block]:
        """The blocks of column tile `n`, in the order in which they are stored and summed; at least one, if
        only of zeros.
        """
        found = []
        for k in range(self.row_tiles()):
            kind = self._kind(k, n)
            if kind == "full":
                found.append((k, self.tile_rows(k), True))
            if kind == "identity":
                found.append((k, min(self.tile_rows(k), self.tile_width(n)), False))
        if len(found) == 0:
            found.append((0, self.tile_rows(0), True))
        return found

    def _kind(self, k: int, n: int) -> str:
        """What is in block (k, n): "full", "zero" or "identity"."""
        row, col = k * PMAX, n * self.tile_cols
        rows, cols = self.tile_rows(k), self.tile_width(n)
        if self.pivot_axis == "cols" and col + cols <= self.pivots:
            first, count, at, height = self.shift + col, cols, row, rows
        elif self.pivot_axis == "rows" and row + rows <= self.pivots:
            first, count, at, height = self.shift + row, rows, col, cols
        else:
            return "full"
        if first >= at + height or first + count <= at:
            return "zero"
        return "identity" if first == at and count <= height else "full"


@dataclasses.dataclass(frozen=True)
class Products(nl.NKIObject):
    """The `Matrix` of every product of a launch, by name; None for one that it does not compute."""

    gate_first: Any = None
    up_first: Any = None
    gate_second: Any = None
    up_second: Any = None
    down_first: Any = None
    down_second: Any = None


def pieces(size: int, step: int) -> list[tuple[int, int]]:
    """(start, length) of consecutive pieces, the last one ragged: pieces(300, 128) = [(0, 128), (128, 128),
    (256, 44)].
    """
    found = []
    for i in range(tile_count(size, step)):
        found.append((i * step, min(step, size - i * step)))
    return found
