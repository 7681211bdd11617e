"""What a run did, counted exactly from its trace. Counts add, subtract and scale field by field: totals of
several launches, and steady-state extrapolation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from nki_kernels.cost.costs import engine_cycles
from nki_kernels.simulator.trace import DMA, HBM, TENSOR, Access, Allocation, Event, Instruction
from nki_kernels.targets import PMAX

Self = TypeVar("Self", bound="Additive")


@dataclasses.dataclass(frozen=True)
class Additive:
    """Base: every field is a number or itself additive."""

    def _combine(self: Self, other: Self, operation: Callable[[Any, Any], Any]) -> Self:
        names = [field.name for field in dataclasses.fields(self)]
        return type(self)(*(operation(getattr(self, name), getattr(other, name)) for name in names))

    def __add__(self: Self, other: Self) -> Self:
        return self._combine(other, lambda a, b: a + b)

    def __sub__(self: Self, other: Self) -> Self:
        return self._combine(other, lambda a, b: a - b)

    def __mul__(self: Self, count: float) -> Self:
        return self._combine(self, lambda a, _: a * count)


@dataclasses.dataclass(frozen=True)
class EngineCount(Additive):
    """Instructions of one engine and the cycles, at its own clock, that they keep it busy."""

    instructions: int = 0
    cycles: int = 0


@dataclasses.dataclass(frozen=True)
class Counters(Additive):
    """Totals of one launch or, added up, of several."""

    tensor: EngineCount = EngineCount()
    vector: EngineCount = EngineCount()
    scalar: EngineCount = EngineCount()
    gpsimd: EngineCount = EngineCount()
    flops: int = 0  # useful: 2 K M N of every matmul
    # What the 128 x 128 array could have done in the cycles that matmuls and transposes took.
    flops_issued: int = 0
    dma_transfers: int = 0
    dma_descriptors: int = 0
    dma_bytes: int = 0
    hbm_read_bytes: int = 0
    hbm_write_bytes: int = 0
    hbm_unique_bytes: int = 0  # each region counted once, however often it crossed

    @property
    def hbm_bytes(self) -> int:
        """All traffic with HBM."""
        return self.hbm_read_bytes + self.hbm_write_bytes

    @property
    def row_bytes(self) -> float:
        """Mean length of a contiguous DMA row."""
        return self.dma_bytes / max(1, self.dma_descriptors)

    @property
    def intensity(self) -> float:
        """Useful FLOPs per byte of HBM traffic."""
        return self.flops / max(1, self.hbm_bytes)


SUMS = (
    "flops",
    "flops_issued",
    "dma_transfers",
    "dma_descriptors",
    "dma_bytes",
    "hbm_read_bytes",
    "hbm_write_bytes",
)


class Counting:
    """A listener that counts; ask `result()` when the run is over.

    Unique bytes: a region is a box of a tensor; regions that overlap without being the same are both counted,
    up to the tensor's size.
    """

    def __init__(self) -> None:
        self._engines: dict[str, list[int]] = {}
        self._sums: dict[str, Any] = dict.fromkeys(SUMS, 0)
        self._tensor_bytes: dict[int, int] = {}
        self._regions: dict[int, dict[tuple, int]] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Allocation):
            if event.space == HBM:
                self._tensor_bytes[event.buffer] = event.bytes_per_partition
        elif event.engine == DMA:
            self._transfer(event)
        else:
            self._compute(event)

    def _compute(self, event: Instruction) -> None:
        cycles = engine_cycles(event)
        count = self._engines.setdefault(event.engine, [0, 0])
        count[0] += 1
        count[1] += cycles
        if event.engine == TENSOR:
            self._sums["flops"] += event.flops
            # A column a cycle through the whole array: 128 x 128 multiplications and additions.
            self._sums["flops_issued"] += 2 * PMAX * PMAX * cycles

    def _transfer(self, event: Instruction) -> None:
        self._sums["dma_transfers"] += 1
        self._sums["dma_descriptors"] += event.descriptors
        self._sums["dma_bytes"] += event.transfer_bytes
        self._touch("hbm_read_bytes", event.reads[0])
        self._touch("hbm_write_bytes", event.writes[0])

    def _touch(self, total: str, access: Access) -> None:
        if access.space == HBM:
            size = access.elements * access.itemsize
            self._sums[total] += size
            self._regions.setdefault(access.buffer, {})[access.span, access.shape] = size

    def result(self) -> Counters:
        """The totals so far."""
        unique = sum(
            min(sum(regions.values()), self._tensor_bytes[buffer])
            for buffer, regions in self._regions.items()
        )
        totals: dict[str, Any] = {name: EngineCount(*counts) for name, counts in self._engines.items()}
        return Counters(**totals, **self._sums, hbm_unique_bytes=unique)
