"""What a run tells its listeners: one record per instruction and one per buffer that appears or goes.

The simulator does not know who listens. A listener is any callable that takes an `Event`; records are plain
named tuples (there may be millions), hold no reference to the simulated memory, and say enough to schedule
the run afterwards:

* dependencies: two instructions conflict if one writes a box of a buffer that the other touches
  (`Access.overlaps`);
* buffer reuse: the same rule, since a rotating buffer is one `buffer` id written again and again;
* PSUM banks: `Access.banks`;
* cost: engine, op, element type, partitions and elements per partition of every operand, DMA payload,
  descriptors and row length, FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# Engines. "dma" stands for all queues: which queue serves a transfer is for the scheduler to decide.
TENSOR, VECTOR, SCALAR, GPSIMD, DMA = "tensor", "vector", "scalar", "gpsimd", "dma"
SBUF, PSUM, HBM = "sbuf", "psum", "hbm"


class Access(NamedTuple):
    """The box of one buffer that an operand covers.

    On chip (`sbuf`, `psum`) the box is `partitions` x `span`, the latter in bytes from the start of the
    buffer within each partition. In `hbm` the box is `span` alone, in bytes from the start of the tensor, and
    `partitions` is (0, 1). Boxes are the smallest that hold the operand, so a strided operand may claim more
    than it touches.
    """

    buffer: int  # unique in the run
    name: str
    space: str  # SBUF, PSUM or HBM
    dtype: str  # numpy's name of the element type, e.g. "bfloat16"
    itemsize: int  # bytes
    shape: tuple[int, ...]  # on chip: (partitions, free...)
    partitions: tuple[int, int]  # [first, last + 1)
    span: tuple[int, int]  # bytes, [first, last + 1)
    row_bytes: int  # longest contiguous run of the operand (on chip: within a partition)
    banks: tuple[int, int]  # PSUM banks [first, last + 1); (0, 0) elsewhere

    @property
    def elements(self) -> int:
        """Elements of the operand."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def free_elements(self) -> int:
        """Elements per partition of an on-chip operand."""
        return self.elements // max(1, self.shape[0])

    def overlaps(self, other: Access) -> bool:
        """Whether the two boxes share a byte."""
        return (
            self.buffer == other.buffer
            and self.span[0] < other.span[1]
            and other.span[0] < self.span[1]
            and self.partitions[0] < other.partitions[1]
            and other.partitions[0] < self.partitions[1]
        )


class Instruction(NamedTuple):
    """One instruction, in program order.

    `reads` come in the order of the op's operands (nc_matmul: stationary, moving; tensor_tensor: data1,
    data2). An accumulating matmul also reads `writes[0]`. The three DMA figures are 0 on the other engines.
    """

    number: int  # position in the program, from 0
    engine: str
    op: str  # nki.isa name, e.g. "nc_matmul"
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    accumulate: bool = False  # matmul that adds to what PSUM holds
    function: str = ""  # activation or ALU op, e.g. "silu"
    flops: int = 0  # multiplications and additions of a matmul (2 K M N), transposes excluded
    transfer_bytes: int = 0  # DMA: bytes moved, counted at the destination's element size
    descriptors: int = 0  # DMA: contiguous segments, i.e. transfer_bytes / descriptor_bytes
    descriptor_bytes: int = 0  # DMA: length of a segment contiguous on both sides


class Allocation(NamedTuple):
    """A buffer came to life (`live`) or died; `number` is that of the next instruction."""

    number: int
    live: bool
    buffer: int
    name: str
    space: str
    bytes_per_partition: int  # HBM: bytes of the whole tensor
    banks: tuple[int, int]  # as in Access
    address: int = -1  # first byte in each partition, where the kernel chose it


Event = Instruction | Allocation
Listener = Callable[[Event], None]
