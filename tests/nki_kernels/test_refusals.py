"""For every rule a kernel that obeys and one that breaks it; the second is refused in the expected words."""

import ml_dtypes
import numpy as np
import pytest

from nki_kernels.simulator import CapacityError, NkiValidationError, UninitializedError
from nki_kernels.simulator import isa as nisa
from nki_kernels.simulator import language as nl
from nki_kernels.targets import TRN1, TRN2, TRN3
from tests.nki_kernels.any_python import simulate

BF16 = np.dtype(ml_dtypes.bfloat16)


def sbuf(*shape, dtype=BF16):
    """A written SBUF tile."""
    tile = nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)
    nisa.memset(tile, 1 if dtype.kind in "iu" else 1.0)
    return tile


def psum(*shape, dtype=nl.float32, written=True):
    tile = nl.ndarray(shape, dtype=dtype, buffer=nl.psum)
    if written:
        nisa.memset(tile, 0.0)
    return tile


def hbm(*shape, dtype=BF16, buffer=nl.shared_hbm):
    return nl.ndarray(shape, dtype=dtype, buffer=buffer)


def run(body, target=TRN1, **options):
    """Run `body()` as a kernel that returns one written output."""

    def kernel():
        body()
        out = hbm(1, 1, dtype=np.dtype(np.float32))
        nisa.dma_copy(dst=out, src=sbuf(1, 1, dtype=np.dtype(np.float32)))
        return out

    return simulate(kernel, target=target, **options)()


def mm(k=128, m=128, n=512, *, dst=None, stationary=None, moving=None, **kwargs):
    nisa.nc_matmul(
        psum(m, n, written=False) if dst is None else dst(),
        sbuf(k, m) if stationary is None else stationary(),
        sbuf(k, n) if moving is None else moving(),
        **kwargs,
    )


def act(dst=None, data=None, op=nl.copy, **kwargs):
    nisa.activation(dst=dst or sbuf(128, 8), op=op, data=data or sbuf(128, 8), **kwargs)


FP32 = np.dtype(np.float32)
# rule -> (kernel that obeys, kernel that breaks it, words of the refusal)
PAIRS = {
    "partitions": (
        lambda: sbuf(128, 4),
        lambda: sbuf(129, 4),
        "number of partitions 129 exceed architecture limitation of 128",
    ),
    "dimensions": (
        lambda: sbuf(128, 1),
        lambda: nl.ndarray((128,), dtype=BF16, buffer=nl.sbuf),
        "SBUF and PSUM tensors must have at least 2 dimensions (partition-dim and free-dim)",
    ),
    "contraction agrees": (
        lambda: mm(k=3),
        lambda: mm(k=3, moving=lambda: sbuf(4, 512)),
        "Matmul contraction dimension mismatch: stationary[0]=3 != moving[0]=4",
    ),
    "stationary width": (
        lambda: mm(m=128),
        lambda: mm(stationary=lambda: sbuf(128, 256), dst=lambda: psum(128, 512, written=False)),
        "Matmul stationary free dimension 256 exceeds gemm_stationary_fmax=128",
    ),
    "moving width": (
        lambda: mm(n=512),
        lambda: mm(dst=lambda: psum(128, 1024, written=False), n=1024),
        "Matmul moving free dimension 1024 exceeds max 512",
    ),
    "matmul shape": (
        lambda: mm(m=64),
        lambda: mm(m=64, dst=lambda: psum(128, 512, written=False)),
        "nc_matmul dst must be [64, 512]",
    ),
    "matmul dst dtype": (
        mm,
        lambda: mm(dst=lambda: psum(128, 512, dtype=BF16, written=False)),
        "nc_matmul dst dtype must be float32 on gen2, got bfloat16",
    ),
    "matmul dst buffer": (
        mm,
        lambda: mm(dst=lambda: sbuf(128, 512, dtype=FP32)),
        "dst must be in ['psum'], got sbuf",
    ),
    "matmul operand buffer": (
        mm,
        lambda: mm(m=4, n=4, k=128, moving=lambda: psum(128, 4)),
        "moving must be in ['sbuf'], got psum",
    ),
    "matmul operand from hbm": (
        mm,
        lambda: mm(moving=lambda: hbm(128, 512)),
        "moving must be in ['sbuf'], got shared_hbm",
    ),
    "dtype pairing": (
        lambda: mm(stationary=lambda: sbuf(128, 128, dtype=FP32), moving=lambda: sbuf(128, 512, dtype=FP32)),
        lambda: mm(stationary=lambda: sbuf(128, 128, dtype=FP32)),
        "float32 must pair with float32, got stationary=float32, moving=bfloat16",
    ),
    "integer matmul": (
        mm,
        lambda: mm(moving=lambda: sbuf(128, 512, dtype=nl.int32)),
        "moving dtype must be one of",
    ),
    "one bank": (
        lambda: mm(n=256, dst=lambda: psum(128, 1024, written=False)[:, 256:512]),
        lambda: mm(n=512, dst=lambda: psum(128, 1024, written=False)[:, 256:768]),
        "must fit one PSUM bank of 2048 bytes per partition",
    ),
    "one bank for a transpose": (
        lambda: nisa.nc_transpose(psum(128, 600, written=False)[:, 384:512], sbuf(128, 128)),
        lambda: nisa.nc_transpose(psum(128, 600, written=False)[:, 385:513], sbuf(128, 128)),
        "nc_transpose dst must fit one PSUM bank of 2048 bytes per partition, got banks 0 to 1",
    ),
    "start partition of 33 to 64": (
        lambda: act(sbuf(128, 4)[64:128], sbuf(128, 4)[0:64]),
        lambda: act(sbuf(128, 4)[32:96], sbuf(128, 4)[0:64]),
        "start partition 32 is not possible for 64 partitions, expected one of [0, 64]",
    ),
    "start partition of up to 32": (
        lambda: act(sbuf(128, 4)[96:128], sbuf(128, 4)[32:64]),
        lambda: act(sbuf(128, 4)[16:48], sbuf(128, 4)[0:32]),
        "start partition 16 is not possible for 32 partitions, expected one of [0, 32, 64, 96]",
    ),
    "start partition of more than 64": (
        lambda: act(sbuf(128, 4)[0:96], sbuf(128, 4)[0:96]),
        lambda: act(sbuf(128, 4)[32:128], sbuf(128, 4)[0:96]),
        "start partition 32 is not possible for 96 partitions, expected one of [0]",
    ),
    "partition stride": (
        lambda: sbuf(128, 8)[:, 0:8:2],
        lambda: sbuf(128, 8)[0:128:2],
        "no stride is possible on the partition dimension",
    ),
    "out of bounds": (
        lambda: sbuf(128, 8)[:, 4:8],
        lambda: sbuf(128, 8)[:, 4:9],
        "on dimension 1: index range [4, 8] exceed dimension size of 8",
    ),
    "negative index": (
        lambda: hbm(4, 4)[3],
        lambda: hbm(4, 4)[-1],
        "on dimension 0: index range [-1, -1] exceed dimension size of 4",
    ),
    "reshape partitions": (
        lambda: sbuf(4, 6).reshape((4, 2, 3)),
        lambda: sbuf(4, 6).reshape((8, 3)),
        "Partition dim size must be preserved, got 4 -> 8",
    ),
    "reshape count": (
        lambda: hbm(4, 6).reshape((24,)),
        lambda: hbm(4, 6).reshape((23,)),
        "reshape must keep the number of elements",
    ),
    "reshape without a copy": (
        lambda: hbm(4, 6)[0:2].reshape((12,)),
        lambda: hbm(4, 6)[:, 0:2].reshape((8,)),
        "would copy",
    ),
    "dma partitions": (
        lambda: nisa.dma_copy(dst=hbm(128, 4), src=sbuf(128, 4)),
        lambda: nisa.dma_copy(dst=hbm(256, 4), src=nl.ndarray((256, 4), dtype=BF16, buffer=nl.sbuf)),
        "256 exceed",
    ),
    "dma elements": (
        lambda: nisa.dma_copy(dst=hbm(64, 2), src=sbuf(128, 1)),
        lambda: nisa.dma_copy(dst=hbm(128, 2), src=sbuf(128, 1)),
        "dma_copy requires src and dst to have the same number of elements, got src=128, dst=256",
    ),
    "dma from psum": (
        lambda: nisa.dma_copy(dst=hbm(4, 4), src=sbuf(4, 4)),
        lambda: nisa.dma_copy(dst=hbm(4, 4), src=psum(4, 4)),
        "dma_copy requires HBM or SBUF tensors",
    ),
    "hwdge": (
        lambda: nisa.dma_copy(dst=hbm(4, 4), src=sbuf(4, 4), dge_mode=nisa.dge_mode.swdge),
        lambda: nisa.dma_copy(dst=hbm(4, 4), src=sbuf(4, 4), dge_mode=nisa.dge_mode.hwdge),
        "needs gen3 or later, got gen2",
    ),
    "dma_transpose shape": (
        lambda: nisa.dma_transpose(dst=hbm(8, 4), src=sbuf(4, 8)),
        lambda: nisa.dma_transpose(dst=hbm(4, 8), src=sbuf(4, 8)),
        "dma_transpose dst shape must be (8, 4), got (4, 8)",
    ),
    "dma_transpose dtype": (
        lambda: nisa.dma_transpose(dst=hbm(8, 4), src=sbuf(4, 8)),
        lambda: nisa.dma_transpose(dst=hbm(8, 4, dtype=FP32), src=sbuf(4, 8, dtype=FP32)),
        "needs 2-byte elements",
    ),
    "transpose dtype on gen2": (
        lambda: nisa.nc_transpose(psum(8, 128, written=False), sbuf(128, 8)),
        lambda: nisa.nc_transpose(psum(8, 128, dtype=BF16, written=False), sbuf(128, 8)),
        "nc_transpose dst dtype must be float32 on gen2, got bfloat16",
    ),
    "transpose size": (
        lambda: nisa.nc_transpose(psum(128, 128, written=False), sbuf(128, 128)),
        lambda: nisa.nc_transpose(psum(128, 128, written=False), sbuf(128, 129)),
        "nc_transpose data must be at most [128, 128], got [128, 129]",
    ),
    "vector transpose size": (
        lambda: nisa.nc_transpose(sbuf(32, 32), sbuf(32, 32), engine=nisa.engine.vector),
        lambda: nisa.nc_transpose(sbuf(64, 32), sbuf(32, 64), engine=nisa.engine.vector),
        "at most [32, 32], got [32, 64]",
    ),
    "two psum operands": (
        lambda: nisa.tensor_tensor(sbuf(128, 4), psum(128, 4), sbuf(128, 4), nl.add),
        lambda: nisa.tensor_tensor(sbuf(128, 4), psum(128, 4), psum(128, 4), nl.add),
        "data1 and data2 may not both be in psum",
    ),
    "two psum operands, fused": (
        lambda: nisa.scalar_tensor_tensor(sbuf(128, 4), psum(128, 4), nl.multiply, 2.0, nl.add, sbuf(128, 4)),
        lambda: nisa.scalar_tensor_tensor(sbuf(128, 4), psum(128, 4), nl.multiply, 2.0, nl.add, psum(128, 4)),
        "data and operand1 may not both be in psum",
    ),
    "same partitions": (
        lambda: act(sbuf(64, 8), sbuf(64, 8)),
        lambda: act(sbuf(128, 8), sbuf(64, 8)),
        "must have the same number of partitions, got data=64, dst=128",
    ),
    "same free size": (
        lambda: act(sbuf(64, 2, 4), sbuf(64, 8)),
        lambda: act(sbuf(64, 8), sbuf(64, 4)),
        "same number of elements per partition, got data=4, dst=8",
    ),
    "gpsimd and psum": (
        lambda: nisa.tensor_copy(sbuf(128, 4), sbuf(128, 4), engine=nisa.engine.gpsimd),
        lambda: nisa.tensor_copy(sbuf(128, 4), psum(128, 4), engine=nisa.engine.gpsimd),
        "on engine.gpsimd cannot access psum",
    ),
    "gpsimd and an operand in psum": (
        lambda: nisa.tensor_scalar(sbuf(128, 4), sbuf(128, 4), nl.add, psum(128, 1)),
        lambda: nisa.tensor_scalar(
            sbuf(128, 4), sbuf(128, 4), nl.add, psum(128, 1), engine=nisa.engine.gpsimd
        ),
        "tensor_scalar on engine.gpsimd cannot access psum",
    ),
    "gpsimd and a second operand in psum": (
        lambda: nisa.tensor_scalar(sbuf(4, 4), sbuf(4, 4), nl.add, 1.0, op1=nl.add, operand1=psum(4, 1)),
        lambda: nisa.tensor_scalar(
            sbuf(4, 4), sbuf(4, 4), nl.add, 1.0, op1=nl.add, operand1=psum(4, 1), engine=nisa.engine.gpsimd
        ),
        "tensor_scalar on engine.gpsimd cannot access psum",
    ),
    "tensor_copy buffer": (
        lambda: nisa.tensor_copy(sbuf(128, 4), sbuf(128, 4)),
        lambda: nisa.tensor_copy(hbm(128, 4), sbuf(128, 4)),
        "tensor_copy dst must be in ['sbuf', 'psum'], got shared_hbm",
    ),
    "tensor_copy on ScalarE": (
        lambda: nisa.activation(sbuf(128, 4), nl.copy, psum(128, 4)),
        lambda: nisa.tensor_copy(sbuf(128, 4), psum(128, 4), engine=nisa.engine.scalar),
        "tensor_copy does not support engine.scalar on NeuronCore-v2",
    ),
    "bias is a column": (
        lambda: act(bias=sbuf(128, 1)),
        lambda: act(bias=sbuf(128, 8)),
        "bias must have a free dimension of 1, got [128, 8]",
    ),
    "bias is a tensor": (
        lambda: act(bias=sbuf(128, 1)),
        lambda: act(bias=1.0),
        "activation bias must be a [P, 1] tensor, got float",
    ),
    "bias dtype": (
        lambda: act(bias=sbuf(128, 1)),
        lambda: act(bias=sbuf(128, 1, dtype=nl.int32)),
        "bias dtype must be one of",
    ),
    "scale dtype": (
        lambda: act(scale=sbuf(128, 1, dtype=FP32)),
        lambda: act(scale=sbuf(128, 1)),
        "scale dtype must be one of ['float32'], got bfloat16",
    ),
    "reciprocal with bias": (
        lambda: act(op=nl.reciprocal),
        lambda: act(op=nl.reciprocal, bias=sbuf(128, 1)),
        "activation(op=reciprocal) does not support bias on gen2",
    ),
    "activation op": (
        lambda: act(op=nl.silu),
        lambda: act(op=nl.add),
        "activation does not support op 'add'",
    ),
    "alu op": (
        lambda: nisa.tensor_tensor(sbuf(4, 4), sbuf(4, 4), sbuf(4, 4), nl.multiply),
        lambda: nisa.tensor_tensor(sbuf(4, 4), sbuf(4, 4), sbuf(4, 4), nl.silu),
        "tensor_tensor does not support op 'silu'",
    ),
    "reduction result": (
        lambda: act(
            reduce_op=nl.add, reduce_res=sbuf(128, 1, dtype=FP32), reduce_cmd=nisa.reduce_cmd.reset_reduce
        ),
        lambda: act(
            reduce_op=nl.add, reduce_res=sbuf(128, 8, dtype=FP32), reduce_cmd=nisa.reduce_cmd.reset_reduce
        ),
        "activation reduce_res must be [128, 1], got [128, 8]",
    ),
    "reduce axis": (
        lambda: nisa.tensor_reduce(sbuf(4, 1), nl.add, sbuf(4, 8), axis=1),
        lambda: nisa.tensor_reduce(sbuf(4, 8), nl.add, sbuf(4, 8), axis=0),
        "tensor_reduce axis must be the last free axes",
    ),
    "memset value": (
        lambda: nisa.memset(sbuf(4, 4), 0.0),
        lambda: nisa.memset(sbuf(4, 4), 0),
        "memset value must match dst dtype bfloat16, got int",
    ),
    "free elements in sbuf": (
        lambda: act(sbuf(4, 32768, dtype=nl.int8)[:, 0:1], sbuf(4, 1)),
        lambda: act(sbuf(4, 65537, dtype=nl.int8), sbuf(4, 65537, dtype=nl.int8)),
        "has 65537 elements per partition, at most 65536 are possible in sbuf",
    ),
    "access pattern": (
        lambda: act(sbuf(2, 16), sbuf(2, 3, 3, 3, 3)[:, 0:2, 0:2, 0:2, 0:2]),
        lambda: act(sbuf(2, 32), sbuf(2, 3, 3, 3, 3, 3)[:, 0:2, 0:2, 0:2, 0:2, 0:2]),
        "needs 5 free dimensions in its access pattern, at most 4 are possible",
    ),
    "size in an access pattern": (
        lambda: act(sbuf(2, 65535, dtype=nl.int8), sbuf(2, 65535, dtype=nl.int8)),
        lambda: act(sbuf(2, 65536, dtype=nl.int8), sbuf(2, 65536, dtype=nl.int8)),
        "has a free dimension of 65536 elements in its access pattern, at most 65535 are possible",
    ),
    "stride in an access pattern": (
        lambda: nisa.memset(nl.ndarray((2, 2, 32767), dtype=nl.int8)[:, :, 0:1], 1),
        lambda: nisa.memset(nl.ndarray((2, 2, 32768), dtype=nl.int8)[:, :, 0:1], 1),
        "has a stride of 32768 elements in its access pattern, at most 32767 are possible",
    ),
    "one-zero operands": (
        mm,
        lambda: mm(is_moving_onezero=True),
        "nc_matmul is_stationary_onezero and is_moving_onezero are not modelled",
    ),
    "a queue of one's own": (
        lambda: nisa.dma_copy(dst=hbm(4, 4), src=sbuf(4, 4)),
        lambda: nisa.dma_copy(dst=hbm(4, 4), src=sbuf(4, 4), engine=nisa.engine.scalar),
        "dma_copy engine.scalar is not modelled",
    ),
    "dma priority": (
        lambda: nisa.dma_copy(dst=hbm(4, 4), src=sbuf(4, 4)),
        lambda: nisa.dma_copy(dst=hbm(4, 4), src=sbuf(4, 4), priority=1),
        "dma_copy priority is not modelled",
    ),
    "dma_transpose priority": (
        lambda: nisa.dma_transpose(dst=hbm(8, 4), src=sbuf(4, 8)),
        lambda: nisa.dma_transpose(dst=hbm(8, 4), src=sbuf(4, 8), priority=1),
        "dma_transpose priority is not modelled",
    ),
    "accumulate onto memset": (
        lambda: mm(accumulate=False),
        lambda: mm(dst=lambda: psum(128, 512), accumulate=True),
        "expected elements last written by nc_matmul, found elements of another instruction",
    ),
    "accumulate onto nothing": (
        mm,
        lambda: mm(accumulate=True),
        "expected elements last written by nc_matmul, found unwritten elements",
    ),
}


@pytest.mark.parametrize("rule", PAIRS)
def test_the_kernel_that_obeys_runs(rule):
    assert run(PAIRS[rule][0]).shape == (1, 1)


@pytest.mark.parametrize("rule", PAIRS)
def test_the_kernel_that_breaks_the_rule_is_refused_in_words(rule):
    with pytest.raises(NkiValidationError) as refusal:
        run(PAIRS[rule][1])
    assert PAIRS[rule][2] in str(refusal.value)


def test_a_sum_that_was_read_is_not_continued_by_chance():
    """Before NKI 0.3 the first write of a fresh tile starts a sum; reusing a tile would silently add to the
    old one.
    """

    def again(**kwargs):
        total = psum(128, 512, written=False)
        mm(dst=lambda: total)
        nisa.tensor_copy(sbuf(128, 512), total)
        mm(dst=lambda: total, **kwargs)

    run(lambda: again(accumulate=False))
    with pytest.raises(NkiValidationError, match="a sum that was read already"):
        run(again)


def test_what_trn1_refuses_later_generations_may_accept():
    bf16_transpose = PAIRS["transpose dtype on gen2"][1]
    assert run(bf16_transpose, TRN2).shape == (1, 1)
    with pytest.raises(NkiValidationError, match="must be bfloat16 on gen3, got float32"):
        run(PAIRS["transpose dtype on gen2"][0], TRN2)
    assert run(PAIRS["tensor_copy on ScalarE"][1], TRN2).shape == (1, 1)
    assert run(PAIRS["matmul dst dtype"][1], TRN3).shape == (1, 1)
    assert run(PAIRS["moving width"][1], TRN3).shape == (1, 1)


@pytest.mark.parametrize("slice_", [slice(0, 8), slice(4, 8), slice(7, 8)])
def test_reading_unwritten_memory_is_refused_through_any_view(slice_):
    def kernel():
        tile = nl.ndarray((128, 8), dtype=BF16, buffer=nl.sbuf, name="half")
        nisa.memset(tile[:, 0:4], 1.0)
        nisa.tensor_copy(sbuf(128, slice_.stop - slice_.start), tile[:, slice_])

    with pytest.raises(UninitializedError, match="'half'"):
        run(kernel)


def test_reading_what_another_view_wrote_is_fine():
    def kernel():
        tile = nl.ndarray((128, 2, 4), dtype=BF16, buffer=nl.sbuf)
        nisa.memset(tile.reshape((128, 8))[:, 0:4], 1.0)
        nisa.tensor_copy(sbuf(128, 4), tile[:, 0, :])

    run(kernel)


def test_indices_that_repeat_are_not_modelled():
    with pytest.raises(NkiValidationError, match="dma_copy unique_indices=False is not modelled"):
        run(lambda: nisa.dma_copy(dst=hbm(4, 4), src=sbuf(4, 4), unique_indices=False), api="0.2")


def test_unwritten_hbm_is_refused_as_source_and_as_output():
    with pytest.raises(UninitializedError):
        run(lambda: nisa.dma_copy(dst=sbuf(4, 4), src=hbm(4, 4)))

    def half_written():
        out = hbm(2, 4)
        nisa.dma_copy(dst=out[0:1], src=sbuf(1, 4))
        return out

    with pytest.raises(NkiValidationError, match="was not written everywhere"):
        simulate(half_written)()


@pytest.mark.parametrize("buffer", ["sbuf", "hbm", "private_hbm"])
def test_outputs_must_be_in_shared_hbm(buffer):
    with pytest.raises(NkiValidationError, match=f"kernel outputs must be in shared_hbm, got {buffer}"):
        simulate(lambda: nl.ndarray((4, 4), dtype=BF16, buffer=buffer))()


def test_inputs_are_not_written():
    def kernel(x):
        nisa.dma_copy(dst=x, src=sbuf(4, 4, dtype=FP32))
        return x

    with pytest.raises(NkiValidationError, match="is a kernel input"):
        simulate(kernel)(np.zeros((4, 4), np.float32))


def test_sbuf_capacity_counts_what_is_alive_and_names_its_holders():
    kib = 1024

    def fits():
        for _ in range(3):  # each turn's tile is gone before the next but one is made
            nl.ndarray((128, 80 * kib), dtype=nl.int8, buffer=nl.sbuf, name="turn")

    run(fits)
    with pytest.raises(
        CapacityError, match=r"expected at most 180224 bytes per partition, found 180225 .*Held: big 180224 B"
    ):
        run(
            lambda: (
                nl.ndarray((1, 176 * kib), dtype=nl.int8, buffer=nl.sbuf, name="big"),
                nl.ndarray((1, 1), dtype=nl.int8, buffer=nl.sbuf),
            )
        )
    run(lambda: nl.ndarray((1, 200 * kib), dtype=nl.int8, buffer=nl.sbuf), TRN2)


def test_psum_capacity_counts_banks():
    def hold(count, cols=512):
        return [psum(128, cols, written=False) for _ in range(count)]

    run(lambda: hold(8))
    run(lambda: hold(4, 1024))
    with pytest.raises(
        CapacityError, match=r"expected 1 free banks in a row .* found none of 8; .*bank 0 psum"
    ):
        run(lambda: hold(9))
    run(lambda: [psum(128, 512, written=False) and None for _ in range(20)])


def test_tensors_have_no_python_arithmetic():
    for broken in (lambda: sbuf(4, 4) + 1, lambda: 2 * sbuf(4, 4), lambda: sbuf(4, 4) - sbuf(4, 4)):
        with pytest.raises(TypeError, match=r"use nki\.isa instructions"):
            run(broken)


def test_words_outside_the_shared_subset_are_refused():
    for name in ("load", "store", "matmul", "arange"):
        with pytest.raises(AttributeError, match="outside the subset"):
            getattr(nl, name)


def test_nki_calls_outside_a_simulation_are_refused():
    with pytest.raises(RuntimeError, match="need a running simulation"):
        nl.ndarray((4, 4), dtype=BF16, buffer=nl.sbuf)
