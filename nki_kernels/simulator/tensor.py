"""A strided view of a buffer: geometry first, contents only when an instruction asks for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nki_kernels.simulator.memory import BY_MATMUL, MATMUL_READ, UNWRITTEN, Storage
from nki_kernels.simulator.rules import (
    INDEXED,
    PATTERN,
    SLICED,
    WHOLE,
    UninitializedError,
    refuse,
    refuse_view_of,
    refuse_word,
    require,
)
from nki_kernels.simulator.trace import HBM, PSUM, SBUF, Access

Key = Any  # int, slice, Ellipsis, or a tuple of them


class Tensor:
    """`shape`, `strides` and `offset` (in elements) over a `Storage`; indexing and reshaping give new views,
    never copies.
    """

    __slots__ = ("_access", "offset", "shape", "storage", "strides", "view")

    def __init__(
        self,
        storage: Storage,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int = 0,
        view: int = WHOLE,
    ) -> None:
        self.storage, self.shape, self.strides, self.offset = storage, shape, strides, offset
        self.view = view
        self._access: Access | None = None

    @classmethod
    def whole(cls, storage: Storage) -> Tensor:
        """All of a buffer, row-major."""
        return cls(storage, storage.shape, row_major(storage.shape))

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    @property
    def buffer(self) -> str:
        return self.storage.space

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def on_chip(self) -> bool:
        return self.storage.space in (SBUF, PSUM)

    def __getitem__(self, key: Key) -> Tensor:
        if self.view != WHOLE and self.storage.machine.language:
            refuse_view_of(self.view)
        keys = _expand(key, self.ndim)
        shape, strides, offset = [], [], self.offset
        for dim, (index, size, stride) in enumerate(zip(keys, self.shape, self.strides, strict=True)):
            first, count, step = self._range(index, dim, size)
            offset += first * stride
            if count is not None:
                shape.append(count)
                strides.append(stride * step)
        view = SLICED if len(shape) == len(keys) else INDEXED
        return Tensor(self.storage, tuple(shape), tuple(strides), offset, view)

    def _range(self, index: int | slice, dim: int, size: int) -> tuple[int, int | None, int]:
        """First index, count (None for an integer, which drops the dimension) and step; out of bounds is
        refused, never clipped.
        """
        if not isinstance(index, slice):
            if dim == 0 and self.on_chip:
                refuse(f"the partition dimension of '{self.name}' must be sliced, got the index {index}")
            self._check_bounds(index, index, dim, size)
            return index, None, 1
        first = 0 if index.start is None else index.start
        stop = size if index.stop is None else index.stop
        if index.step not in (None, 1):
            return self._strided_range(slice(first, stop, index.step), dim, size)
        if stop <= first:
            refuse(f"empty slice [{first}, {stop}) on dimension {dim} of '{self.name}'")
        self._check_bounds(first, stop - 1, dim, size)
        return first, stop - first, 1

    def _strided_range(self, index: slice, dim: int, size: int) -> tuple[int, int, int]:
        """As `_range`, for a step other than 1."""
        if self.storage.machine.language:
            refuse_word("strided slice")
        on_partitions = self.on_chip and dim == 0
        require(
            not on_partitions,
            f"no stride is possible on the partition dimension of '{self.name}', got step {index.step}",
        )
        require(
            index.step > 0,
            f"slices must have a positive step, got {index.step} on dimension {dim} of '{self.name}'",
        )
        count = len(range(index.start, index.stop, index.step))
        require(count > 0, f"empty slice [{index.start}, {index.stop}) on dimension {dim} of '{self.name}'")
        self._check_bounds(index.start, index.start + (count - 1) * index.step, dim, size)
        return index.start, count, index.step

    def _check_bounds(self, first: int, last: int, dim: int, size: int) -> None:
        if first < 0 or last >= size:
            refuse(
                f"Out-of-bound access for tensor `{self.name}` on dimension {dim}: "
                f"index range [{first}, {last}] exceed dimension size of {size}"
            )

    def reshape(self, shape: Sequence[int]) -> Tensor:
        """The same elements in the same order; refused where that would need a copy."""
        shape = tuple(shape)
        if self.view != WHOLE and self.storage.machine.language:
            refuse_word("reshape of a slice")
        require(
            math.prod(shape) == self.size,
            f"reshape must keep the number of elements, got {self.shape} -> {shape}",
        )
        # A partition is a memory of its own: on chip only the free dimensions can be cut anew.
        if self.on_chip:
            require(
                shape[0] == self.shape[0],
                f"Partition dim size must be preserved, got {self.shape[0]} -> {shape[0]}",
            )
            free = _restride(self.shape[1:], self.strides[1:], shape[1:])
            strides = None if free is None else (self.strides[0], *free)
        else:
            strides = _restride(self.shape, self.strides, shape)
        require(
            strides is not None,
            f"reshape of '{self.name}' {self.shape} -> {shape} would copy: its elements are not contiguous",
        )
        assert strides is not None
        return Tensor(self.storage, shape, strides, self.offset)

    def ap(self, pattern: Sequence[Sequence[int]], offset: int = 0, dtype: Any = None) -> Tensor:
        """A view by an access pattern over the whole tensor: [step, count] of each dimension, in elements,
        the first one from row to row of partitions. Another element type is not modelled.
        """
        if self.view != WHOLE and self.storage.machine.language:
            refuse_word("pattern of a slice")
        require(dtype in (None, self.dtype), f"ap of '{self.name}' as {dtype} is not modelled")
        steps = tuple(int(step) for step, _ in pattern)
        counts = tuple(int(count) for _, count in pattern)
        # Elements of a partition: an offset on chip is so many rows of them and a rest. HBM is one row.
        row = math.prod(self.shape[1:]) if self.on_chip else self.size
        free = list(zip(steps, counts, strict=True))[1 if self.on_chip else 0 :]
        if self.on_chip:
            require(
                steps[0] == row,
                f"no stride is possible on the partition dimension of '{self.name}': expected a first step "
                f"of {row}, a row of the tensor, got {steps[0]}",
            )
            self._check_bounds(offset // row, offset // row + counts[0] - 1, 0, self.shape[0])
        start = offset % row if self.on_chip else offset
        # The pattern's farthest elements to either side must lie in the row.
        low = start + sum((count - 1) * step for step, count in free if step < 0)
        high = start + sum((count - 1) * step for step, count in free if step > 0)
        self._check_bounds(low, high, len(self.shape) - 1, row)
        return Tensor(self.storage, counts, steps, self.offset + offset, PATTERN)

    def _refuse_arithmetic(self, _other: object) -> Tensor:
        if self.storage.machine.language:
            refuse_word("arithmetic", self.name)
        raise TypeError(f"tensors have no Python arithmetic: use nki.isa instructions on '{self.name}'")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = (
        _refuse_arithmetic
    )
    __matmul__ = __floordiv__ = __mod__ = __pow__ = _refuse_arithmetic

    def _numpy(self, flat: np.ndarray) -> np.ndarray:
        item = flat.itemsize
        return np.ndarray(
            self.shape, flat.dtype, flat, self.offset * item, tuple(stride * item for stride in self.strides)
        )

    def read(self) -> np.ndarray:
        """The contents as stored; refuses what was never written. Marks matmul results as read."""
        storage = self.storage
        assert storage.data is not None
        if storage.state is not None:
            state = self._numpy(storage.state)
            if state.min() == UNWRITTEN:
                where = [int(axis[0]) for axis in np.nonzero(state == UNWRITTEN)]
                raise UninitializedError(
                    f"'{self.name}' {self.shape}: expected written memory, found element {where} unwritten; "
                    "write it before it is read"
                )
            if storage.space == PSUM:
                state[state == BY_MATMUL] = MATMUL_READ
        return self._numpy(storage.data)

    def write(self, values: np.ndarray, state: int) -> None:
        """Store `values` (already of this dtype) and remember by whom."""
        storage = self.storage
        assert storage.data is not None and storage.state is not None
        self._numpy(storage.data)[...] = values.reshape(self.shape)
        self._numpy(storage.state)[...] = state

    def states(self) -> tuple[int, int]:
        """Lowest and highest state among the elements."""
        assert self.storage.state is not None
        state = self._numpy(self.storage.state)
        return int(state.min()), int(state.max())

    @property
    def access(self) -> Access:
        """The box that this view covers, for the trace."""
        if self._access is None:
            self._access = self._describe()
        return self._access

    def _describe(self) -> Access:
        storage, item = self.storage, self.storage.dtype.itemsize
        if self.on_chip:
            # An offset on chip is so many rows, one a partition, and a place in the last of them.
            row = storage.bytes_per_partition // item
            partition, start = divmod(self.offset, row)
            partitions = (partition, partition + self.shape[0])
            sizes, strides = self.shape[1:], self.strides[1:]
        else:
            start, partitions, sizes, strides = self.offset, (0, 1), self.shape, self.strides
        last = start + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        return Access(
            storage.identity,
            storage.name,
            storage.space if self.on_chip else HBM,
            storage.dtype_name,
            item,
            self.shape,
            partitions,
            (start * item, (last + 1) * item),
            contiguous_run(sizes, strides) * item,
            self._banks(start * item, (last + 1) * item),
        )

    def _banks(self, first_byte: int, end_byte: int) -> tuple[int, int]:
        if self.storage.space != PSUM:
            return 0, 0
        bank_bytes = self.storage.machine.target.psum_bank_bytes
        base = self.storage.banks[0]
        return base + first_byte // bank_bytes, base + -(-end_byte // bank_bytes)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a fresh tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def contiguous_run(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements follow one another in memory from the last dimension inwards."""
    run = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride != run:
            break
        run *= size
    return run


def merged_dims(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions that an access pattern needs, innermost first, once neighbours that
    form one run are merged.
    """
    dims: list[tuple[int, int]] = []
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    return dims or [(1, 1)]


def _expand(key: Key, ndim: int) -> list[int | slice]:
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (ndim - len(keys) + 1)
    require(len(keys) <= ndim, f"too many indices: expected at most {ndim}, found {len(keys)}")
    return keys + [slice(None)] * (ndim - len(keys))


def _restride(old: Sequence[int], old_strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """Strides of `new` over the elements of `old`, or None where no strides can express it."""
    # As numpy reshapes without a copy: dimensions that form one run may be cut anew, and no cut crosses two
    # runs.
    runs: list[list[int]] = []  # [size, stride] of maximal runs, outermost first
    for size, stride in zip(old, old_strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == stride * size:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    strides: list[int] = []
    left, step = runs[-1] if runs else [1, 1]
    at = len(runs) - 1
    for size in reversed(new):
        if size > 1 and left == 1 and at > 0:
            at -= 1
            left, step = runs[at]
        if size > 1 and left % size:
            return None
        strides.append(step)
        # `left`: how much of the run is not cut up yet; sizes of 1 take nothing from it.
        left, step = left // max(1, size), step * size
    return tuple(reversed(strides))
