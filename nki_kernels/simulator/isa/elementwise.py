"""ScalarE, VectorE and GpSimdE: everything that works element by element or along the free dimension."""

from __future__ import annotations

import numpy as np

from nki_kernels.simulator.arithmetic import BIAS, BINARY, REDUCE, UNARY, Function, float32, lookup, round_to
from nki_kernels.simulator.isa.operands import (
    as_float,
    check_not_both_psum,
    check_operand,
    check_same_free_size,
    check_same_partitions,
    record,
    store,
)
from nki_kernels.simulator.memory import WRITTEN, current
from nki_kernels.simulator.rules import require
from nki_kernels.simulator.signatures import engine as engines
from nki_kernels.simulator.signatures import reduce_cmd as reduce_cmds
from nki_kernels.simulator.signatures import versioned
from nki_kernels.simulator.tensor import Tensor
from nki_kernels.simulator.trace import GPSIMD, PSUM, SCALAR, VECTOR

Operand = float | Tensor


def _pick(
    op: str, engine: engines, *operands: Operand | None, allowed: tuple[str, ...] = (VECTOR, GPSIMD)
) -> str:
    """The engine that runs the op: VectorE unless the kernel says otherwise."""
    chosen = VECTOR if engine is engines.unknown else engine.name
    generation = current().target.generation
    require(
        chosen in allowed,
        f"{op} does not support engine.{chosen} on NeuronCore-v{generation}: expected one of {list(allowed)}",
    )
    touches_psum = any(isinstance(operand, Tensor) and operand.buffer == PSUM for operand in operands)
    require(chosen != GPSIMD or not touches_psum, f"{op} on engine.gpsimd cannot access psum")
    return chosen


def _column(
    op: str, name: str, value: Operand, dst: Tensor, dtypes: tuple[np.dtype, ...] = (float32,)
) -> np.ndarray | np.float32:
    """A scalar operand: a Python number, or one value per partition `[P, 1]`."""
    if not isinstance(value, Tensor):
        require(
            isinstance(value, (int, float)),
            f"{op} {name} must be a number or a [P, 1] tensor, got {type(value).__name__}",
        )
        return np.float32(value)
    check_operand(op, name, value)
    require(
        value.size == value.shape[0], f"{op} {name} must have a free dimension of 1, got {list(value.shape)}"
    )
    check_same_partitions(op, dst, (name, value))
    names = [dtype.name for dtype in dtypes]
    require(value.dtype in dtypes, f"{op} {name} dtype must be one of {names}, got {value.dtype.name}")
    return np.float32(0) if current().dry else as_float(value)


def _tensor(value: Operand | None) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


@versioned
def activation(
    dst: Tensor,
    op: Function,
    data: Tensor,
    bias: Tensor | None = None,
    scale: Operand = 1.0,
    reduce_op: Function | None = None,
    reduce_res: Tensor | None = None,
    reduce_cmd: reduce_cmds = reduce_cmds.idle,
    name: str | None = None,
) -> None:
    """ScalarE: `dst = op(data * scale + bias)`; with `reduce_cmd.reset_reduce`, `reduce_res [P, 1]` gets the
    sum of the results in fp32.
    """
    function = lookup(UNARY, op, "activation")
    _check_pair("activation", dst, data)
    scales = _column("activation", "scale", scale, dst)
    biases: np.ndarray | np.float32 = np.float32(0)
    if bias is not None:
        require(
            isinstance(bias, Tensor), f"activation bias must be a [P, 1] tensor, got {type(bias).__name__}"
        )
        require(
            op != "reciprocal" or current().target.generation > 2,
            "activation(op=reciprocal) does not support bias on gen2",
        )
        biases = _column("activation", "bias", bias, dst, BIAS)
    _check_reduction(dst, reduce_op, reduce_res, reduce_cmd)
    if not current().dry:
        values = function(as_float(data) * scales + biases).astype(np.float32, copy=False)
        store(dst, values)
        if reduce_res is not None:
            store(reduce_res, values.sum(axis=1, keepdims=True, dtype=np.float32))
    record(SCALAR, "activation", dst, data, _tensor(scale), bias, function=op)
    if reduce_res is not None:
        # The sum stands in ScalarE until an instruction of its own fetches it, which takes time of its own.
        record(SCALAR, "activation_read_accumulator", reduce_res)


def _check_reduction(
    dst: Tensor, reduce_op: Function | None, reduce_res: Tensor | None, reduce_cmd: reduce_cmds
) -> None:
    if reduce_op is None and reduce_res is None and reduce_cmd is reduce_cmds.idle:
        return
    require(reduce_op == "add", f"activation reduce_op must be add, got {reduce_op!r}")
    require(
        reduce_cmd is reduce_cmds.reset_reduce,
        f"activation reduce_cmd.{reduce_cmd.name} is not modelled, use reset_reduce",
    )
    require(reduce_res is not None, "activation with a reduce_op needs reduce_res")
    assert reduce_res is not None
    check_operand("activation", "reduce_res", reduce_res)
    require(
        reduce_res.size == dst.shape[0],
        f"activation reduce_res must be [{dst.shape[0]}, 1], got {list(reduce_res.shape)}",
    )


def _check_pair(op: str, dst: Tensor, data: Tensor) -> None:
    check_operand(op, "dst", dst)
    check_operand(op, "data", data)
    check_same_partitions(op, dst, ("data", data))
    check_same_free_size(op, dst, ("data", data))


@versioned
def tensor_tensor(
    dst: Tensor,
    data1: Tensor,
    data2: Tensor,
    op: Function,
    engine: engines = engines.unknown,
    name: str | None = None,
) -> None:
    """VectorE or GpSimdE: `dst = data1 op data2` in fp32; at most one of the two sources in PSUM."""
    function = lookup(BINARY, op, "tensor_tensor")
    for label, operand in (("dst", dst), ("data1", data1), ("data2", data2)):
        check_operand("tensor_tensor", label, operand)
    check_same_partitions("tensor_tensor", dst, ("data1", data1), ("data2", data2))
    check_same_free_size("tensor_tensor", dst, ("data1", data1), ("data2", data2))
    check_not_both_psum("tensor_tensor", ("data1", data1), ("data2", data2))
    chosen = _pick("tensor_tensor", engine, dst, data1, data2)
    if not current().dry:
        store(dst, function(as_float(data1), as_float(data2)))
    record(chosen, "tensor_tensor", dst, data1, data2, function=op)


@versioned
def tensor_scalar(
    dst: Tensor,
    data: Tensor,
    op0: Function,
    operand0: Operand,
    reverse0: bool = False,
    op1: Function | None = None,
    operand1: Operand | None = None,
    reverse1: bool = False,
    engine: engines = engines.unknown,
    name: str | None = None,
) -> None:
    """VectorE or GpSimdE: `dst = (data op0 operand0) op1 operand1`, operands numbers or `[P, 1]` in fp32."""
    _check_pair("tensor_scalar", dst, data)
    require((op1 is None) == (operand1 is None), "tensor_scalar needs both op1 and operand1, or neither")
    steps = [(op0, operand0, reverse0)]
    if op1 is not None and operand1 is not None:
        steps.append((op1, operand1, reverse1))
    columns = [_column("tensor_scalar", f"operand{i}", value, dst) for i, (_, value, _) in enumerate(steps)]
    functions = [lookup(BINARY, op, "tensor_scalar") for op, _, _ in steps]
    chosen = _pick("tensor_scalar", engine, dst, data, operand0, operand1)
    if not current().dry:
        values = as_float(data)
        for function, column, (_, _, reverse) in zip(functions, columns, steps, strict=True):
            values = function(column, values) if reverse else function(values, column)
        store(dst, values)
    record(chosen, "tensor_scalar", dst, data, _tensor(operand0), _tensor(operand1), function=op0)


@versioned
def scalar_tensor_tensor(
    dst: Tensor,
    data: Tensor,
    op0: Function,
    operand0: Operand,
    op1: Function,
    operand1: Tensor,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """VectorE: `dst = (data op0 operand0) op1 operand1`, `operand1` as large as `data`; not both in PSUM."""
    _check_pair("scalar_tensor_tensor", dst, data)
    check_operand("scalar_tensor_tensor", "operand1", operand1)
    check_same_partitions("scalar_tensor_tensor", dst, ("operand1", operand1))
    check_same_free_size("scalar_tensor_tensor", dst, ("operand1", operand1))
    check_not_both_psum("scalar_tensor_tensor", ("data", data), ("operand1", operand1))
    column = _column("scalar_tensor_tensor", "operand0", operand0, dst)
    first, second = lookup(BINARY, op0, "scalar_tensor_tensor"), lookup(BINARY, op1, "scalar_tensor_tensor")
    if not current().dry:
        values = as_float(data)
        values = first(column, values) if reverse0 else first(values, column)
        other = as_float(operand1)
        store(dst, second(other, values) if reverse1 else second(values, other))
    record(VECTOR, "scalar_tensor_tensor", dst, data, _tensor(operand0), operand1, function=op0)


@versioned
def tensor_copy(dst: Tensor, src: Tensor, engine: engines = engines.unknown, name: str | None = None) -> None:
    """Copy on chip; exact where the types agree, else by fp32. ScalarE does it from NeuronCore-v3 on."""
    check_operand("tensor_copy", "dst", dst)
    check_operand("tensor_copy", "src", src)
    check_same_partitions("tensor_copy", dst, ("src", src))
    check_same_free_size("tensor_copy", dst, ("src", src))
    allowed = (VECTOR, GPSIMD) if current().target.generation < 3 else (VECTOR, GPSIMD, SCALAR)
    chosen = _pick("tensor_copy", engine, dst, src, allowed=allowed)
    if not current().dry:
        values = src.read()
        dst.write(
            values if src.dtype == dst.dtype else round_to(values.astype(np.float32), dst.dtype), WRITTEN
        )
    record(chosen, "tensor_copy", dst, src)


@versioned
def memset(dst: Tensor, value: float, engine: engines = engines.unknown, name: str | None = None) -> None:
    """Fill `dst` with a number of its own kind (an integer for integer types)."""
    check_operand("memset", "dst", dst)
    is_float = dst.dtype.kind not in "iu"
    require(
        isinstance(value, float if is_float else int),
        f"memset value must match dst dtype {dst.dtype.name}, got {type(value).__name__}",
    )
    chosen = _pick("memset", engine, dst)
    if not current().dry:
        store(dst, np.full(dst.shape, value, np.float32))
    record(chosen, "memset", dst)


@versioned
def tensor_reduce(
    dst: Tensor,
    op: Function,
    data: Tensor,
    axis: int | tuple[int, ...],
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> None:
    """VectorE: reduce `data` along one or more trailing free axes."""
    function = lookup(REDUCE, op, "tensor_reduce")
    check_operand("tensor_reduce", "dst", dst)
    check_operand("tensor_reduce", "data", data)
    check_same_partitions("tensor_reduce", dst, ("data", data))
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    trailing = tuple(range(data.ndim - len(axes), data.ndim))
    require(
        axes == trailing and 0 not in axes,
        f"tensor_reduce axis must be the last free axes, {list(trailing)}, got {list(axes)}",
    )
    kept = data.shape[: data.ndim - len(axes)]
    expected = kept + (1,) * len(axes) if keepdims else kept
    require(
        dst.size == int(np.prod(expected)),
        f"tensor_reduce dst must be {list(expected)}, got {list(dst.shape)}",
    )
    if not current().dry:
        values = function(data.read().astype(np.float32), axis=axes)
        store(dst, -values if negate else values)
    record(VECTOR, "tensor_reduce", dst, data, function=op)
