"""Checks that every instruction shares, and the record that it leaves."""

from __future__ import annotations

import functools
from typing import NoReturn

import numpy as np

from nki_kernels.simulator.arithmetic import round_to
from nki_kernels.simulator.memory import WRITTEN, current
from nki_kernels.simulator.rules import refuse, require
from nki_kernels.simulator.tensor import Tensor, merged_dims
from nki_kernels.simulator.trace import PSUM, SBUF, Instruction

ON_CHIP = (SBUF, PSUM)
FREE_DIMS_MAX = 4
DIM_SIZE_MAX, STRIDE_MAX = 2**16 - 1, 2**15 - 1  # fields of an access pattern, in elements
FREE_ELEMENTS_MAX = {SBUF: 64 * 1024, PSUM: 4 * 1024}


def check_operand(op: str, name: str, tensor: object, spaces: tuple[str, ...] = ON_CHIP) -> Tensor:
    """An on-chip operand of a compute engine: buffer, partitions, start partition and access pattern."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op} {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.buffer not in spaces:
        refuse(f"{op} {name} must be in {list(spaces)}, got {tensor.buffer}")
    if len(tensor.shape) < 2:
        refuse(f"{op} {name} must have at least 2 dimensions (partition-dim and free-dim), got {tensor.ndim}")
    count = tensor.shape[0]
    check_start_partition(op, name, tensor.access.partitions[0], count)
    elements, limit = tensor.size // count, FREE_ELEMENTS_MAX[tensor.buffer]
    if elements > limit:
        refuse(
            f"{op} {name} has {elements} elements per partition, at most {limit} are possible in "
            f"{tensor.buffer}"
        )
    _check_access_pattern(op, name, tensor.shape[1:], tensor.strides[1:])
    return tensor


def geometry(tensor: Tensor) -> tuple[object, ...]:
    """All that the checks of an operand look at: what passed once passes again."""
    storage, access = tensor.storage, tensor.access
    return (
        storage.space,
        storage.dtype_name,
        tensor.shape,
        tensor.strides,
        access.partitions[0],
        access.banks,
    )


@functools.lru_cache(maxsize=4096)
def _check_access_pattern(op: str, name: str, sizes: tuple[int, ...], strides: tuple[int, ...]) -> None:
    dims = merged_dims(sizes, strides)
    if len(dims) > FREE_DIMS_MAX:
        refuse(
            f"{op} {name} needs {len(dims)} free dimensions in its access pattern, at most {FREE_DIMS_MAX} "
            "are possible"
        )
    size, stride = max(size for size, _ in dims), max(stride for _, stride in dims)
    if size > DIM_SIZE_MAX:
        refuse(
            f"{op} {name} has a free dimension of {size} elements in its access pattern, at most "
            f"{DIM_SIZE_MAX} are possible"
        )
    if stride > STRIDE_MAX:
        refuse(
            f"{op} {name} has a stride of {stride} elements in its access pattern, at most {STRIDE_MAX} are "
            "possible"
        )


def check_start_partition(op: str, name: str, start: int, count: int) -> None:
    """Engines reach P partitions from 0; up to 64 from 0 or 64; up to 32 from any multiple of 32."""
    if start == 0:
        return
    allowed = (0,) if count > 64 else (0, 64) if count > 32 else (0, 32, 64, 96)
    told = f"start partition {start} is not possible for {count} partitions"
    require(start in allowed, f"{op} {name}: {told}, expected one of {list(allowed)}")


def check_same_partitions(op: str, dst: Tensor, *sources: tuple[str, Tensor]) -> None:
    for name, source in sources:
        require(
            source.shape[0] == dst.shape[0],
            f"{op} operands must have the same number of partitions, got {name}={source.shape[0]}, "
            f"dst={dst.shape[0]}",
        )


def check_same_free_size(op: str, dst: Tensor, *sources: tuple[str, Tensor]) -> None:
    for name, source in sources:
        have, want = source.size // source.shape[0], dst.size // dst.shape[0]
        require(
            have == want,
            f"{op} operands must have the same number of elements per partition, got {name}={have}, "
            f"dst={want}",
        )


def check_not_both_psum(op: str, first: tuple[str, Tensor], second: tuple[str, Tensor]) -> None:
    both = first[1].buffer == PSUM and second[1].buffer == PSUM
    require(not both, f"{op} {first[0]} and {second[0]} may not both be in psum; copy one to sbuf first")


def as_float(tensor: Tensor) -> np.ndarray:
    """Contents in fp32, as `[partitions, elements per partition]`."""
    return tensor.read().astype(np.float32).reshape(tensor.shape[0], -1)


def store(dst: Tensor, values: np.ndarray, state: int = WRITTEN) -> None:
    """Round fp32 results to the destination's element type and write them."""
    dst.write(round_to(values, dst.dtype), state)


def _refuse_destroyed(op: str, operand: Tensor) -> NoReturn:
    """Two tensors on the same bytes are in use together."""
    storage = operand.storage
    refuse(
        f"{op} uses '{storage.name}' in {storage.space} from byte {storage.address} on, but "
        f"'{storage.destroyed_by}' "
        "lies on the same bytes and was written since; put one of them elsewhere, or use the first up before"
    )


def record(
    engine: str, op: str, dst: Tensor, *sources: Tensor | None, function: str = "", **figures: int | bool
) -> None:
    """Leave the instruction in the trace; absent operands are left out."""
    machine = current()
    for operand in (dst, *sources):
        if operand is not None and operand.storage.destroyed_by:
            _refuse_destroyed(op, operand)
    # Without neighbours only the first write changes anything, and there are millions.
    if dst.storage.neighbours or not dst.storage.written:
        dst.storage.note_write(*dst.access.span)
    reads = tuple(source.access for source in sources if source is not None)
    where, writes = machine.instructions, (dst.access,)
    instruction = Instruction(
        where,
        engine,
        op,
        reads,
        writes,
        function=function,
        **figures,  # type: ignore[arg-type]
    )
    machine.emit(instruction)
