"""The documented formulas, one instruction at a time, against numbers worked out by hand."""

import numpy as np
import pytest

from nki_kernels.backend import nisa, nl
from nki_kernels.cost.calibration import FITTED, published_rows
from nki_kernels.cost.constants import CALIBRATED, DOCUMENTED, EFFECTIVE, EVERY_ROW, SETS
from nki_kernels.cost.costs import dma_engines_used, engine_cycles
from nki_kernels.simulator.trace import Instruction
from nki_kernels.targets import TRN1
from tests.nki_kernels.any_python import simulate

BF16, FP32 = nl.bfloat16, nl.float32


def only(build):
    """The last instruction that `build` emits besides the store."""
    events = []

    def kernel():
        out = nl.ndarray((128, 8), dtype=FP32, buffer=nl.shared_hbm)
        build()
        return out

    simulate(kernel, listeners=[events.append], dry=True)()
    return [event for event in events if isinstance(event, Instruction)][-1]


def t(space, cols, dtype=BF16, rows=128):
    return nl.ndarray((rows, cols), dtype=dtype, buffer=space)


@pytest.mark.parametrize(
    ("m", "n", "dtype", "cycles"),
    [
        (128, 512, BF16, 576),
        (128, 1, BF16, 65),
        (16, 1, BF16, 65),
        (128, 100, BF16, 164),
        (128, 512, FP32, 2112),
        (8, 2, FP32, 72),
    ],
)
def test_a_matmul_takes_a_turnaround_and_its_moving_columns_four_times_over_in_fp32(m, n, dtype, cycles):
    event = only(
        lambda: nisa.nc_matmul(
            t(nl.psum, n, FP32, m), t(nl.sbuf, m, dtype), t(nl.sbuf, n, dtype), accumulate=False
        )
    )
    assert engine_cycles(event) == cycles


def test_a_transpose_takes_a_turnaround_and_the_partitions_of_its_data():
    event = only(lambda: nisa.nc_transpose(t(nl.psum, 128, FP32, 100), t(nl.sbuf, 100)))
    assert engine_cycles(event) == 64 + 128


@pytest.mark.parametrize("dtype", [nl.int8, BF16, FP32], ids=str)
def test_a_cast_takes_an_element_a_cycle_whatever_the_type(dtype):
    """On ScalarE by activation, on VectorE and, after its start, on GpSimdE by tensor_copy."""
    by_scalar = only(lambda: nisa.activation(dst=t(nl.sbuf, 512), op=nl.copy, data=t(nl.sbuf, 512, dtype)))
    by_vector = only(lambda: nisa.tensor_copy(dst=t(nl.sbuf, 512), src=t(nl.sbuf, 512, dtype)))
    assert engine_cycles(by_scalar) == engine_cycles(by_vector) == 512


@pytest.mark.parametrize(
    ("first", "second", "op", "cycles"),
    [
        ((nl.sbuf, FP32), (nl.psum, FP32), nl.multiply, 512),
        ((nl.sbuf, BF16), (nl.sbuf, BF16), nl.add, 512),
        ((nl.sbuf, BF16), (nl.sbuf, BF16), nl.maximum, 1024),
        ((nl.sbuf, FP32), (nl.sbuf, BF16), nl.add, 1024),
    ],
)
def test_two_inputs_take_one_pass_from_two_memories_or_for_plain_bf16_sums(first, second, op, cycles):
    event = only(
        lambda: nisa.tensor_tensor(
            dst=t(nl.sbuf, 512), data1=t(first[0], 512, first[1]), data2=t(second[0], 512, second[1]), op=op
        )
    )
    assert engine_cycles(event) == cycles


def test_a_strided_operand_costs_the_second_pass():
    event = only(
        lambda: nisa.tensor_tensor(
            dst=t(nl.sbuf, 512), data1=t(nl.sbuf, 1024)[:, 0:1024:2], data2=t(nl.sbuf, 512), op=nl.add
        )
    )
    assert engine_cycles(event) == 1024


def test_no_instruction_is_shorter_than_the_initiation_interval():
    event = only(lambda: nisa.activation(dst=t(nl.sbuf, 2), op=nl.copy, data=t(nl.sbuf, 2)))
    assert engine_cycles(event) == 64


@pytest.mark.parametrize(("dtype", "cycles"), [(BF16, 256), (FP32, 512)])
def test_a_bf16_sum_along_the_free_dimension_takes_half_a_pass_if_it_leaves_as_bf16(dtype, cycles):
    event = only(
        lambda: nisa.tensor_reduce(dst=t(nl.sbuf, 1, dtype), op=nl.add, data=t(nl.sbuf, 512), axis=1)
    )
    assert engine_cycles(event) == cycles


def test_gpsimd_pays_its_start():
    event = only(
        lambda: nisa.tensor_copy(dst=t(nl.sbuf, 512), src=t(nl.sbuf, 512), engine=nisa.engine.gpsimd)
    )
    assert engine_cycles(event) == 150 + 512


@pytest.mark.parametrize(("rows", "engines"), [(128, 16), (64, 8), (9, 2), (8, 1), (1, 1), (100, 13)])
def test_a_transfer_uses_an_engine_for_eight_partitions(rows, engines):
    def build():
        hbm = nl.ndarray((rows, 64), dtype=BF16, buffer=nl.private_hbm)
        nisa.dma_copy(dst=t(nl.sbuf, 64, BF16, rows), src=hbm)

    assert dma_engines_used(only(build), TRN1) == engines


PEAK = 17.0  # GB/s of one engine


def rate(constants, row):
    return row / constants.descriptor_ns(row, PEAK)


def test_the_documented_set_knows_one_rate_but_for_rows_that_are_all_overhead():
    assert rate(DOCUMENTED, 512) == rate(DOCUMENTED, 8192) == PEAK
    assert DOCUMENTED.descriptor_ns(2, PEAK) == DOCUMENTED.descriptor_ns(256, PEAK)


def test_the_effective_set_knows_one_rate_too():
    assert rate(EFFECTIVE, 256) == pytest.approx(6.5) == rate(EFFECTIVE, 65536)


def test_the_calibrated_rate_rises_from_the_effective_to_the_documented_one():
    rows = [256, 512, 1024, 1500, 2048, 3000, 4096, 8192]
    rates = [rate(CALIBRATED, row) for row in rows]
    assert (
        rates == sorted(rates)
        and rates[0] == pytest.approx(6.5) == rates[2]
        and rates[-1] == PEAK == rates[-2]
    )
    assert rates[4] == pytest.approx(np.sqrt(6.5 * PEAK))  # half way, as powers go


@pytest.mark.parametrize("constants", SETS.values(), ids=lambda c: c.name)
def test_a_longer_row_never_takes_less_time(constants):
    times = [constants.descriptor_ns(row, PEAK) for row in range(2, 10_000, 7)]
    assert times == sorted(times)


NOT_FITTED = (
    1.0,
    0,
    EVERY_ROW,
    4096,
)  # the documented rate itself; rows of any length; the row that takes it


@pytest.mark.parametrize("constants", SETS.values(), ids=lambda c: c.name)
def test_every_fitted_number_is_owned_up_to_and_none_is_without_a_row(constants):
    numbers = (constants.short_share, constants.short_row_bytes, constants.long_row_bytes)
    rows = [row for row in published_rows() if row.role == FITTED]
    assert constants.fitted == sum(number not in NOT_FITTED for number in numbers) <= len(rows)
