"""The memories of one simulated core: who holds what, up to the capacity of the target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from nki_kernels.simulator import trace
from nki_kernels.simulator.dtypes import fill_unwritten
from nki_kernels.simulator.rules import CapacityError, require
from nki_kernels.simulator.trace import HBM, PSUM, SBUF, Allocation, Listener
from nki_kernels.simulator.views import Names
from nki_kernels.targets import PMAX, Target

# State of an element. A PSUM element that a matmul wrote can be added to; one that was read since starts no
# new sum by itself.
UNWRITTEN, WRITTEN, BY_MATMUL, MATMUL_READ = 0, 1, 2, 3


class Storage:
    """One allocated buffer. It lives until no tensor refers to it any more: CPython's reference count is the
    scope rule.

    `data` and `state` are flat arrays with one entry per element, or None in a dry run. `state` is None for
    kernel inputs, which are written throughout and may not be written again.
    """

    __slots__ = (
        "acquired",
        "banks",
        "bytes_per_partition",
        "data",
        "dtype",
        "dtype_name",
        "identity",
        "machine",
        "name",
        "shape",
        "space",
        "state",
    )

    def __init__(
        self, machine: Machine, shape: tuple[int, ...], dtype: np.dtype, space: str, name: str
    ) -> None:
        self.machine, self.shape, self.dtype, self.space = machine, shape, dtype, space
        self.dtype_name = dtype.name  # numpy computes it anew each time, which shows in a trace of millions
        self.identity = machine.next_identity()
        self.name = name or f"{space}{self.identity}"
        self.bytes_per_partition = math.prod(shape if space.endswith(HBM) else shape[1:]) * dtype.itemsize
        self.banks = (0, 0)
        self.data: np.ndarray | None = None
        self.state: np.ndarray | None = None
        self.acquired = False  # a buffer that did not fit has nothing to give back
        machine.acquire(self)
        self.acquired = True

    def fill(self) -> None:
        """Give the buffer contents: unwritten ones."""
        size = math.prod(self.shape)
        self.data = np.empty(size, self.dtype)
        self.state = np.zeros(size, np.uint8)
        fill_unwritten(self.data)

    def __del__(self) -> None:
        if self.acquired:
            self.machine.release(self)


class Machine:
    """The state of one run: target, listeners, live buffers and their peak."""

    def __init__(
        self,
        target: Target,
        listeners: Sequence[Listener] = (),
        dry: bool = False,
        api: str = "0.6",
        names: Names | None = None,
    ) -> None:
        """`names`: where the run keeps the rules of the language, the names that its tensors may not have."""
        self.target, self.listeners, self.dry, self.api = target, tuple(listeners), dry, api
        self.names, self.language = names, names is not None
        self.instructions = 0
        self._identities = 0
        self._live: dict[int, tuple[str, int]] = {}  # SBUF: identity -> name, bytes per partition
        self._banks: list[str | None] = [None] * target.psum_banks
        self._next_bank = 0
        self.sbuf_live_bytes = 0
        self.sbuf_peak_bytes = 0
        self.psum_peak_banks = 0

    def next_identity(self) -> int:
        self._identities += 1
        return self._identities

    def allocate(self, shape: Sequence[int], dtype: np.dtype, space: str, name: str) -> Storage:
        """A new buffer; on-chip ones are held against the capacity of the target."""
        shape = tuple(int(size) for size in shape)
        require(all(size > 0 for size in shape), f"tensor shapes must be positive, got {shape}")
        if space in (SBUF, PSUM):
            require(
                len(shape) >= 2,
                "SBUF and PSUM tensors must have at least 2 dimensions (partition-dim and free-dim)",
            )
            require(
                shape[0] <= PMAX, f"number of partitions {shape[0]} exceed architecture limitation of {PMAX}"
            )
        storage = Storage(self, shape, np.dtype(dtype), space, name)
        if not self.dry:
            storage.fill()
        return storage

    def acquire(self, storage: Storage) -> None:
        if storage.space == SBUF:
            self._acquire_sbuf(storage)
        elif storage.space == PSUM:
            self._acquire_banks(storage)
        self._announce(storage, True)

    def release(self, storage: Storage) -> None:
        if storage.space == SBUF:
            del self._live[storage.identity]
            self.sbuf_live_bytes -= storage.bytes_per_partition
        for bank in range(*storage.banks):
            self._banks[bank] = None
        self._announce(storage, False)

    def _announce(self, storage: Storage, live: bool) -> None:
        space = HBM if storage.space.endswith(HBM) else storage.space
        for listener in self.listeners:
            listener(
                Allocation(
                    self.instructions,
                    live,
                    storage.identity,
                    storage.name,
                    space,
                    storage.bytes_per_partition,
                    storage.banks,
                )
            )

    def _acquire_sbuf(self, storage: Storage) -> None:
        wanted = self.sbuf_live_bytes + storage.bytes_per_partition
        usable = self.target.sbuf_usable_bytes
        if wanted > usable:
            raise CapacityError(
                f"SBUF on {self.target.name}: expected at most {usable} bytes per partition, found {wanted} with '{storage.name}' "
                f"({storage.bytes_per_partition}); shrink a tile of the plan. Held: {self.holders(SBUF)}"
            )
        self._live[storage.identity] = (storage.name, storage.bytes_per_partition)
        self.sbuf_live_bytes = wanted
        self.sbuf_peak_bytes = max(self.sbuf_peak_bytes, wanted)

    def _acquire_banks(self, storage: Storage) -> None:
        """The next free run of banks after the last one given out, so that consecutive tiles rotate through
        PSUM.
        """
        count = -(-storage.bytes_per_partition // self.target.psum_bank_bytes)
        total = self.target.psum_banks
        for step in range(total):
            first = (self._next_bank + step) % total
            if first + count <= total and not any(self._banks[first : first + count]):
                storage.banks = (first, first + count)
                self._banks[first : first + count] = [storage.name] * count
                self._next_bank = (first + count) % total
                self.psum_peak_banks = max(
                    self.psum_peak_banks, sum(bank is not None for bank in self._banks)
                )
                return
        raise CapacityError(
            f"PSUM on {self.target.name}: expected {count} free banks in a row for '{storage.name}', found none of {total}; "
            f"let a tile go first. Held: {self.holders(PSUM)}"
        )

    def holders(self, space: str) -> str:
        """Who holds what, largest first, e.g. `wide 65536 B, ring0 8192 B`."""
        if space == PSUM:
            return ", ".join(f"bank {bank} {name}" for bank, name in enumerate(self._banks) if name)
        ranked = sorted(self._live.values(), key=lambda held: -held[1])
        return ", ".join(f"{name} {size} B" for name, size in ranked)

    def emit(self, instruction: trace.Instruction) -> None:
        """Number the instruction and tell every listener."""
        for listener in self.listeners:
            listener(instruction)
        self.instructions += 1


_machines: list[Machine] = []


def current() -> Machine:
    """The machine of the running simulation."""
    if not _machines:
        raise RuntimeError(
            "NKI calls need a running simulation: call simulate(kernel)(...), not kernel(...)."
        )
    return _machines[-1]


def is_running() -> bool:
    """Whether a kernel is being simulated."""
    return bool(_machines)


@contextmanager
def running(machine: Machine) -> Iterator[Machine]:
    """Make `machine` the current one."""
    _machines.append(machine)
    try:
        yield machine
    finally:
        _machines.pop()
