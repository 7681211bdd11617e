"""A tile plan: every size and placement that a kernel needs, as data. Made by `planner`, read by the kernels and by the cost model."""

from __future__ import annotations

import dataclasses

from nki_kernels.backend import nl
from nki_kernels.layout import Layout
from nki_kernels.targets import PMAX
from nki_kernels.tiling import MOVING_COLS, tile_count


@dataclasses.dataclass(frozen=True)
class Plan(nl.NKIObject):
    """One launch over `tokens` tokens, `block_tokens` at a time.

    On chip there are two arenas, a ring and some small tiles, all allocated once. Sizes are elements per partition:

    * `wide`:   x^T from 0, h^T from `h_offset`, natural rows (results to store, raw x) from `rows_offset`. The three share memory wherever
                their lives do not meet, so that the next block's x can be loaded while this block's last product runs.
    * `narrow`: z of gate, then z of up; and, once both are used up, z of down from 0.
    * `ring`:   `ring_slots` slots of `ring_cols` that the packed weights stream through, in chunks bounded by `chunk_bounds`. A chunk that
                is still in its slot is not read again, so a ring that holds all chunks reads the weights once.
    """

    layout: Layout
    tokens: int
    itemsize: int  # bytes per element of weights and activations
    block_tokens: int
    moving_tokens: int  # width of a moving activation tile, <= 512
    token_group: int  # tiles of 128 tokens that share one pass over a moving weight tile
    out_cols: int  # columns of natural output that are staged before they are stored
    ring_slots: int
    ring_cols: int
    chunk_bounds: tuple[int, ...]
    h_offset: int
    rows_offset: int
    wide_cols: int
    narrow_cols: int
    norm_eps: float | None = None  # RMSNorm in front
    silu: bool = False  # SiLU behind (xuv)
    transposed_input: bool = False  # x comes as [H, T]

    @property
    def blocks(self) -> int:
        """Token blocks of the launch."""
        return tile_count(self.tokens, self.block_tokens)

    @property
    def token_tiles(self) -> int:
        """Tiles of 128 tokens in a block."""
        return tile_count(self.block_tokens)

    @property
    def input_rows_offset(self) -> int:
        """Where in `wide` the rows of raw input begin: behind the staged output."""
        return self.rows_offset + output_stage_cols(self.layout, self.block_tokens, self.out_cols)

    def narrow_offset(self, projection: str) -> int:
        """Where in `narrow` the z of "gate", "up" or "down" begins."""
        return z_tiles(self.layout, "gate") * self.block_tokens if projection == "up" else 0

    @property
    def weight_passes(self) -> int:
        """How often the packed weights are read from HBM, re-reads by token groups aside."""
        return 1 if len(self.chunk_bounds) - 1 <= self.ring_slots else self.blocks

    def sbuf_bytes(self) -> int:
        """Bytes per partition that the kernel allocates in SBUF, exactly."""
        elements = self.wide_cols + self.narrow_cols + self.ring_slots * self.ring_cols
        return elements * self.itemsize + small_bytes(self.layout, self.moving_tokens, self.itemsize, self.norm_eps is not None)


def output_stage_cols(layout: Layout, block_tokens: int, out_cols: int) -> int:
    """Elements per partition that results take on their way out: `out_cols` of every token, or two turns of a transposed column tile."""
    if layout.down_second is None:
        return 0
    return tile_count(block_tokens) * out_cols if layout.down_second.tile_cols == MOVING_COLS else 2 * block_tokens


def z_tiles(layout: Layout, projection: str) -> int:
    """Row tiles of the z of "gate", "up" or "down" that a launch keeps on chip."""
    first, second = layout.matrix(f"{projection}_first"), layout.matrix(f"{projection}_second")
    if first is not None:
        return tile_count(first.cols)
    return second.row_tiles if second is not None and layout.has_z(projection) else 0


def small_bytes(layout: Layout, moving_tokens: int, itemsize: int, with_norm: bool) -> int:
    """Bytes per partition of the small tiles: an identity, two fp32 tiles for silu(gate), and weight, eps and two sums of RMSNorm."""
    total = PMAX * itemsize if layout.needs_identity else 0
    if layout.gate_second is not None:
        total += 2 * moving_tokens * 4
    if with_norm:
        total += (tile_count(layout.hidden) + 3) * 4
    return total
