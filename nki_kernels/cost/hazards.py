"""Who must wait for whom: reads after writes, writes after reads and writes, and memory that somebody else
still holds.
"""

from __future__ import annotations

import heapq

from nki_kernels.simulator.trace import HBM, PSUM, SBUF, Access, Allocation
from nki_kernels.targets import Target

Stamp = tuple[float, int]  # (ns, number of the instruction that it waits for; -1: the start of the launch)
START: Stamp = (0.0, -1)
CELL_BYTES = {SBUF: 256, PSUM: 2048}  # conflicts on chip are found to this grain; a PSUM bank is one cell
HBM_CELLS = 2048  # per tensor


class _Cells:
    """The last write and the last read of every cell of a buffer."""

    __slots__ = ("base", "grain", "read", "written")

    def __init__(self, size_bytes: int, grain: int, since: Stamp) -> None:
        self.grain, self.base = grain, 0
        count = -(-size_bytes // grain)
        self.written = [since] * count
        self.read = [since] * count

    def slice(self, access: Access) -> slice:
        first, end = access.span
        return slice((self.base + first) // self.grain, -(-(self.base + end) // self.grain))

    def part(self, base: int) -> _Cells:
        """The same cells for a tensor that begins at byte `base` of them."""
        # The lists themselves and no copies: tensors on one place see each other's stamps.
        shared = object.__new__(_Cells)
        shared.grain, shared.base, shared.written, shared.read = self.grain, base, self.written, self.read
        return shared


class Hazards:
    """Stamps of every live buffer. A fresh buffer may be used once the memory that it got has been let go by
    its last user.

    SBUF is handed out by size, oldest release first, as an allocator that rotates buffers would; PSUM by the
    banks in the trace.
    """

    def __init__(self, target: Target) -> None:
        self._live: dict[int, _Cells] = {}
        self._free_sbuf: list[tuple[float, int, int]] = [(*START, target.sbuf_usable_bytes)]
        self._free_banks: list[Stamp] = [START] * target.psum_banks
        self._hbm_bytes: dict[int, int] = {}
        # Where the kernel says what lies where, tensors on the same bytes wait for one another.
        sizes = {SBUF: target.sbuf_usable_bytes, PSUM: target.psum_banks * target.psum_bank_bytes}
        self._memory = {space: _Cells(size, CELL_BYTES[space], START) for space, size in sizes.items()}

    def allocation(self, event: Allocation) -> None:
        """A buffer appears or goes."""
        if event.space == HBM:
            self._hbm_bytes[event.buffer] = event.bytes_per_partition
        elif event.address >= 0:
            if event.live:
                # Its stamps are those of the place, which outlive it.
                self._live[event.buffer] = self._memory[event.space].part(event.address)
            else:
                del self._live[event.buffer]
        elif event.live:
            since = (
                self._take_sbuf(event.bytes_per_partition)
                if event.space == SBUF
                else max(self._free_banks[slice(*event.banks)])
            )
            self._live[event.buffer] = _Cells(event.bytes_per_partition, CELL_BYTES[event.space], since)
        else:
            cells = self._live.pop(event.buffer)
            last = max(*cells.written, *cells.read)
            if event.space == SBUF:
                heapq.heappush(self._free_sbuf, (*last, event.bytes_per_partition))
            for bank in range(*event.banks):
                self._free_banks[bank] = last

    def _take_sbuf(self, size: int) -> Stamp:
        stamp = START
        while size > 0:
            time, number, available = heapq.heappop(self._free_sbuf)
            stamp = max(stamp, (time, number))
            if available > size:
                heapq.heappush(self._free_sbuf, (time, number, available - size))
            # Below 0 where a piece was cut: then it was the last.
            size -= available
        return stamp

    def before_read(self, access: Access) -> Stamp:
        """When the operand may be read."""
        cells = self._live.get(access.buffer)
        # Unknown is what no instruction wrote: an input of the kernel, there from the start.
        return START if cells is None else max(cells.written[cells.slice(access)])

    def before_write(self, access: Access) -> tuple[Stamp, Stamp]:
        """When the operand may be written, as far as (earlier writes, earlier reads) go. Stores to HBM never
        wait for one another.
        """
        cells = self._live.get(access.buffer)
        if cells is None or access.space == HBM:
            return START, START
        where = cells.slice(access)
        return max(cells.written[where]), max(cells.read[where])

    def after(
        self, reads: tuple[Access, ...], writes: tuple[Access, ...], done: Stamp, visible: Stamp
    ) -> None:
        """An instruction has read its operands at `done`; its results can be read from `visible` on."""
        for access in reads:
            cells = self._live.get(access.buffer)
            if cells is not None:
                where = cells.slice(access)
                cells.read[where] = [stamp if stamp > done else done for stamp in cells.read[where]]
        for access in writes:
            cells = self._live.get(access.buffer) or self._new_hbm(access)
            where = cells.slice(access)
            cells.written[where] = [stamp if stamp > visible else visible for stamp in cells.written[where]]

    def _new_hbm(self, access: Access) -> _Cells:
        size = self._hbm_bytes[access.buffer]
        cells = self._live[access.buffer] = _Cells(size, max(256, -(-size // HBM_CELLS)), START)
        return cells
