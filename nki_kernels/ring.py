"""How deep a ring of weights is, and what a launch loses by a short one."""

from __future__ import annotations

from nki_kernels.targets import Target
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import tile_count
from nki_kernels.waits import is_by_rows

SLOT_BYTES = (8 * 1024, 4 * 1024)  # per partition: twice what saturates a DMA queue, and just that
MIN_SLOTS = 3  # one in use, one arriving, one asked for
INT8_SLOTS = 4  # and one being cast
MAX_SLOTS = 8  # deeper rings only where they save reads
# Found in schedules of prefills: int8 loses a hundredth with one slot fewer than INT8_SLOTS, four with two,
# and three with chunks of half the length; others up to six of what the ring lacks of four long slots.
STARVED_LOSS, SHORT_LOSS, TRICKLE_LOSS = 0.01, 0.03, 0.06


def deepest_ring(plan: Plan, target: Target) -> int:
    """Slots of the plan's ring with the memory that is left."""
    spare = (target.sbuf_usable_bytes - plan.sbuf_bytes()) // plan.slot_bytes
    return min(plan.ring_slots + spare, max(MAX_SLOTS, plan.ring_slots), plan.chunks())


def ring_loss(plan: Plan, target: Target) -> float:
    """The share of its time that a launch loses by a ring that its weights stream through: products wait for
    them or, in int8, for casts, which wait for products.
    """
    if plan.chunks() <= plan.ring_slots:
        return 0.0
    if plan.is_int8:
        is_short = 4 * plan.ring_cols * plan.itemsize < 3 * SLOT_BYTES[0]
        return STARVED_LOSS * max(0, INT8_SLOTS - plan.ring_slots) ** 2 + SHORT_LOSS * is_short
    if not is_by_rows(plan) or tile_count(plan.block_tokens) <= plan.token_group:
        return 0.0
    # Every group of token tiles takes all weights of the last product once more, while results are stored.
    lacking = 1 - deepest_ring(plan, target) * plan.slot_bytes / (4 * SLOT_BYTES[0])
    return TRICKLE_LOSS * max(0.0, lacking)
