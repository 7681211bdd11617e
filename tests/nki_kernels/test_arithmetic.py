"""What each modelled instruction computes, against numpy written out by hand; rounding and element types
included.
"""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels.simulator import NkiValidationError
from nki_kernels.simulator import isa as nisa
from nki_kernels.simulator import language as nl
from nki_kernels.simulator.tensor import _restride, contiguous_run, merged_dims, row_major
from tests.nki_kernels.any_python import simulate

BF16, FP32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
RNG = np.random.default_rng(0)
A, B = (RNG.standard_normal((16, 12)).astype(np.float32) for _ in range(2))
COLUMN = RNG.standard_normal((16, 1)).astype(np.float32)


def compute(op, *arrays, shape=None, dtype=FP32, buffer=nl.sbuf):
    """Load `arrays`, let `op(dst, *tiles)` write a tile, return it."""

    def kernel(*inputs):
        tiles = []
        for value in inputs:
            tile = nl.ndarray(value.shape, dtype=value.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=tile, src=value)
            tiles.append(tile)
        dst = nl.ndarray(shape or inputs[0].shape, dtype=dtype, buffer=buffer)
        op(dst, *tiles)
        out = nl.ndarray(dst.shape, dtype=dtype, buffer=nl.shared_hbm)
        if buffer == nl.psum:
            copied = nl.ndarray(dst.shape, dtype=dtype, buffer=nl.sbuf)
            nisa.tensor_copy(copied, dst)
            dst = copied
        nisa.dma_copy(dst=out, src=dst)
        return out

    return simulate(kernel)(*arrays)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


VALUES = {
    "silu": (lambda d, a: nisa.activation(d, nl.silu, a), A * sigmoid(A)),
    "sigmoid": (lambda d, a: nisa.activation(d, nl.sigmoid, a), sigmoid(A)),
    "relu": (lambda d, a: nisa.activation(d, nl.relu, a), np.maximum(A, 0)),
    "square": (lambda d, a: nisa.activation(d, nl.square, a), A * A),
    "exp, scaled": (lambda d, a: nisa.activation(d, nl.exp, a, scale=0.5), np.exp(0.5 * A)),
    "tanh": (lambda d, a: nisa.activation(d, nl.tanh, a), np.tanh(A)),
    "reciprocal": (lambda d, a: nisa.activation(d, nl.reciprocal, a), 1 / A),
    "add": (lambda d, a: nisa.tensor_tensor(d, a, a, nl.add), A + A),
    "subtract a number": (lambda d, a: nisa.tensor_scalar(d, a, nl.subtract, 2.0), A - 2),
    "subtract from a number": (lambda d, a: nisa.tensor_scalar(d, a, nl.subtract, 2.0, reverse0=True), 2 - A),
    "two steps": (
        lambda d, a: nisa.tensor_scalar(d, a, nl.multiply, 3.0, False, nl.subtract, 1.0, True),
        1 - 3 * A,
    ),
    "maximum": (lambda d, a: nisa.tensor_scalar(d, a, nl.maximum, 0.25), np.maximum(A, 0.25)),
    "memset": (lambda d, a: nisa.memset(d, 1.5), np.full_like(A, 1.5)),
    "copy on GpSimd": (lambda d, a: nisa.tensor_copy(d, a, engine=nisa.engine.gpsimd), A),
}


@pytest.mark.parametrize("name", VALUES)
def test_one_operand(name):
    op, expected = VALUES[name]
    np.testing.assert_allclose(compute(op, A), expected, rtol=2e-6, atol=1e-6)


def test_columns_scale_and_bias_each_partition():
    found = compute(lambda d, a, c: nisa.activation(d, nl.tanh, a, bias=c, scale=c), A, COLUMN)
    np.testing.assert_allclose(found, np.tanh(A * COLUMN + COLUMN), rtol=1e-5, atol=1e-6)
    found = compute(lambda d, a, c: nisa.tensor_scalar(d, a, nl.multiply, c), A, COLUMN)
    np.testing.assert_array_equal(found, A * COLUMN)


def test_fused_scalar_tensor():
    found = compute(lambda d, a, b: nisa.scalar_tensor_tensor(d, a, nl.multiply, 2.0, nl.subtract, b), A, B)
    np.testing.assert_allclose(found, 2 * A - B, rtol=1e-6)
    found = compute(
        lambda d, a, b: nisa.scalar_tensor_tensor(d, a, nl.subtract, 2.0, nl.subtract, b, True, True), A, B
    )
    np.testing.assert_allclose(found, B - (2 - A), rtol=1e-5, atol=1e-6)


def test_reductions():
    cube = A.reshape(16, 3, 4)
    found = compute(lambda d, a: nisa.tensor_reduce(d, nl.add, a, axis=2), cube, shape=(16, 3))
    np.testing.assert_allclose(found, cube.sum(2), rtol=1e-5, atol=1e-6)
    found = compute(
        lambda d, a: nisa.tensor_reduce(d, nl.maximum, a, axis=(1, 2), negate=True, keepdims=True),
        cube,
        shape=(16, 1, 1),
    )
    np.testing.assert_array_equal(found[:, 0, 0], -cube.max((1, 2)))

    def sum_of_squares(dst, a):
        scratch = nl.ndarray(a.shape, dtype=BF16, buffer=nl.sbuf)
        nisa.activation(
            scratch, nl.square, a, reduce_op=nl.add, reduce_res=dst, reduce_cmd=nisa.reduce_cmd.reset_reduce
        )

    found = compute(sum_of_squares, A, shape=(16, 1))
    np.testing.assert_allclose(
        found[:, 0], (A * A).sum(1), rtol=1e-5
    )  # summed before the results are rounded to bf16


def test_matmul_sums_in_fp32_and_bf16_operands_are_exact():
    a, b = A.astype(BF16), B.astype(BF16)
    expected = a.astype(np.float64).T @ b.astype(np.float64)

    def op(dst, x, y):
        nisa.nc_matmul(dst, x[0:7], y[0:7], accumulate=False)
        nisa.nc_matmul(dst, x[0:1], y[0:1], accumulate=False)
        nisa.nc_matmul(dst, x, y, accumulate=False)
        nisa.nc_matmul(dst, x, y, accumulate=True)

    found = compute(op, a, b, shape=(12, 12), buffer=nl.psum)
    np.testing.assert_allclose(found, 2 * expected, rtol=1e-5, atol=1e-5)


def test_transposes_move_every_element():
    np.testing.assert_array_equal(compute(nisa.nc_transpose, A, shape=(12, 16), buffer=nl.psum), A.T)
    vector = compute(lambda d, a: nisa.nc_transpose(d, a, engine=nisa.engine.vector), A, shape=(12, 16))
    np.testing.assert_array_equal(vector, A.T)
    cube = A.astype(BF16).reshape(16, 3, 4)
    found = compute(lambda d, a: nisa.dma_transpose(d, a, axes=(2, 1, 0)), cube, shape=(4, 3, 16), dtype=BF16)
    np.testing.assert_array_equal(found, cube.transpose(2, 1, 0))


def test_rounding_is_to_nearest_even_and_integers_saturate():
    ties = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3e38]], np.float32)
    found = compute(nisa.tensor_copy, ties, dtype=BF16).astype(np.float32)
    np.testing.assert_array_equal(found, [[1, 1 + 2**-6, -1, np.float32(ml_dtypes.bfloat16(3e38))]])
    numbers = np.array([[0.5, 1.5, -2.5, 300, -300]], np.float32)
    np.testing.assert_array_equal(compute(nisa.tensor_copy, numbers, dtype=nl.int8), [[0, 2, -2, 127, -128]])


def test_dma_casts_by_way_of_fp32_and_reads_both_sides_in_order():
    found = compute(nisa.dma_copy, A, dtype=BF16)
    np.testing.assert_array_equal(found, A.astype(BF16))
    strided = compute(
        lambda d, a: nisa.dma_copy(d[:, 0:12:2], a) or nisa.dma_copy(d[:, 1:12:2], a),
        A[:, :6],
        shape=(16, 12),
    )
    np.testing.assert_array_equal(strided, np.repeat(A[:, :6], 2, axis=1))


def test_fp8_keeps_the_range_of_the_first_two_chips():
    found = compute(nisa.tensor_copy, np.array([[240.0, 16.5]], np.float32), dtype=nl.float8_e4m3)
    np.testing.assert_array_equal(found.astype(np.float32), [[240, 16]])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_strides_of_a_reshape_are_numpys(shape, data):
    """Where our arithmetic finds strides they address the same elements; where numpy needs no copy we find
    some.
    """
    base = np.arange(int(np.prod(shape)) * 2).reshape(*shape, 2)
    view = base[..., data.draw(st.integers(0, 1))] if data.draw(st.booleans()) else base
    sizes, strides = view.shape, tuple(s // base.itemsize for s in view.strides)
    new = data.draw(st.sampled_from([(view.size,), sizes[::-1], (1, *sizes), (*sizes, 1), (view.size, 1, 1)]))
    found = _restride(sizes, strides, new)
    if found is not None:
        shown = np.lib.stride_tricks.as_strided(view, new, [s * base.itemsize for s in found])
        np.testing.assert_array_equal(shown, view.reshape(new))
    else:
        assert not np.shares_memory(view.reshape(new), base)


def test_runs_and_merged_dimensions():
    assert row_major((2, 3, 4)) == (12, 4, 1)
    assert (
        contiguous_run((2, 3, 4), (12, 4, 1)) == 24
        and contiguous_run((2, 3, 4), (24, 8, 1)) == 4
        and contiguous_run((5, 1), (7, 1)) == 1
    )
    assert merged_dims((2, 3, 4), (12, 4, 1)) == [(24, 1)] and merged_dims((1, 1), (9, 9)) == [(1, 1)]
    assert merged_dims((2, 3, 4), (24, 8, 1)) == [(4, 1), (6, 8)]


def test_what_users_kernels_take_from_the_language_is_there():
    """Ours need no ranges and no sizes by name; the kernels that others bring do."""
    sizes = []

    def kernel(src):
        sizes.append((nl.tile_size.pmax, nl.tile_size.gemm_stationary_fmax, nl.tile_size.gemm_moving_fmax))
        out = nl.ndarray(src.shape, dtype=src.dtype, buffer=nl.shared_hbm)
        for i in nl.affine_range(2):
            tile = nl.ndarray((nl.tile_size.pmax, 4), dtype=src.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=tile, src=src[nl.ds(i * 128, 128), :])
            nisa.dma_copy(dst=out[nl.ds(i * 128, 128), :], src=tile)
        return out

    given = np.arange(1024, dtype=np.float32).reshape(256, 4)
    assert np.array_equal(simulate(kernel)(given), given) and sizes == [(128, 128, 512)]


def test_an_access_pattern_is_a_view_of_steps_and_counts():
    """Every second column, the last rows first, in HBM and on chip; the bounds are the tensor's."""
    x = np.arange(128, dtype=np.float32).reshape(8, 16)

    def kernel(src):
        tile = nl.ndarray((8, 16), dtype=src.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=src.ap([[-16, 8], [1, 16]], offset=112))
        out = nl.ndarray((4, 3), dtype=src.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=tile.ap([[16, 4], [2, 3]], offset=1))
        return out

    assert np.array_equal(simulate(kernel)(x), x[::-1][0:4, 1:7:2])


@pytest.mark.parametrize(
    ("pattern", "offset", "words"),
    [
        ([[16, 9], [1, 4]], 0, "index range"),
        ([[16, 8], [1, 17]], 0, "index range"),
        ([[16, 4], [1, 16]], 1, "index range"),
        ([[32, 4], [1, 16]], 0, "no stride is possible on the partition dimension"),
    ],
)
def test_access_patterns_stay_inside_the_tensor(pattern, offset, words):
    def kernel():
        nl.ndarray((8, 16), dtype=FP32, buffer=nl.sbuf).ap(pattern, offset=offset)

    with pytest.raises(NkiValidationError, match=words):
        simulate(kernel)()
