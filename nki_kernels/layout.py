"""Which products a launch computes, and in which order their weights lie in the one packed array that it
streams.

The packed array is `[128, C]`: partition p of a row tile is row p, and the blocks follow one another along
the columns in exactly the order in which the kernel needs them. So every DMA reads one long run per
partition, however it is cut, and nothing is transposed at run time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from nki_kernels.targets import PMAX
from nki_kernels.tiling import (
    HALF,
    IDENTITY,
    MOVING_COLS,
    SHARED,
    STATIONARY_COLS,
    STORED,
    Block,
    Matrix,
    Products,
    tile_count,
)

# Stages run one after another; matrices that share a stage are interleaved column tile by column tile.
STAGES = (("gate_first",), ("up_first",), ("gate_second", "up_second"), ("down_first",), ("down_second",))
MATRICES = tuple(name for names in STAGES for name in names)
FORMS = ("dense", "uv", "compact")


@dataclasses.dataclass(frozen=True)
class Projection:
    """One projection as one core sees it.

    `rank`: length of the whole z of a group (R, or tp * slots under tensor parallelism); `slots`: length of
    the share of z that this core computes (gate, up) or consumes (down); `pivots`: how many of the core's
    intermediate channels are pivots; `shift`: where its share of z begins; `groups` of equal channels follow
    one another.
    """

    form: str
    rank: int = 0
    slots: int = 0
    pivots: int = 0
    shift: int = 0
    groups: int = 1

    @classmethod
    def whole(cls, form: str, rank: int | None = None, groups: int = 1) -> Projection:
        """The unsharded projection of FORMAT.md: `groups` of them, each of `rank`, side by side."""
        if form not in FORMS or (form == "dense") == bool(rank):
            raise ValueError(
                f"projection: expected dense without a rank, or uv or compact with one, found {form!r} with "
                f"rank {rank}."
            )
        size = rank or 0
        return cls(form, size, size, size if form == "compact" else 0, 0, 1 if form == "dense" else groups)

    def in_python(self) -> Projection:
        """The same in Python's numbers, wherever they come from: in a plan numpy's become None before nki
        0.7.
        """
        numbers: dict[str, Any] = {name: int(n) for name, n in vars(self).items() if name != "form"}
        return dataclasses.replace(self, **numbers)

    @property
    def is_whole(self) -> bool:
        """Whether the core makes and takes the same z, which then never leaves the chip."""
        return self.slots == self.rank

    @property
    def halves(self) -> bool:
        """Whether the last row tile of z fits half the partitions, so that blocks for it can be shared."""
        # A z that cores share out (slots < rank) leaves the chip, and collectives know nothing of halves.
        return self.is_whole and 0 < self.rank % PMAX <= HALF


DENSE = Projection.whole("dense")


def stored_cols(matrix: Matrix, n: int) -> int:
    """Packed columns that column tile `n` takes."""
    return matrix.tile_width(n) * sum(kind == STORED for *_, kind in matrix.blocks(n))


def has_identity(matrix: Matrix) -> bool:
    """Whether a product with it reads an identity from chip."""
    return any(kind == IDENTITY for n in range(matrix.col_tiles()) for *_, kind in matrix.blocks(n))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The matrices of one launch by name (see STAGES); those that it does not use are None.

    `external_z` names the projections ("gate", "up") whose z the launch is given, because another launch and
    a collective made it.
    """

    gate_first: Matrix | None = None
    up_first: Matrix | None = None
    gate_second: Matrix | None = None
    up_second: Matrix | None = None
    down_first: Matrix | None = None
    down_second: Matrix | None = None
    external_z: tuple[str, ...] = ()

    @property
    def products(self) -> Products:
        """The matrices alone, as kernels take them."""
        return Products(
            self.gate_first,
            self.up_first,
            self.gate_second,
            self.up_second,
            self.down_first,
            self.down_second,
        )

    def matrix(self, name: str) -> Matrix | None:
        found: Matrix | None = getattr(self, name)
        return found

    def tiles(self) -> Iterator[tuple[str, Matrix, int, int]]:
        """(name, matrix, column tile, first packed column) in packed order."""
        offset = 0
        for names in STAGES:
            present = [(name, self.matrix(name)) for name in names]
            for n in range(max((m.col_tiles() for _, m in present if m), default=0)):
                for name, matrix in present:
                    if matrix is not None and n < matrix.col_tiles():
                        yield name, matrix, n, offset
                        offset += stored_cols(matrix, n)

    def blocks(self) -> Iterator[tuple[str, Matrix, int, Block, int]]:
        """Every block that is somewhere in the packed array: (name, matrix, column tile, block, first packed
        column), the stored ones in packed order.
        """
        shared: dict[tuple[str, int], int] = {}
        for name, matrix, n, first in self.tiles():
            offset = first
            for block in matrix.blocks(n):
                if block[3] == SHARED:
                    yield name, matrix, n, block, shared[name, block[0]]
                if block[3] == STORED:
                    yield name, matrix, n, block, offset
                    # The latest of this row tile: a SHARED block of the next column tile lies in it.
                    shared[name, block[0]] = offset
                    offset += matrix.tile_width(n)

    def has_z(self, projection: str) -> bool:
        """Whether the second matrix of "gate", "up" or "down" starts from a z, and not from x or h."""
        return self.matrix(f"{projection}_first") is not None or projection in self.external_z

    @functools.cached_property
    def hidden(self) -> int:
        """H: the width of x, or 0 if no product of the launch starts from x."""
        for matrix in (self.gate_first, self.up_first):
            if matrix is not None:
                return matrix.rows
        for projection in ("gate", "up"):
            matrix = self.matrix(f"{projection}_second")
            if matrix is not None and not self.has_z(projection):
                return matrix.rows
        return 0

    @functools.cached_property
    def intermediate(self) -> int:
        """I: the width of h, or 0 if the launch has none."""
        if self.gate_second is not None:
            return self.gate_second.cols
        down = self.down_first or self.down_second
        return 0 if down is None else down.rows

    @functools.cached_property
    def h_tiles(self) -> int:
        """Row tiles of h."""
        if self.gate_second is not None:
            return self.gate_second.col_tiles()
        down = self.down_first or self.down_second
        return 0 if down is None else down.row_tiles()

    @functools.cached_property
    def x_outlives_firsts(self) -> bool:
        """Whether a second product starts from x."""
        return any(self.matrix(f"{p}_second") is not None and not self.has_z(p) for p in ("gate", "up"))

    @functools.cached_property
    def sums_identity(self) -> bool:
        """Whether any block of the launch is an identity that is not stored."""
        return any(has_identity(matrix) for matrix in map(self.matrix, MATRICES) if matrix is not None)

    def z_tiles(self, projection: str) -> int:
        """Row tiles of the z of "gate", "up" or "down" that the launch keeps on chip."""
        first, second = self.matrix(f"{projection}_first"), self.matrix(f"{projection}_second")
        if first is not None:
            return first.col_tiles()
        return second.row_tiles() if second is not None and self.has_z(projection) else 0

    @functools.cached_property
    def stored_cols(self) -> int:
        """Columns of the packed array that hold weights."""
        return sum(stored_cols(matrix, n) for _, matrix, n, _ in self.tiles())

    @functools.cached_property
    def is_int8(self) -> bool:
        """Whether the packed array is int8, with scales beside it."""
        return any(matrix.scale_at >= 0 for matrix in map(self.matrix, MATRICES) if matrix is not None)

    @functools.cached_property
    def scale_cols(self) -> int:
        """Columns of the packed scales `[128, S]` fp32; 0 where there are none."""
        found = [
            matrix for matrix in map(self.matrix, MATRICES) if matrix is not None and matrix.scale_at >= 0
        ]
        return max((matrix.scale_at + scale_cols(matrix) for matrix in found), default=0)

    @property
    def packed_cols(self) -> int:
        """C of the packed array `[128, C]`: the weights, and a 128 x 128 identity behind them."""
        return self.stored_cols + PMAX


def gate_layout(hidden: int, intermediate: int, projection: Projection) -> tuple[Matrix | None, Matrix]:
    """First and second matrix of a gate or up projection, both stationary; a dense one has only the
    second.
    """
    hidden, intermediate, part = int(hidden), int(intermediate), projection.in_python()
    if part.form == "dense":
        return None, Matrix(hidden, intermediate, col_groups=part.groups)
    # Gate and up put channels out, so the pivots are columns of the second factor: y = z [1 | C].
    axis = "cols" if part.form == "compact" else ""
    groups = part.groups
    first = Matrix(hidden, groups * part.slots, col_groups=groups, twice=part.halves)
    second = Matrix(
        groups * part.rank,
        intermediate,
        STATIONARY_COLS,
        axis,
        part.pivots,
        part.shift,
        row_groups=groups,
        col_groups=groups,
        halves=part.halves,
    )
    return first, second


def down_layout(
    hidden: int, intermediate: int, projection: Projection, tile_cols: int = MOVING_COLS
) -> tuple[Matrix | None, Matrix]:
    """First and second matrix of a down projection; the second is moving unless the output is wanted
    transposed (`tile_cols` 128).
    """
    hidden, intermediate, part = int(hidden), int(intermediate), projection.in_python()
    if part.form == "dense":
        return None, Matrix(intermediate, hidden, tile_cols, row_groups=part.groups)
    # Down takes channels in, so the pivots are rows of the first factor: z = h [1 ; C].
    axis = "rows" if part.form == "compact" else ""
    groups = part.groups
    first = Matrix(
        intermediate,
        groups * part.rank,
        STATIONARY_COLS,
        axis,
        part.pivots,
        part.shift,
        row_groups=groups,
        col_groups=groups,
        twice=part.halves,
    )
    return first, Matrix(groups * part.slots, hidden, tile_cols, row_groups=groups, halves=part.halves)


def _grouped_alike(*parts: Projection) -> list[Projection]:
    """Dense matrices cut at the groups of the others, so that all agree on the tiles of h."""
    groups = max(part.groups for part in parts)
    for part in parts:
        if part.form != "dense" and part.groups != groups:
            raise ValueError(f"groups: expected {groups} in every projection, found {part.groups} in one.")
    return [dataclasses.replace(part, groups=groups) for part in parts]


def mlp_layout(hidden: int, intermediate: int, gate: Projection, up: Projection, down: Projection) -> Layout:
    """Everything: one launch computes the whole gated MLP."""
    gate, up, down = _grouped_alike(gate, up, down)
    gate_first, gate_second = gate_layout(hidden, intermediate, gate)
    up_first, up_second = gate_layout(hidden, intermediate, up)
    down_first, down_second = down_layout(hidden, intermediate, down)
    return Layout(gate_first, up_first, gate_second, up_second, down_first, down_second)


def gated_layout(hidden: int, intermediate: int, gate: Projection, up: Projection) -> Layout:
    """silu(gate) * up alone: what `gated_up` computes."""
    gate_first, gate_second = gate_layout(hidden, intermediate, gate)
    up_first, up_second = gate_layout(hidden, intermediate, up)
    return Layout(gate_first, up_first, gate_second, up_second)


def _between_launches(matrix: Matrix | None) -> Matrix | None:
    """A matrix whose z leaves the chip: collectives know nothing of halves."""
    return None if matrix is None else dataclasses.replace(matrix, halves=False, twice=False)


def first_stage(whole: Layout) -> Layout:
    """What runs before the all-gather of z."""
    return Layout(gate_first=_between_launches(whole.gate_first), up_first=_between_launches(whole.up_first))


def second_stage(whole: Layout) -> Layout:
    """What runs between the all-gather of z and the reduce-scatter of down's z (or, where down is dense, the
    last all-reduce).
    """
    return Layout(
        gate_second=_between_launches(whole.gate_second),
        up_second=_between_launches(whole.up_second),
        down_first=_between_launches(whole.down_first),
        down_second=None if whole.down_first else whole.down_second,
        external_z=tuple(name for name in ("gate", "up") if whole.has_z(name)),
    )


def last_stage(whole: Layout) -> Layout:
    """What runs between the reduce-scatter of down's z and the last all-reduce."""
    return Layout(down_second=_between_launches(whole.down_second))


def chain_layout(k: int, n: int, projection: Projection, transposed_output: bool = False) -> Layout:
    """x [T, k] -> y [T, n]: a projection by itself (`xuv`, `down`)."""
    tile_cols = STATIONARY_COLS if transposed_output else MOVING_COLS
    first, second = down_layout(n, k, projection, tile_cols)
    return Layout(down_first=first, down_second=second)


def int8_layout(layout: Layout) -> Layout:
    """The same launch with weights of one byte: every matrix learns where its scales are."""
    columns = 0
    matrices = {}
    for name in MATRICES:
        matrix = layout.matrix(name)
        if matrix is None:
            continue
        # Pivots are added behind the scale, column tile n taking row tile n of the source
        # (`Matrix.added_tile`): a shift would put them into other tiles.
        if matrix.shift:
            raise ValueError(
                f"{name}: expected pivots that begin with the core's own, found a shift of {matrix.shift}."
            )
        matrices[name] = dataclasses.replace(matrix, scale_at=columns)
        columns += scale_cols(matrix)
    return dataclasses.replace(layout, **matrices)


def scale_cols(matrix: Matrix) -> int:
    """Columns of the packed scales that a matrix takes: one for each tile of at most 128 of its own."""
    return matrix.col_groups * tile_count(matrix.group_cols(), min(PMAX, matrix.tile_cols))


@functools.lru_cache(maxsize=64)
def layout_of(products: Products, external_z: tuple[str, ...]) -> Layout:
    """The layout that a plan was made for, from the plan's fields; one object per layout, since a layout
    remembers what it has counted.
    """
    return Layout(
        products.gate_first,
        products.up_first,
        products.gate_second,
        products.up_second,
        products.down_first,
        products.down_second,
        external_z,
    )
