"""TensorE: `nc_matmul` and `nc_transpose`."""

from __future__ import annotations

import numpy as np

from nki_kernels.simulator.arithmetic import MATMUL_INPUTS, float32
from nki_kernels.simulator.isa.operands import as_float, check_operand, geometry, record
from nki_kernels.simulator.memory import BY_MATMUL, UNWRITTEN, WRITTEN, Machine, current
from nki_kernels.simulator.rules import refuse, require
from nki_kernels.simulator.signatures import engine as engines
from nki_kernels.simulator.signatures import matmul_perf_mode, versioned
from nki_kernels.simulator.tensor import Tensor
from nki_kernels.simulator.trace import PSUM, SBUF, TENSOR, VECTOR
from nki_kernels.targets import PMAX

VECTOR_TRANSPOSE_MAX = 32


@versioned
def nc_matmul(
    dst: Tensor,
    stationary: Tensor,
    moving: Tensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: tuple = (),
    tile_size: tuple = (),
    perf_mode: matmul_perf_mode = matmul_perf_mode.none,
    name: str | None = None,
) -> None:
    """`dst[M, N] (+)= stationary[K, M]^T @ moving[K, N]`, K on the partitions, summed in fp32.

    `accumulate` False overwrites, True adds, None lets the first write of a tile overwrite and the later ones
    add.
    """
    require(
        not is_stationary_onezero and not is_moving_onezero,
        "nc_matmul is_stationary_onezero and is_moving_onezero are not modelled",
    )
    require(not is_transpose, "nc_matmul is_transpose is not modelled; use nc_transpose")
    require(not tile_position and not tile_size, "nc_matmul tile_position and tile_size are not modelled")
    if perf_mode is not matmul_perf_mode.none:
        refuse(f"nc_matmul perf_mode {perf_mode.name} is not modelled")
    machine = current()
    _check_once(machine, dst, stationary, moving)
    k, m, n = stationary.shape[0], stationary.size // stationary.shape[0], moving.size // moving.shape[0]
    adds = bool(accumulate)
    if not machine.dry:
        adds = _accumulates(dst, accumulate)
        product = as_float(stationary).T @ as_float(moving)
        if adds:
            # `read` marks the sum as read; the write below makes it a matmul's own again.
            product += dst.read().astype(np.float32).reshape(m, n)
        dst.write(product.astype(dst.dtype, copy=False), BY_MATMUL)
    record(TENSOR, "nc_matmul", dst, stationary, moving, accumulate=adds, flops=2 * k * m * n)


def _check_once(machine: Machine, *operands: Tensor) -> None:
    """Check operands of this geometry, unless a matmul with such operands has passed: kernels repeat
    themselves.
    """
    seen = tuple(geometry(operand) for operand in operands if isinstance(operand, Tensor))
    if len(seen) < 3 or seen not in machine.passed:
        _check_matmul(machine, *operands)
        machine.passed.add(seen)


def _check_matmul(machine: Machine, dst: Tensor, stationary: Tensor, moving: Tensor) -> None:
    target = machine.target
    check_operand("nc_matmul", "dst", dst, (PSUM,))
    check_operand("nc_matmul", "stationary", stationary, (SBUF,))
    check_operand("nc_matmul", "moving", moving, (SBUF,))
    k, m, n = stationary.shape[0], stationary.size // stationary.shape[0], moving.size // moving.shape[0]
    require(
        k == moving.shape[0],
        f"Matmul contraction dimension mismatch: stationary[0]={k} != moving[0]={moving.shape[0]}",
    )
    limit = target.stationary_fmax
    require(m <= limit, f"Matmul stationary free dimension {m} exceeds gemm_stationary_fmax={limit}")
    # In bytes of the destination: where bf16 is allowed there (NeuronCore-v4), twice as many columns fit.
    limit = target.moving_fmax_fp32 * 4 // dst.dtype.itemsize
    require(n <= limit, f"Matmul moving free dimension {n} exceeds max {limit}")
    require(
        dst.shape[0] == m and dst.size == m * n, f"nc_matmul dst must be [{m}, {n}], got {list(dst.shape)}"
    )
    _check_matmul_dtypes(machine, dst, stationary, moving)
    _check_one_bank("nc_matmul", machine, dst)


def _check_one_bank(op: str, machine: Machine, dst: Tensor) -> None:
    first, end = dst.access.banks
    fits = end - first <= 1 or machine.target.generation >= 4
    size = machine.target.psum_bank_bytes
    require(
        fits, f"{op} dst must fit one PSUM bank of {size} bytes per partition, got banks {first} to {end - 1}"
    )


def _check_matmul_dtypes(machine: Machine, dst: Tensor, stationary: Tensor, moving: Tensor) -> None:
    allowed = machine.target.matmul_dst_dtypes
    found = dst.storage.dtype_name
    require(
        found in allowed,
        f"nc_matmul dst dtype must be {' or '.join(allowed)} on gen{machine.target.generation}, got {found}",
    )
    for name, operand in (("stationary", stationary), ("moving", moving)):
        found = operand.storage.dtype_name
        require(found in MATMUL_INPUTS, f"nc_matmul {name} dtype must be one of {MATMUL_INPUTS}, got {found}")
    pair = stationary.storage.dtype_name, moving.storage.dtype_name
    require(
        pair.count("float32") != 1,
        f"nc_matmul float32 must pair with float32, got stationary={pair[0]}, moving={pair[1]}",
    )


def _accumulates(dst: Tensor, accumulate: bool | None) -> bool:
    """Whether this matmul adds; refuses sums onto anything but an unread result of matmuls."""
    if accumulate is False:
        return False
    low, high = dst.states()
    if accumulate is None and high == UNWRITTEN:
        return False
    # All written by matmuls; where accumulation goes by itself, none of it read since, either.
    clean = low >= BY_MATMUL and (accumulate or high == BY_MATMUL)
    told = {UNWRITTEN: "unwritten elements", WRITTEN: "elements of another instruction"}.get(
        low, "a sum that was read already"
    )
    require(
        clean,
        f"nc_matmul accumulates onto '{dst.name}': expected elements last written by nc_matmul, found "
        f"{told}; start a sum with accumulate=False or in a fresh tile",
    )
    return True


@versioned
def nc_transpose(
    dst: Tensor, data: Tensor, engine: engines = engines.unknown, name: str | None = None
) -> None:
    """`dst[F, P] = data[P, F]^T`: TensorE up to 128 x 128 from SBUF into PSUM, VectorE up to 32 x 32."""
    require(
        engine in (engines.unknown, engines.tensor, engines.vector),
        f"nc_transpose does not support engine.{engine.name}",
    )
    on_vector = engine is engines.vector
    check_operand("nc_transpose", "data", data, (SBUF, PSUM) if on_vector else (SBUF,))
    check_operand("nc_transpose", "dst", dst, (SBUF, PSUM) if on_vector else (PSUM,))
    p, f = data.shape[0], data.size // data.shape[0]
    limit = VECTOR_TRANSPOSE_MAX if on_vector else PMAX
    require(
        p <= limit and f <= limit, f"nc_transpose data must be at most [{limit}, {limit}], got [{p}, {f}]"
    )
    require(
        dst.shape[0] == f and dst.size == f * p, f"nc_transpose dst must be [{f}, {p}], got {list(dst.shape)}"
    )
    machine = current()
    expected = data.dtype if on_vector or machine.target.generation > 2 else float32
    require(
        dst.dtype == expected,
        f"nc_transpose dst dtype must be {expected.name} on gen{machine.target.generation}, got "
        f"{dst.dtype.name}",
    )
    _check_one_bank("nc_transpose", machine, dst)
    if not machine.dry:
        # Not BY_MATMUL: no sum may go on from a transpose.
        dst.write(as_float(data).T.astype(dst.dtype), WRITTEN)
    record(VECTOR if on_vector else TENSOR, "nc_transpose", dst, data)
