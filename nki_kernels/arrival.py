"""A first product that begins while its operand, x^T in HBM, is on its way: how many column tiles of it, and
in which ring.

Rows of a block of tokens are short, hence slow, and a sum over K needs all of them. So column tiles are
summed over the rows that have come, a chunk of weights each, and what they sum to so far waits in SBUF, in
the place of staged output and behind it (`svd_mlp.product_on_arrival`).
"""

from __future__ import annotations

import math

from nki_kernels.placement import ALIGN_BYTES, Room, output_bytes, sum_bytes
from nki_kernels.targets import PMAX, PSUM_BANKS
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import tile_count

# On trn1 a row tile of 512 tokens takes 1.3 us to come, its weights 0.12 us a column tile and its products
# 0.21 us: 15 tiles keep TensorE at work, more make up for the first rows.
EARLY_TILES = 3 * PSUM_BANKS


def early_tiles(wanted: int, room: Room) -> int:
    """Column tiles of the first product to sum while transposed input arrives: `wanted`, or (0) as many as
    the place of staged output holds. None unless chunks are whole pieces of column tiles that have more than
    one.
    """
    layout = room.request.layout
    first = layout.down_first
    if not room.request.transposed_input or first is None or layout.is_int8:
        return 0
    is_plain = first.row_groups == 1 and not first.pivots
    rows = first.row_tiles() * PMAX
    # More than one chunk to a column tile, and whole ones: then a chunk is the weights of one piece of the
    # rows.
    if not is_plain or rows <= room.ring_cols or rows % room.ring_cols:
        return 0
    return min(wanted or output_bytes(room) // sum_bytes(room.block_tokens), first.cols // PMAX, EARLY_TILES)


def early_group(plan: Plan) -> int:
    """How many early tiles share the first rows as they come: each in PSUM banks of its own, its weights in a
    slot, and a slot left for those of the next. One where few tokens make weights what takes the time: slots
    that wait for rows would keep them from coming.
    """
    if not plan.early_tiles or plan.block_tokens <= PMAX or not keeps_apart(plan, plan.ring_slots):
        return 1
    banks = tile_count(plan.block_tokens, plan.moving_tokens)
    return min(plan.early_tiles, plan.ring_slots - 1, PSUM_BANKS // banks)


def keeps_apart(plan: Plan, slots: int) -> bool:
    """Whether in a ring of so many slots the weights for the same rows, of as many column tiles, have a slot
    each. 64 row tiles in chunks of 16: chunks 0, 4, 8 ... of 7 slots do, of 8 slots share two.
    """
    return slots >= plan.chunks() or math.gcd(slots, _tile_chunks(plan)) == 1


def more_tiles(plan: Plan, slots: int, spare_bytes: int) -> int:
    """Early tiles with so many slots and bytes more than the plan has."""
    more = spare_bytes // ALIGN_BYTES * ALIGN_BYTES // sum_bytes(plan.block_tokens)
    tiles = min(plan.early_tiles + more, plan.products.down_first.cols // PMAX, EARLY_TILES)
    # The last tile's weights are in use when those of the first tile's next rows are asked for.
    # Tile n's weights for rows i are chunk n tile_chunks + i; two chunks share a slot where `slots` divides
    # their distance.
    shares_slot = ((tiles - 1) * _tile_chunks(plan) - 1) % slots == 0
    return tiles - 1 if shares_slot else tiles


def _tile_chunks(plan: Plan) -> int:
    """Chunks of a column tile."""
    return int(plan.products.down_first.row_tiles()) * PMAX // plan.ring_cols
