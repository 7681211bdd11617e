"""The packed weights as a stream through a ring of SBUF slots."""

from __future__ import annotations

from typing import Any

from nki_kernels.backend import nisa, nl
from nki_kernels.plan import Plan
from nki_kernels.targets import PMAX

Tensor = Any  # an NKI tensor, or the simulator's


class WeightStream(nl.NKIObject):
    """Hands out the stored blocks of `packed` `[128, C]` in order, reading a chunk when its first block is
    asked for.

    A chunk always goes to the same slot of the ring. One that is still there is not read again: that is how a
    ring that holds everything reads the weights once for all token blocks, and how a second token group
    reuses what the first has read.
    """

    def __init__(self, packed: Tensor, plan: Plan, dtype: Any, zero: Tensor) -> None:
        self.packed = packed
        self.zero = zero
        self.plan = plan
        self.bounds = plan.chunk_bounds
        # Where the blocks lie that the next column tile shares: a list over row tiles for gate, up and down.
        products = plan.products
        self.shared = []
        for matrix in (products.gate_second, products.up_second, products.down_second):
            positions = []
            if matrix != None:  # noqa: E711
                for _k in range(matrix.row_tiles()):
                    positions.append(0)
            self.shared.append(positions)
        self.slots = []
        self.held = []
        for i in range(plan.ring_slots):
            slot = nl.ndarray(
                (packed.shape[0], plan.ring_cols),
                dtype=dtype,
                buffer=nl.sbuf,
                name=f"ring{i}",
                address=(0, plan.at.ring + i * plan.slot_bytes),
            )
            self.slots.append(slot)
            self.held.append(-1)
        self.raw = []
        for i in range(plan.raw_slots):
            raw = nl.ndarray(
                (packed.shape[0], plan.ring_cols),
                dtype=packed.dtype,
                buffer=nl.sbuf,
                name=f"raw{i}",
                address=(0, plan.at.raw + i * plan.raw_bytes),
            )
            self.raw.append(raw)
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
        self.load(self.chunk)
        # An engine works in order: what the next chunk needs cast must not wait behind this one's results.
        if self.plan.is_int8 and len(self.slots) > 1 and self.chunk + 2 < len(self.bounds):
            self.load(self.chunk + 1)
        at = self.position - self.bounds[self.chunk]
        self.position += cols
        return self.slots[self.chunk % len(self.slots)], at

    def take_stored(self, cols: int, owner: int, k: int) -> tuple:
        """As `take`, and remember the place for the column tile that shares the block; owner: 0 gate, 1 up, 2
        down.
        """
        self.shared[owner][k] = self.position
        return self.take(cols)

    def take_shared(self, owner: int, k: int) -> tuple:
        """The block that was taken for row tile `k` of the column tile before."""
        position = self.shared[owner][k]
        chunk = self.chunk
        while self.bounds[chunk] > position:
            chunk -= 1
        self.load(chunk)
        return self.slots[chunk % len(self.slots)], position - self.bounds[chunk]

    def load(self, chunk: int) -> None:
        """Have a chunk in its slot."""
        slot = chunk % len(self.slots)
        if self.held[slot] != chunk:
            start = self.bounds[chunk]
            size = self.bounds[chunk + 1] - start
            there = self.slots[slot]
            if self.plan.is_int8:
                there = self.raw[chunk % len(self.raw)]
            nisa.dma_copy(
                dst=there[:, 0:size],
                src=self.packed[:, start : start + size],
                dge_mode=nisa.dge_mode.none,
            )
            if self.plan.is_int8:
                self.cast(chunk, self.slots[slot], there, size)
            self.held[slot] = chunk

    def cast(self, chunk: int, dst: Tensor, src: Tensor, cols: int) -> None:
        """int8 to the type of the products, shared by ScalarE and VectorE so that neither is late."""
        share = self.plan.scalar_share
        if chunk >= self.plan.natural_chunk:
            share = self.plan.natural_share
        middle = cols // PMAX * share // PMAX * PMAX
        if middle > 0:
            nisa.activation(dst=dst[:, 0:middle], op=nl.copy, data=src[:, 0:middle], bias=self.zero)
        if middle < cols:
            nisa.tensor_copy(dst=dst[:, middle:cols], src=src[:, middle:cols])
