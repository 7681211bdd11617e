"""The memories of one simulated core: who holds what, up to the capacity of the target.

A tensor lies where the kernel puts it (`address`), or wherever there is room. Tensors that were put on the
same bytes may not be in use together: the first write to one destroys the others, and who uses a destroyed
tensor is refused.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from nki_kernels.simulator import trace
from nki_kernels.simulator.arithmetic import fill_unwritten
from nki_kernels.simulator.rules import CapacityError, Names, require
from nki_kernels.simulator.trace import HBM, PSUM, SBUF, Allocation, Listener
from nki_kernels.targets import PMAX, Target

# State of an element. A PSUM element that a matmul wrote can be added to; one that was read since starts no
# new sum by itself.
# In this order: checks look at the lowest and the highest state of a tensor.
UNWRITTEN, WRITTEN, BY_MATMUL, MATMUL_READ = 0, 1, 2, 3


class Storage:
    """One allocated buffer. It lives until no tensor refers to it any more: CPython's reference count is the
    scope rule.

    `data` and `state` are flat arrays with one entry per element, or None in a dry run. `state` is None for
    kernel inputs, which are written throughout and may not be written again.
    """

    __slots__ = (
        "__weakref__",
        "acquired",
        "address",
        "banks",
        "bytes_per_partition",
        "data",
        "destroyed_by",
        "dtype",
        "dtype_name",
        "identity",
        "machine",
        "name",
        "neighbours",
        "shape",
        "space",
        "state",
        "written",
    )

    def __init__(
        self,
        machine: Machine,
        shape: tuple[int, ...],
        dtype: np.dtype,
        space: str,
        name: str,
        address: int = -1,
    ) -> None:
        self.machine, self.shape, self.dtype, self.space = machine, shape, dtype, space
        self.dtype_name = dtype.name  # numpy computes it anew each time, which shows in a trace of millions
        self.identity = machine.next_identity()
        self.name = name or f"{space}{self.identity}"
        self.bytes_per_partition = math.prod(shape if space.endswith(HBM) else shape[1:]) * dtype.itemsize
        self.banks = (0, 0)
        self.address = address  # first byte in each partition, or -1 where the kernel did not say
        self.written = False
        self.destroyed_by = ""  # who wrote on the same bytes, after this one was written
        self.neighbours: list[weakref.ref[Storage]] = []  # on the same bytes, and not destroyed yet
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

    def note_write(self, first_byte: int, end_byte: int) -> None:
        """Bytes [first, end) of every partition are written: who else lies there has lost its contents."""
        self.written = True
        kept = []
        for reference in self.neighbours:
            other = reference()
            if other is None:
                continue
            # Where this buffer begins, counted in bytes of the other one.
            at = self.address - other.address
            overlaps = at + first_byte < other.bytes_per_partition and at + end_byte > 0
            if other.written and overlaps:
                other.destroyed_by = self.name
            else:
                kept.append(reference)
        self.neighbours = kept

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
        # Geometries of the operands of matmuls that were checked.
        self.passed: set[tuple[object, ...]] = set()
        self._identities = 0
        self._live: dict[int, tuple[str, int]] = {}  # SBUF: identity -> name, bytes per partition
        self._banks: list[str | None] = [None] * target.psum_banks
        self._next_bank = 0
        self._placed: dict[str, dict[int, weakref.ref[Storage]]] = {SBUF: {}, PSUM: {}}
        self._placed_end = 0  # highest byte of SBUF that the kernel put something on
        self.sbuf_live_bytes = 0
        self.sbuf_peak_bytes = 0
        self.psum_peak_banks = 0

    def next_identity(self) -> int:
        self._identities += 1
        return self._identities

    def allocate(
        self,
        shape: Sequence[int],
        dtype: np.dtype,
        space: str,
        name: str,
        address: tuple[int, int] | None = None,
    ) -> Storage:
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
        offset = -1 if address is None else self._checked_offset(space, address, np.dtype(dtype))
        storage = Storage(self, shape, np.dtype(dtype), space, name, offset)
        if not self.dry:
            storage.fill()
        return storage

    def _checked_offset(self, space: str, address: tuple[int, int], dtype: np.dtype) -> int:
        """The byte offset of an `address` of nl.ndarray, if it is one."""
        require(space in (SBUF, PSUM), f"an address needs a tensor in sbuf or psum, got one in {space}")
        partition, offset = address
        require(
            type(partition) is int and type(offset) is int and offset >= 0,
            f"address must be (partition, byte offset), two Python integers, got {address}",
        )
        require(
            partition == 0, f"address partition {partition} is not modelled, put the tensor on partition 0"
        )
        step = dtype.itemsize if space == SBUF else self.target.psum_bank_bytes
        require(
            offset % step == 0,
            f"address offset {offset} must be a multiple of {step}: "
            + ("the element size" if space == SBUF else "a PSUM tensor begins with a bank"),
        )
        return offset

    def acquire(self, storage: Storage) -> None:
        if storage.address >= 0:
            self._put(storage)
        elif storage.space == SBUF:
            self._acquire_sbuf(storage)
        elif storage.space == PSUM:
            self._acquire_banks(storage)
        self._announce(storage, True)

    def _put(self, storage: Storage) -> None:
        """Where the kernel says; remember who else is there."""
        first, end = storage.address, storage.address + storage.bytes_per_partition
        if storage.space == SBUF:
            self._placed_end = max(self._placed_end, end)
            self._hold_sbuf(storage, 0)
        else:
            size, total = self.target.psum_bank_bytes, self.target.psum_banks
            storage.banks = (first // size, -(-end // size))
            if storage.banks[1] > total:
                raise CapacityError(
                    f"PSUM on {self.target.name}: expected banks below {total}, found '{storage.name}' in "
                    f"banks {storage.banks[0]} to {storage.banks[1] - 1}; put it lower."
                )
        placed = self._placed[storage.space]
        for reference in list(placed.values()):
            other = reference()
            if (
                other is not None
                and other.address < end
                and first < other.address + other.bytes_per_partition
            ):
                # Both ways: whichever is written last destroys the other.
                storage.neighbours.append(reference)
                other.neighbours.append(weakref.ref(storage))
        placed[storage.identity] = weakref.ref(storage)
        if storage.space == PSUM:
            self.psum_peak_banks = max(self.psum_peak_banks, self._held_banks())

    def _held_banks(self) -> int:
        """PSUM banks that somebody holds."""
        held = {bank for bank, name in enumerate(self._banks) if name}
        for reference in self._placed[PSUM].values():
            other = reference()
            if other is not None and not other.destroyed_by:
                held.update(range(*other.banks))
        return len(held)

    def release(self, storage: Storage) -> None:
        if storage.address >= 0:
            self._placed[storage.space].pop(storage.identity, None)
            self._announce(storage, False)
            return
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
                    storage.address,
                )
            )

    def _acquire_sbuf(self, storage: Storage) -> None:
        self._hold_sbuf(storage, storage.bytes_per_partition)
        self._live[storage.identity] = (storage.name, storage.bytes_per_partition)

    def _hold_sbuf(self, storage: Storage, more: int) -> None:
        """Count what is put somewhere by its end, and the rest by size."""
        wanted = self.sbuf_live_bytes + more + self._placed_end
        usable = self.target.sbuf_usable_bytes
        if wanted > usable:
            raise CapacityError(
                f"SBUF on {self.target.name}: expected at most {usable} bytes per partition, found {wanted} "
                f"with '{storage.name}' "
                f"({storage.bytes_per_partition}); shrink a tile of the plan. Held: {self.holders(SBUF)}"
            )
        self.sbuf_live_bytes += more
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
            f"PSUM on {self.target.name}: expected {count} free banks in a row for '{storage.name}', found "
            f"none of {total}; let a tile go first. Held: {self.holders(PSUM)}"
        )

    def holders(self, space: str) -> str:
        """Who holds what, largest first, e.g. `wide 65536 B, ring0 8192 B`."""
        if space == PSUM:
            return ", ".join(f"bank {bank} {name}" for bank, name in enumerate(self._banks) if name)
        placed = [
            storage for storage in (reference() for reference in self._placed[SBUF].values()) if storage
        ]
        held = [*self._live.values(), *((storage.name, storage.bytes_per_partition) for storage in placed)]
        ranked = sorted(held, key=lambda held: -held[1])
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
