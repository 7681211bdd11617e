"""Transfers: `dma_copy` and `dma_transpose`."""

from __future__ import annotations

import math

import numpy as np

from nki_kernels.simulator.arithmetic import round_to
from nki_kernels.simulator.isa.operands import record
from nki_kernels.simulator.memory import WRITTEN, current
from nki_kernels.simulator.rules import require
from nki_kernels.simulator.signatures import dge_mode as dge_modes
from nki_kernels.simulator.signatures import engine as engines
from nki_kernels.simulator.signatures import oob_mode as oob_modes
from nki_kernels.simulator.signatures import versioned
from nki_kernels.simulator.tensor import Tensor
from nki_kernels.simulator.trace import DMA, PSUM

TRANSPOSE_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def _check_end(op: str, name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op} {name} must be a tensor, got {type(tensor).__name__}")
    require(tensor.buffer != PSUM, f"{op} requires HBM or SBUF tensors, got {name} in psum")
    if tensor.on_chip:
        require(
            tensor.ndim >= 2,
            f"{op} {name} must have at least 2 dimensions (partition-dim and free-dim), got {tensor.ndim}",
        )
    return tensor


def _check_mode(op: str, dge_mode: dge_modes, oob_mode: oob_modes, priority: int | None) -> None:
    generation = current().target.generation
    require(
        dge_mode is not dge_modes.hwdge or generation >= 3,
        f"{op} dge_mode.hwdge needs gen3 or later, got gen{generation}",
    )
    require(oob_mode is oob_modes.error, f"{op} oob_mode.{oob_mode.name} is not modelled")
    require(priority is None, f"{op} priority is not modelled")


def _writable(op: str, dst: Tensor) -> None:
    require(
        current().dry or dst.storage.state is not None,
        f"{op} dst '{dst.name}' is a kernel input; write to a tensor of your own",
    )


@versioned
def dma_copy(
    dst: Tensor,
    src: Tensor,
    dst_rmw_op: None = None,
    priority: int | None = None,
    oob_mode: oob_modes = oob_modes.error,
    dge_mode: dge_modes = dge_modes.unknown,
    engine: engines = engines.unknown,
    unique_indices: bool = True,
    name: str | None = None,
) -> None:
    """Copy between or within HBM and SBUF, in row-major order of both sides; a change of element type goes by
    way of fp32.
    """
    require(dst_rmw_op is None, "dma_copy dst_rmw_op is not modelled")
    require(engine is engines.unknown, f"dma_copy engine.{engine.name} is not modelled")
    require(unique_indices, "dma_copy unique_indices=False is not modelled")
    _check_end("dma_copy", "dst", dst)
    _check_end("dma_copy", "src", src)
    _check_mode("dma_copy", dge_mode, oob_mode, priority)
    require(
        dst.size == src.size,
        f"dma_copy requires src and dst to have the same number of elements, got src={src.size}, "
        f"dst={dst.size}",
    )
    same = dst.dtype == src.dtype
    require(
        same or dge_mode is not dge_modes.hwdge,
        f"dma_copy with hwdge cannot cast, got {src.dtype.name} -> {dst.dtype.name}",
    )
    _writable("dma_copy", dst)
    if not current().dry:
        values = src.read()
        dst.write(values if same else round_to(values.astype(np.float32), dst.dtype), WRITTEN)
    # A descriptor is contiguous on both sides, which break their runs at different places: the gcd fits both.
    _record_transfer("dma_copy", dst, src, math.gcd(_run(dst), _run(src)))


@versioned
def dma_transpose(
    dst: Tensor,
    src: Tensor,
    axes: tuple[int, ...] | None = None,
    priority: int | None = None,
    dge_mode: dge_modes = dge_modes.unknown,
    oob_mode: oob_modes = oob_modes.error,
    name: str | None = None,
) -> None:
    """Transposing copy of 2-byte elements, axes [1, 0], [2, 1, 0] or [3, 1, 2, 0]. Element by element: slow,
    most of all on trn1.
    """
    _check_end("dma_transpose", "dst", dst)
    _check_end("dma_transpose", "src", src)
    _check_mode("dma_transpose", dge_mode, oob_mode, priority)
    require(src.ndim in TRANSPOSE_AXES, f"dma_transpose takes 2 to 4 dimensions, got {src.ndim}")
    expected = TRANSPOSE_AXES[src.ndim]
    require(
        axes is None or tuple(axes) == expected, f"dma_transpose axes must be {list(expected)}, got {axes}"
    )
    shape = tuple(src.shape[axis] for axis in expected)
    require(dst.shape == shape, f"dma_transpose dst shape must be {shape}, got {dst.shape}")
    require(dst.dtype == src.dtype, f"dma_transpose cannot cast, got {src.dtype.name} -> {dst.dtype.name}")
    require(src.dtype.itemsize == 2, f"dma_transpose needs 2-byte elements, got {src.dtype.name}")
    _writable("dma_transpose", dst)
    if not current().dry:
        dst.write(src.read().transpose(expected), WRITTEN)
    _record_transfer("dma_transpose", dst, src, 1)


def _run(tensor: Tensor) -> int:
    return tensor.access.row_bytes // tensor.access.itemsize


def _record_transfer(op: str, dst: Tensor, src: Tensor, segment: int) -> None:
    item = dst.dtype.itemsize
    record(
        DMA,
        op,
        dst,
        src,
        transfer_bytes=dst.size * item,
        descriptors=dst.size // segment,
        descriptor_bytes=segment * item,
    )
