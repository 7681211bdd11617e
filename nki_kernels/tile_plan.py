"""A tile plan: every size and placement that a kernel needs, as data. Made by `planner`, read by the kernels
and by the cost model.

Kernels read fields and call plain methods only, and every class that they can reach is in this file or in
`tiling`: before NKI 0.7 a compiler of its own reads them, which knows fewer words than Python. Numbers are
Python's: numpy's would silently become None there.
"""

from __future__ import annotations

import dataclasses

from nki_kernels.backend import nl
from nki_kernels.tiling import Products


@dataclasses.dataclass(frozen=True)
class Addresses(nl.NKIObject):
    """Where in SBUF every tensor of a launch begins, in bytes of each partition (`placement` makes them).

    x, h, rows and output share bytes wherever their lives do not meet, so that the next block's x can be
    loaded during this block's last product; so do the z of gate and up, and the z of down once both are used
    up. Two of a kind follow one another.
    """

    x: int
    h: int
    gate_z: int
    up_z: int
    down_z: int
    output: int  # results on their way out; before there are any, sums of early tiles so far
    rows: int  # raw natural input: two rows and, with a norm, one normalised
    z_rows: int  # natural z from a collective, or on its way to one, two turns
    activated: int  # silu(gate), two turns
    identity: int
    zero: int
    norm_weight: int
    norm_eps: int
    norm_sums: int
    scales: int  # of int8 weights,
    spread: int  # those of natural output, alike on all partitions,
    small: int  # and what it takes to spread them
    scaled: int  # natural output before the residual, two turns
    raw: int  # int8 chunks and the int8 identity, before they are cast
    ring: int  # the last, so that it can be deepened


@dataclasses.dataclass(frozen=True)
class Plan(nl.NKIObject):
    """One launch over `tokens` tokens, `block_tokens` at a time.

    The packed weights stream through a ring of `ring_slots` slots of `ring_cols` columns, in chunks bounded
    by `chunk_bounds`. A chunk that is still in its slot is not read again, so a ring that holds all chunks
    reads the weights once.
    """

    products: Products
    at: Addresses
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
    slot_bytes: int  # of the ring; bytes from one turn to the next of ...
    row_bytes: int  # ... raw input,
    turn_bytes: int  # ... transposed results,
    z_row_bytes: int  # ... natural z,
    activated_bytes: int  # ... silu(gate),
    align_bytes: int  # ... single columns
    x_tiles: int  # row tiles of x^T, h^T and each z; 0 where the launch has none
    h_tiles: int
    gate_z_tiles: int
    up_z_tiles: int
    down_z_tiles: int
    runs_gate_first: bool
    runs_up_first: bool
    runs_gated: bool
    runs_down_first: bool
    identity_col: int  # first column of the identity in the packed weights,
    identity_size: int  # and how many of its rows and columns the launch reads
    natural_output: bool
    is_int8: bool  # weights are int8, cast on the way through the ring, and scaled when a product leaves PSUM
    scale_cols: int  # columns of the packed scales
    # int8 scales of natural output are spread `out_cols` at a time in every block of tokens, not all once
    spreads_pieces: bool
    raw_slots: int  # int8 chunks on their way
    raw_bytes: int  # from one to the next
    scalar_share: int  # of 128 columns, how many ScalarE casts, where VectorE takes the rest,
    natural_share: int  # and in chunks of the last, natural product,
    natural_chunk: int  # which begin here
    natural_z: bool  # z crosses collectives as [T, channels]
    early_tiles: int  # column tiles that the first block sums while transposed input arrives; or 0
    early_group: int  # and how many of them side by side while the first rows do
    with_norm: bool = False  # RMSNorm in front
    norm_eps: float = 0.0
    with_residual: bool = False  # a residual is added behind
    silu: bool = False  # SiLU behind (xuv)
    transposed_input: bool = False  # x comes as [H, T]

    def blocks(self) -> int:
        """Token blocks of the launch."""
        return (self.tokens + self.block_tokens - 1) // self.block_tokens

    def input_wait(self) -> int:
        """Row tiles of h that must be there before the first product of a launch that starts from it."""
        return min(self.h_tiles, self.ring_cols // 128) if self.early_tiles > 0 else self.h_tiles

    def chunks(self) -> int:
        """Pieces that the packed weights are read in."""
        return len(self.chunk_bounds) - 1

    def sbuf_bytes(self) -> int:
        """Bytes per partition up to the end of the last tensor in SBUF, exactly."""
        # The ring is the last tensor, and behind its last slot nothing needs to be aligned.
        return self.at.ring + (self.ring_slots - 1) * self.slot_bytes + self.ring_cols * self.itemsize

    def weight_cols_read(self) -> int:
        """Columns of the packed weights that cross HBM in the whole launch, at most: a further token group
        may find chunks still there.
        """
        once = self.chunk_bounds[-1]
        shared = self.chunks() - self.ring_slots
        if shared <= 0:
            return once
        # Chunks that have a slot to themselves are read once.
        # Chunk c goes to slot c % ring_slots, so it shares it with c + ring_slots: those from `shared` to
        # ring_slots - 1 share with nobody.
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
        matrix = self.products.down_second
        # One chunk more than its columns fill: a column tile begins in the middle of one as a rule.
        spanned = (matrix.row_tiles() * matrix.tile_cols + self.ring_cols - 1) // self.ring_cols + 1
        return 0 if spanned <= self.ring_slots else matrix.row_tiles() * matrix.cols
