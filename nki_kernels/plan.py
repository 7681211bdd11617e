"""A tile plan: every size and placement that a kernel needs, as data. Made by `planner`, read by the kernels
and by the cost model.

Kernels read fields and call plain methods only: before NKI 0.7 a compiler of its own reads them, which knows
fewer words than Python.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from nki_kernels.backend import nl
from nki_kernels.layout import Layout
from nki_kernels.tiling import Products


@dataclasses.dataclass(frozen=True)
class Plan(nl.NKIObject):
    """One launch over `tokens` tokens, `block_tokens` at a time.

    On chip there are two arenas, a ring and some small tiles, all allocated once. Sizes and offsets are
    elements per partition:

    * `wide`:   x^T from 0, h^T from `h_offset`, results on their way out from `output_offset`, raw input rows
                from `input_offset`. They share memory wherever their lives do not meet, so that the next
                block's x can be loaded during this block's last product.
    * `narrow`: z of gate, then z of up; and, once both are used up, z of down from 0.
    * `ring`:   `ring_slots` slots of `ring_cols` that the packed weights stream through, in chunks bounded by
                `chunk_bounds`. A chunk that is still in its slot is not read again, so a ring that holds all
                chunks reads the weights once.
    """

    products: Products
    external_z: tuple[str, ...]  # as in Layout
    tokens: int
    hidden: int  # H: width of x, 0 where no x is read
    intermediate: int  # I: width of h, 0 where there is none
    itemsize: int  # bytes per element of weights and activations
    block_tokens: int
    moving_tokens: int  # width of a moving activation tile, <= 512
    token_group: int  # tiles of 128 tokens that share one pass over a moving weight tile
    out_cols: int  # columns of natural output that are staged before they are stored
    ring_slots: int
    ring_cols: int
    chunk_bounds: tuple[int, ...]
    h_offset: int
    output_offset: int
    input_offset: int
    wide_cols: int
    narrow_cols: int
    x_tiles: int  # row tiles of x^T, h^T and each z; 0 where the launch has none
    h_tiles: int
    gate_z_tiles: int
    up_z_tiles: int
    down_z_tiles: int
    runs_gate_first: bool
    runs_up_first: bool
    runs_gated: bool
    runs_down_first: bool
    identity_at: int  # first column of the identity in the packed weights, or -1
    natural_output: bool
    with_norm: bool = False  # RMSNorm in front
    norm_eps: float = 0.0
    with_residual: bool = False  # a residual is added behind
    silu: bool = False  # SiLU behind (xuv)
    transposed_input: bool = False  # x comes as [H, T]

    @property
    def layout(self) -> Layout:
        """The layout that the plan was made for."""
        return _layout_of(self.products, self.external_z)

    def blocks(self) -> int:
        """Token blocks of the launch."""
        return (self.tokens + self.block_tokens - 1) // self.block_tokens

    def chunks(self) -> int:
        """Pieces that the packed weights are read in."""
        return len(self.chunk_bounds) - 1

    def sbuf_bytes(self) -> int:
        """Bytes per partition that the kernel allocates in SBUF, exactly."""
        elements = self.wide_cols + self.narrow_cols + self.ring_slots * self.ring_cols
        if self.identity_at >= 0:
            elements += 128
        small = 0  # fp32
        if self.runs_gated:
            small += 2 * self.moving_tokens
        if self.with_norm:
            small += self.x_tiles + 3
        return elements * self.itemsize + small * 4

    def weight_cols_read(self) -> int:
        """Columns of the packed weights that cross HBM in the whole launch, at most: a further token group
        may find chunks still there.
        """
        once = self.chunk_bounds[-1]
        shared = self.chunks() - self.ring_slots
        if shared <= 0:
            return once
        # Chunks that have a slot to themselves are read once.
        held = (
            self.chunk_bounds[self.ring_slots] - self.chunk_bounds[shared] if shared < self.ring_slots else 0
        )
        return (
            once
            + (self.blocks() - 1) * (once - held)
            + (self._passes() - self.blocks()) * self._unheld_output_cols()
        )

    def _passes(self) -> int:
        """Token groups of the last product, over all blocks."""
        if not self.natural_output:
            return self.blocks()
        total = 0
        for start in range(0, self.tokens, self.block_tokens):
            tokens = min(self.block_tokens, self.tokens - start)
            total += (tokens + 128 * self.token_group - 1) // (128 * self.token_group)
        return total

    def _unheld_output_cols(self) -> int:
        """Columns of the last matrix that a further token group reads again: none if the ring holds a column
        tile of it.
        """
        if not self.natural_output:
            return 0
        matrix: Any = self.products.down_second
        spanned = (matrix.row_tiles() * matrix.tile_cols + self.ring_cols - 1) // self.ring_cols + 1
        return 0 if spanned <= self.ring_slots else matrix.row_tiles() * matrix.cols


@functools.lru_cache(maxsize=64)
def _layout_of(products: Products, external_z: tuple[str, ...]) -> Layout:
    """One object per layout, since a layout remembers what it has counted."""
    return Layout(
        products.gate_first,
        products.up_first,
        products.gate_second,
        products.up_second,
        products.down_first,
        products.down_second,
        external_z,
    )
