"""A first product that begins before its operand is there: the same sums, cut at the rows that come
together.
"""

import dataclasses

import numpy as np
import pytest

from nki_kernels.backend import simulate
from nki_kernels.cases import DTYPES, error, random_array
from nki_kernels.cost.calibration import CHAIN
from nki_kernels.cost.counters import Counting
from nki_kernels.cost.estimate import schedule
from nki_kernels.cost.launches import launch_of
from nki_kernels.kernels.svd_mlp import xuv
from nki_kernels.layout import Projection, chain_layout, int8_layout
from nki_kernels.packing import pack
from nki_kernels.planner import Choice, build_plan, plan_launch
from nki_kernels.request import Request

K, RANK, N = 1024, 384, 300
CHOICE = Choice(256, 3, 512, early_tiles=3)


def plan_of(tokens, projection=None, dtype="bf16", transposed_input=True, layout=None):
    layout = layout or chain_layout(K, N, projection or Projection.whole("uv", RANK))
    return build_plan(Request(layout, tokens, DTYPES[dtype], transposed_input=transposed_input), CHOICE)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [130, 256, 300])
def test_the_result_is_the_same_but_for_where_sums_are_cut(tokens, dtype):
    plan = plan_of(tokens, dtype=dtype)
    assert plan.early_tiles == 3 and plan.early_group == 2 and plan.input_wait() == 4
    rng = np.random.default_rng(3)
    layout = chain_layout(K, N, Projection.whole("uv", RANK))
    sizes = {"down_first": (RANK, K), "down_second": (N, RANK)}
    weights = pack(layout, {name: random_array(rng, size, DTYPES[dtype]) for name, size in sizes.items()})
    x = random_array(rng, (K, tokens), DTYPES[dtype])
    counts = [Counting(), Counting()]
    late = dataclasses.replace(plan, early_tiles=0)
    early, usual = (
        simulate(xuv, listeners=[count])(x, weights, each)
        for each, count in zip((plan, late), counts, strict=True)
    )
    assert error(early[:256], usual[:256]) <= {"bf16": 1e-3, "fp32": 1e-6}[dtype]
    assert early[256:].tobytes() == usual[256:].tobytes()  # the second block
    found, expected = (count.result() for count in counts)
    assert found.tensor == expected.tensor and found.flops == expected.flops  # the same matmuls,
    assert found.dma_bytes == expected.dma_bytes  # and no byte more


def tensor_starts(plan):
    """When each instruction of TensorE starts, in us."""
    timeline, _ = schedule(*launch_of(plan, DTYPES["bf16"]))
    return [slot.start_ns / 1000 for slot in timeline.slots if slot.engine == "tensor"]


def test_products_begin_when_the_first_row_tile_is_there():
    plan = plan_of(256)
    early, late = (tensor_starts(each)[0] for each in (plan, dataclasses.replace(plan, early_tiles=0)))
    assert early < 0.7 * late


def test_the_papers_chain_waits_for_nothing_but_its_first_rows():
    """K, R, N = 8192, 4096, 16384: after 40 us of 1.3 ms, TensorE never waits for x^T or weights."""
    k, rank, n = CHAIN
    layout = chain_layout(k, n, Projection.whole("uv", rank))
    plan = plan_launch(Request(layout, 512, DTYPES["bf16"], transposed_input=True))
    assert plan.block_tokens == 512 and plan.early_group > 1
    starts = tensor_starts(plan)
    steps = np.diff(starts)
    assert steps[np.array(starts[:-1]) > 40].max() < 1.01 * steps.min()


@pytest.mark.parametrize("rows", [8192, 10240, 14336])
def test_spare_memory_never_makes_weights_wait_for_one_another(rows):
    """Chunks of the same rows have slots of their own, and the last tile's is not the next rows' first."""
    layout = chain_layout(rows, 2048, Projection.whole("uv", 2560))
    plan = plan_launch(Request(layout, 512, DTYPES["bf16"], transposed_input=True))
    tile_chunks = rows // plan.ring_cols
    slots = [n * tile_chunks % plan.ring_slots for n in range(plan.early_tiles)]
    assert plan.early_tiles > plan.early_group == min(8, plan.ring_slots - 1)
    few = plan_launch(Request(layout, 64, DTYPES["bf16"], transposed_input=True))
    assert few.early_tiles > few.early_group == 1  # with few tokens weights are what it waits for
    assert len(set(slots[: plan.ring_slots])) == plan.ring_slots
    assert slots[-1] != 1


def test_only_a_plain_first_product_of_transposed_input_begins_early():
    assert plan_of(256, transposed_input=False).early_tiles == 0
    assert plan_of(256, Projection.whole("compact", RANK)).early_tiles == 0
    assert plan_of(256, Projection.whole("uv", 128, groups=2)).early_tiles == 0
    assert plan_of(256, Projection.whole("uv", 130)).early_tiles == 1  # the ragged column tile is not one
    assert plan_of(256, layout=chain_layout(512, N, Projection.whole("uv", RANK))).early_tiles == 0
    assert plan_of(256, layout=int8_layout(chain_layout(K, N, Projection.whole("uv", RANK)))).early_tiles == 0
