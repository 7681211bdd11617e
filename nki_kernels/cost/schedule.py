"""When everything happens: engines and DMA queues in parallel, as far as data, buffers, PSUM banks and shared
ports allow.

Rules, all of them documented: every engine issues its instructions in program order; an instruction keeps its
engine busy for the cycles of `costs`, and its result can be used RESULT_LATENCY_CYCLES later; sums in PSUM
follow one another without waiting; a DMA starts 1.3 us after what it waits for and shares 16 engines with the
others; on NeuronCore-v2, VectorE and ScalarE take turns at PSUM, and VectorE and GpSimdE at SBUF. Not
modelled: instruction fetch, activation table loads, HBM bank conflicts, the compiler's own reordering.
"""

from __future__ import annotations

from typing import NamedTuple

from nki_kernels.cost.constants import DMA_START_NS, RESULT_LATENCY_CYCLES, Constants
from nki_kernels.cost.costs import dma_engine_ns, dma_engines_used, engine_cycles, touches_psum
from nki_kernels.cost.hazards import START, Hazards, Stamp
from nki_kernels.cost.pipe import Pipe
from nki_kernels.simulator.trace import (
    DMA,
    GPSIMD,
    SCALAR,
    TENSOR,
    VECTOR,
    Access,
    Allocation,
    Event,
    Instruction,
)
from nki_kernels.targets import Target

PSUM_PORT, SBUF_PORT = "psum port", "sbuf port"


class Slot(NamedTuple):
    """One instruction in time. `ready_ns` is the stamp of `cause`, the instruction that it waited for last
    (-1: none).
    """

    engine: str
    op: str
    ready_ns: float
    start_ns: float
    end_ns: float
    cause: int
    partitions: tuple[int, int]  # that it writes


class Scheduler:
    """A listener that places every instruction as it comes; `slots` is the timeline, in program order."""

    def __init__(self, target: Target, constants: Constants) -> None:
        self.target, self.constants = target, constants
        self.slots: list[Slot] = []
        self.pipe = Pipe()
        self.busy_ns = dict.fromkeys((TENSOR, VECTOR, SCALAR, GPSIMD), 0.0)
        self._hazards = Hazards(target)
        self._free: dict[str, Stamp] = dict.fromkeys((*self.busy_ns, PSUM_PORT, SBUF_PORT), START)
        self._ghz = {
            TENSOR: target.tensor_ghz,
            VECTOR: target.vector_ghz,
            SCALAR: target.scalar_ghz,
            GPSIMD: target.gpsimd_ghz,
        }
        self._result_latency_ns = RESULT_LATENCY_CYCLES / target.scalar_ghz

    def __call__(self, event: Event) -> None:
        if isinstance(event, Allocation):
            self._hazards.allocation(event)
        elif event.engine == DMA:
            self._transfer(event)
        else:
            self._compute(event)

    def _operands_ready(self, event: Instruction) -> Stamp:
        """When data and destination allow the instruction to start."""
        ready = START
        for access in event.reads:
            ready = max(ready, self._hazards.before_read(access))
        # Onto its own sum TensorE goes on without a wait; who reads the sum waits for the last of them.
        if event.accumulate:
            return ready
        for access in event.writes:
            written, read = self._hazards.before_write(access)
            if written[1] >= 0 and self._needs_no_wait(event, access, self.slots[written[1]]):
                written = START
            ready = max(ready, written, read)
        return ready

    @staticmethod
    def _needs_no_wait(event: Instruction, access: Access, writer: Slot) -> bool:
        """An engine's own writes stay in order; writes to other partitions do not conflict."""
        own = writer.engine == event.engine != DMA
        first, end = writer.partitions
        return own or access.partitions[1] <= first or end <= access.partitions[0]

    def _ports(self, event: Instruction) -> tuple[str, ...]:
        """What a v2 engine shares while it works."""
        if self.target.generation > 2 or event.engine == TENSOR:
            return ()
        ports = []
        # GpSimdE cannot reach PSUM at all; ScalarE has its own way into SBUF.
        if event.engine != GPSIMD and touches_psum(event):
            ports.append(PSUM_PORT)
        if event.engine != SCALAR:
            ports.append(SBUF_PORT)
        return tuple(ports)

    def _compute(self, event: Instruction) -> None:
        ready = self._operands_ready(event)
        held = (event.engine, *self._ports(event))
        for name in held:
            ready = max(ready, self._free[name])
        busy = engine_cycles(event) / self._ghz[event.engine]
        if event.reads and event.reads[0].dtype == "int8":
            busy *= self.constants.cast_factor
        self.busy_ns[event.engine] += busy
        end = ready[0] + busy
        self._place(event, ready, ready[0], end, end + self._result_latency_ns)
        for name in held:
            self._free[name] = (end, len(self.slots) - 1)

    def _transfer(self, event: Instruction) -> None:
        ready = self._operands_ready(event)
        start = ready[0] + DMA_START_NS
        work = dma_engine_ns(event, self.target, self.constants)
        end = self.pipe.reserve(start, work / self.target.dma_engines)
        # Two limits: the engines together, which all transfers share, and the few engines that one transfer
        # uses.
        end = max(end, start + work / dma_engines_used(event, self.target))
        self._place(event, ready, start, end, end)

    def _place(self, event: Instruction, ready: Stamp, start: float, end: float, visible: float) -> None:
        number = len(self.slots)
        self.slots.append(
            Slot(event.engine, event.op, ready[0], start, end, ready[1], event.writes[0].partitions)
        )
        self._hazards.after(event.reads, event.writes, (end, number), (visible, number))
