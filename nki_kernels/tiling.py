"""How one weight matrix is cut into tiles. Pure arithmetic: the same object rules the packing, the plan and
the kernel.

Kernels take these classes as arguments, so they keep to the words that the compilers before NKI 0.7 know.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nki_kernels.backend import nl
from nki_kernels.targets import PMAX

# A matrix that serves as stationary operand gives transposed results, this many columns at a time.
STATIONARY_COLS = 128
MOVING_COLS = 512  # one that serves as moving operand gives natural results


def tile_count(size: int, tile: int = PMAX) -> int:
    """ceil(size / tile)."""
    return -(-size // tile)


# (k, first, rows, kind): partitions [first, first + rows) of row tile k. STORED blocks follow one another in
# the packed weights; one that is SHARED lies in the block of the column tile before it; an IDENTITY is not
# stored.
Block = tuple[int, int, int, int]
STORED, SHARED, IDENTITY = 0, 1, 2
HALF = PMAX // 2


@dataclasses.dataclass(frozen=True)
class Matrix(nl.NKIObject):
    """The right operand W `[rows, cols]` of a product x W, cut into row tiles of 128 and column tiles of
    `tile_cols`.

    Groups: rows and columns fall into `row_groups` and `col_groups` equal parts, each cut into tiles by
    itself. Where both are more than one, W is block-diagonal.

    A `compact` factor has an identity inside each group: with `pivot_axis` "cols", W[shift + i, i] = 1 for i
    < pivots and those columns are otherwise zero; with "rows", W[i, shift + i] = 1 for i < pivots and those
    rows are otherwise zero. Blocks that are zero do not exist, and blocks that are exactly an identity are
    not stored.

    `halves`: the last row tile of a group has at most 64 rows, and two column tiles share a block for it, one
    in either half of the partitions. `twice`: the last column tile of a group has at most 64 columns, and its
    product is kept in both halves, for the next matrix to find.

    `scale_at`: of an int8 matrix, the first of its columns in the packed scales, one for every 128 of its
    own; -1 where there are none. The identity of its pivot rows is not in the blocks: the scale would spoil
    it.
    """

    rows: int
    cols: int
    tile_cols: int = STATIONARY_COLS
    pivot_axis: str = ""
    pivots: int = 0
    shift: int = 0
    row_groups: int = 1
    col_groups: int = 1
    halves: bool = False
    twice: bool = False
    scale_at: int = -1

    def group_rows(self) -> int:
        return self.rows // self.row_groups

    def group_cols(self) -> int:
        return self.cols // self.col_groups

    def group_row_tiles(self) -> int:
        return tile_count(self.group_rows(), PMAX)

    def group_col_tiles(self) -> int:
        return tile_count(self.group_cols(), self.tile_cols)

    def row_tiles(self) -> int:
        return self.row_groups * self.group_row_tiles()

    def col_tiles(self) -> int:
        return self.col_groups * self.group_col_tiles()

    def tile_width(self, n: int) -> int:
        """Columns of column tile `n`."""
        # Column tiles are numbered through all groups; `col` counts from the beginning of its own.
        col = n % self.group_col_tiles() * self.tile_cols
        return min(self.tile_cols, self.group_cols() - col)

    def tile_rows(self, k: int) -> int:
        """Rows of row tile `k`."""
        return min(PMAX, self.group_rows() - k % self.group_row_tiles() * PMAX)

    def adds_pivots(self) -> bool:
        """Whether pivots are added to the scaled product, and not in the sum."""
        return self.scale_at >= 0 and self.pivot_axis == "rows"

    def added_rows(self, n: int) -> int:
        """How many rows of the source's tile of the same number are added to column tile `n`."""
        if not self.adds_pivots():
            return 0
        left = self.pivots - n % self.group_col_tiles() * self.tile_cols
        return max(0, min(left, self.tile_width(n)))

    def added_tile(self, n: int) -> int:
        """And which row tile of the source that is."""
        return n // self.group_col_tiles() * self.group_row_tiles() + n % self.group_col_tiles()

    def is_kept_twice(self, n: int) -> bool:
        """Whether column tile `n` is the last, ragged one of a group that is kept in both halves."""
        return self.twice and n % self.group_col_tiles() == self.group_col_tiles() - 1

    def blocks(self, n: int) -> list[Block]:
        """The blocks of column tile `n`, in the order in which they are stored and summed; at least one, if
        only of zeros. Of 192 rows and 320 columns, 128 of them pivots: tile 0 is row tile 0 as it is
        (IDENTITY); tiles 1 and 2 share a block for the 64 rows left, each in a half of the partitions.

        >>> Matrix(192, 320, pivot_axis="cols", pivots=128, halves=True).blocks(0)
        [(0, 0, 128, 2)]
        >>> [Matrix(192, 320, pivot_axis="cols", pivots=128, halves=True).blocks(n) for n in (1, 2)]
        [[(0, 0, 128, 0), (1, 0, 64, 0)], [(0, 0, 128, 0), (1, 64, 64, 1)]]
        """
        first, end = 0, self.row_tiles()
        if self.row_groups > 1 and self.col_groups > 1:
            # Block-diagonal: only the row tiles of the column tile's own group.
            first = n // self.group_col_tiles() * self.group_row_tiles()
            end = first + self.group_row_tiles()
        found = []
        shared = []
        last = []
        for k in range(first, end):
            kind = self._kind(k % self.group_row_tiles(), n % self.group_col_tiles())
            rows = self.tile_rows(k)
            if kind == "identity" and not self.adds_pivots():
                found.append((k, 0, min(rows, self.tile_width(n)), IDENTITY))
            elif kind == "full" and not self._is_tail(k):
                found.append((k, 0, rows, STORED))
            elif kind == "full" and self._is_second_half(n):
                # In the other half of the block that the column tile before has; the rows of z are there
                # twice.
                shared.append((k, HALF, rows, SHARED))
            elif kind == "full":
                last.append((k, 0, rows, STORED))
        # Of several groups, the blocks that two column tiles share end the first and begin the second: near
        # enough to be on chip still.
        found = shared + found + last if self.row_groups > 1 else found + last + shared
        if len(found) == 0:
            # A column tile of zeros still needs a product: its sum has to begin.
            found.append((first, 0, self.tile_rows(first), STORED))
        return found

    def _is_tail(self, k: int) -> bool:
        """Whether row tile `k` is the last one of a group, and shared by two column tiles."""
        return self.halves and k % self.group_row_tiles() == self.group_row_tiles() - 1

    def _is_second_half(self, n: int) -> bool:
        """Whether column tile `n` is the second of the two that share blocks."""
        # Column tiles of pivots alone come first, and have no stored block.
        before = self.pivots // self.tile_cols if self.pivot_axis == "cols" else 0
        return (n % self.group_col_tiles() - before) % 2 == 1

    def _kind(self, k: int, n: int) -> str:
        """What is in block (k, n) of a group: "full", "zero" or "identity"."""
        row, col = k * PMAX, n * self.tile_cols
        rows, cols = self.tile_rows(k), self.tile_width(n)
        # A tile of pivots alone has nothing but ones of the identity: `first`, on the other axis, is where
        # they begin, `count` how many they are; the block reaches from `at` over `height` there. Any other
        # tile has numbers.
        if self.pivot_axis == "cols" and col + cols <= self.pivots:
            first, count, at, height = self.shift + col, cols, row, rows
        elif self.pivot_axis == "rows" and row + rows <= self.pivots:
            first, count, at, height = self.shift + row, rows, col, cols
        else:
            return "full"
        if first >= at + height or first + count <= at:
            return "zero"
        # Ones that begin elsewhere in the block, or go on in the next, are stored: an IDENTITY block is read
        # from its first row on.
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
