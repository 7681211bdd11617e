"""The packed weights as a stream through a ring of SBUF slots."""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nl
from nki_kernels.plan import Plan

Tensor = Any  # an NKI tensor, or the simulator's


class WeightStream(nl.NKIObject):
    """Hands out the stored blocks of `packed` `[128, C]` in order, reading a chunk when its first block is
    asked for.

    A chunk always goes to the same slot of the ring. One that is still there is not read again: that is how a
    ring that holds everything reads the weights once for all token blocks, and how a second token group
    reuses what the first has read.
    """

    def __init__(self, packed: Tensor, plan: Plan) -> None:
        self.packed = packed
        self.bounds = plan.chunk_bounds
        self.slots = []
        self.held = []
        for i in range(plan.ring_slots):
            slot = nl.ndarray(
                (packed.shape[0], plan.ring_cols),
                dtype=packed.dtype,
                buffer=nl.sbuf,
                name=f"ring{i}",
                address=(0, plan.at.ring + i * plan.slot_bytes),
            )
            self.slots.append(slot)
            self.held.append(-1)
        self.seek(0)

    def seek(self, position: int) -> None:
        """Continue at packed column `position`, a block's first."""
        self.position = position
        self.chunk = 0
        while self.bounds[self.chunk + 1] < position:
            self.chunk += 1

    def take(self, cols: int) -> tuple:
        """The next block of `cols` columns: (slot, first column), to be sliced where it is used."""
        if self.position >= self.bounds[self.chunk + 1]:
            self.chunk += 1
        start = self.bounds[self.chunk]
        slot = self.chunk % len(self.slots)
        if self.held[slot] != self.chunk:
            size = self.bounds[self.chunk + 1] - start
            nisa.dma_copy(
                dst=self.slots[slot][:, 0:size],
                src=self.packed[:, start : start + size],
                dge_mode=nisa.dge_mode.none,
            )
            self.held[slot] = self.chunk
        at = self.position - start
        self.position += cols
        return self.slots[slot], at
