"""The trace says everything that a cost model needs, and its counts are exact."""

import dataclasses
import itertools

import numpy as np
import pytest

from nki_kernels.cases import DTYPES, MLPCase, random_array
from nki_kernels.kernels.plain_matmul import matmul_hoisted, matmul_tiled
from nki_kernels.simulator import Placeholder, simulate
from nki_kernels.simulator import isa as nisa
from nki_kernels.simulator import language as nl
from nki_kernels.simulator.trace import DMA, HBM, PSUM, SBUF, SCALAR, TENSOR, Access, Allocation, Instruction
from tests.nki_kernels.harness import plan_case, run_svd_mlp
from tests.nki_kernels.test_planner import dry_run

BF16, FP32 = DTYPES["bf16"], DTYPES["fp32"]


def trace_of(kernel, *arrays, **options):
    """(instructions, allocations) of one run."""
    events = []
    simulate(kernel, listeners=[events.append], **options)(*arrays)
    return [e for e in events if isinstance(e, Instruction)], [e for e in events if isinstance(e, Allocation)]


def scale_kernel(x):
    out = nl.ndarray((4, 8), dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray((4, 16), dtype=x.dtype, buffer=nl.sbuf, name="tile")
    nisa.dma_copy(dst=tile[:, 4:12], src=x[1:5, 0:8])
    nisa.activation(dst=tile[:, 4:12], op=nl.copy, data=tile[:, 4:12], scale=2.0)
    nisa.dma_copy(dst=out, src=tile[:, 4:12])
    return out


def test_records_carry_engine_operands_boxes_and_descriptors():
    (load, scale, store), _ = trace_of(scale_kernel, np.ones((6, 8), np.float32))
    assert [record.engine for record in (load, scale, store)] == [DMA, SCALAR, DMA]
    assert [record.number for record in (load, scale, store)] == [0, 1, 2]
    tile = load.writes[0]
    assert (tile.space, tile.name, tile.partitions, tile.span, tile.row_bytes) == (
        SBUF,
        "tile",
        (0, 4),
        (16, 48),
        32,
    )
    source = load.reads[0]
    assert (source.space, source.span, source.row_bytes) == (HBM, (32, 160), 128)
    # HBM offers one run of 128 bytes, SBUF one of 32 per partition: 4 descriptors.
    assert (load.transfer_bytes, load.descriptors, load.descriptor_bytes) == (128, 4, 32)
    assert (
        scale.function == "copy"
        and scale.reads[0].overlaps(load.writes[0])
        and not scale.reads[0].overlaps(source)
    )
    assert (tile.free_elements, tile.elements, tile.itemsize, tile.dtype) == (8, 32, 4, "float32")


def test_buffers_come_and_go():
    _, allocations = trace_of(scale_kernel, np.ones((6, 8), np.float32))
    tile = [event for event in allocations if event.name == "tile"]
    assert [(event.live, event.number, event.bytes_per_partition) for event in tile] == [
        (True, 0, 64),
        (False, 3, 64),
    ]
    assert all(event.space in (SBUF, PSUM, HBM) for event in allocations)


def test_boxes_overlap_when_they_share_a_byte():
    base = Access(1, "t", SBUF, "float32", 4, (32, 4), (0, 32), (0, 16), 16, (0, 0))
    assert base.overlaps(base._replace(span=(12, 20)))
    assert not base.overlaps(base._replace(span=(16, 20)))
    assert not base.overlaps(base._replace(partitions=(32, 64)))
    assert not base.overlaps(base._replace(buffer=2))


def test_psum_tiles_rotate_through_the_banks():
    def kernel(x):
        out = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.shared_hbm)
        tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x)
        for _ in range(10):
            total = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_matmul(total, tile[:, 0:128], tile, accumulate=False)
            nisa.nc_matmul(total, tile[:, 0:128], tile, accumulate=True)
        nisa.dma_copy(dst=out, src=tile)
        return out

    records, _ = trace_of(kernel, np.ones((128, 512), np.float32))
    matmuls = [record for record in records if record.op == "nc_matmul"]
    assert [m.writes[0].banks[0] for m in matmuls[::2]] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert [m.accumulate for m in matmuls] == [False, True] * 10
    assert matmuls[0].flops == 2 * 128 * 128 * 512 and matmuls[0].engine == TENSOR


CASE = MLPCase(130, 200, 392, ("uv", "compact", "dense"), (70, 133, 150), norm=True, residual=True)


def test_a_dry_run_leaves_the_same_trace_as_a_real_one():
    wet, dry = [], []
    run_svd_mlp(CASE, listeners=[wet.append])
    dry_run(plan_case(CASE), dry.append)
    anonymous = [
        [e._replace(number=0) if isinstance(e, Allocation) else strip(e) for e in events]
        for events in (wet, dry)
    ]
    instructions = [[e for e in events if isinstance(e, Instruction)] for events in anonymous]
    assert instructions[0] == instructions[1] and len(instructions[0]) == len(dry) - sum(
        isinstance(e, Allocation) for e in dry
    )


def strip(record: Instruction) -> Instruction:
    """Names of kernel inputs differ between positional and keyword arguments, identities with them."""
    reads = tuple(access._replace(buffer=0, name="") for access in record.reads)
    return record._replace(
        reads=reads, writes=tuple(access._replace(buffer=0, name="") for access in record.writes)
    )


@pytest.mark.parametrize("forms", [("dense",) * 3, ("uv",) * 3, ("compact",) * 3, ("uv", "dense", "compact")])
@pytest.mark.parametrize("tokens", [1, 512, 2048])
def test_flops_and_bytes_are_those_of_the_formula(forms, tokens):
    """Llama-3.2-1B's sizes, dry: no work beyond the factors, and weights and activations cross HBM as often
    as the plan says.
    """
    rank = 1280
    case = MLPCase(tokens, 2048, 8192, forms, (rank,) * 3)
    plan = plan_case(case)
    events = []
    dry_run(plan, events.append)
    records = [e for e in events if isinstance(e, Instruction)]
    parameters = sum(params(form, rank) for form in forms)
    flops = sum(record.flops for record in records)
    # Matmuls by the identity: the pivots of down, and the transposes of x, 128 tokens at most at a time.
    identities = 2 * tokens * 128 * rank * (forms[2] == "compact")
    transposes = 2 * 2048 * tokens * min(128, tokens)
    assert flops == 2 * tokens * parameters + identities + transposes
    moved = sum(record.transfer_bytes for record in records)
    identity_bytes = plan.identity_size**2 * 2
    assert moved == plan.weight_cols_read() * 128 * 2 + identity_bytes + 2 * tokens * 2048 * 2
    assert plan.identity_col * 128 == parameters


def params(form: str, rank: int) -> int:
    return {"dense": 2048 * 8192, "uv": rank * (2048 + 8192), "compact": rank * (2048 + 8192 - rank)}[form]


@pytest.mark.parametrize("tokens", [1, 512])
def test_weight_rows_are_long(tokens):
    """At least 2 KiB per partition in every weight transfer, nearly all of them 8 KiB."""
    plan = plan_case(MLPCase(tokens, 2048, 8192, ("compact", "uv", "uv"), (1500, 1280, 1280)))
    events = []
    dry_run(plan, events.append)
    rows = [
        e.descriptor_bytes
        for e in events
        if isinstance(e, Instruction) and e.op == "dma_copy" and e.writes[0].name.startswith("ring")
    ]
    assert min(rows) >= 2048 and sum(size == 8192 for size in rows) > 0.9 * len(rows)


def test_nothing_but_x_is_transposed_at_run_time():
    events = []
    dry_run(plan_case(dataclasses.replace(CASE, tokens=512, hidden=256)), events.append)
    records = [e for e in events if isinstance(e, Instruction)]
    identity = next(e.writes[0].buffer for e in records if e.writes[0].shape == (128, 128))
    transposes = [e for e in records if e.op == "nc_matmul" and e.reads[1].buffer == identity]
    assert len(transposes) == 4 * 2
    assert not any(e.op in ("nc_transpose", "dma_transpose") for e in records)


@pytest.mark.parametrize(("kernel", "expected_gb"), [(matmul_tiled, 5.436), (matmul_hoisted, 4.429)])
def test_the_tutorial_kernels_move_what_theirs_move(kernel, expected_gb):
    """HBM traffic of [4096, 8192] @ [8192, 8192] in bf16, as counted for AWS's own (facts/nki.md section 4),
    on an eighth of M.
    """
    slices = 8
    records, _ = trace_of(
        kernel, Placeholder((8192, 4096 // slices), BF16), Placeholder((8192, 8192), BF16), dry=True
    )
    moved = sum(record.transfer_bytes for record in records)
    assert moved * slices / 1e9 == pytest.approx(expected_gb, abs=5e-4)


def test_listeners_do_not_keep_memory_alive():
    """Records name buffers, they do not hold them: 64 tiles of 100 KiB per partition would not fit
    otherwise.
    """

    def kernel(x):
        out = nl.ndarray((1, 1), dtype=x.dtype, buffer=nl.shared_hbm)
        for _ in range(64):
            tile = nl.ndarray((1, 25_000), dtype=x.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=tile[:, 0:1], src=x)
            nisa.dma_copy(dst=out, src=tile[:, 0:1])
            del tile
        return out

    records, _ = trace_of(kernel, random_array(np.random.default_rng(0), (1, 1), FP32), language=False)
    assert (
        len(records) == 128
        and len(set(itertools.chain(*[[a.buffer for a in r.writes] for r in records]))) == 65
    )
