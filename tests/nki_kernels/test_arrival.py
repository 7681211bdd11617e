"""A first product that begins before its operand is there: the same digits, from fewer instructions in a
row.
"""

import dataclasses

import numpy as np
import pytest

from nki_kernels.backend import simulate
from nki_kernels.cases import DTYPES, random_array
from nki_kernels.cost.counters import Counting
from nki_kernels.cost.estimate import schedule
from nki_kernels.cost.launches import launch_of
from nki_kernels.kernels.svd_mlp import xuv
from nki_kernels.layout import Projection, chain_layout, int8_layout
from nki_kernels.packing import pack
from nki_kernels.planner import Choice, build_plan
from nki_kernels.request import Request

K, RANK, N = 1024, 384, 300
CHOICE = Choice(256, 3, 512)


def plan_of(tokens, projection=None, dtype="bf16", transposed_input=True, layout=None):
    layout = layout or chain_layout(K, N, projection or Projection.whole("uv", RANK))
    return build_plan(Request(layout, tokens, DTYPES[dtype], transposed_input=transposed_input), CHOICE)


@pytest.mark.parametrize("tokens", [130, 256, 300])
def test_the_result_is_the_same_to_the_digit(tokens):
    plan = plan_of(tokens)
    assert plan.early_tiles == 3 and plan.input_wait() == 4
    dtype, rng = DTYPES["bf16"], np.random.default_rng(3)
    layout = chain_layout(K, N, Projection.whole("uv", RANK))
    sizes = {"down_first": (RANK, K), "down_second": (N, RANK)}
    weights = pack(layout, {name: random_array(rng, size, dtype) for name, size in sizes.items()})
    x = random_array(rng, (K, tokens), dtype)
    counts = [Counting(), Counting()]
    late = dataclasses.replace(plan, early_tiles=0)
    early, usual = (
        simulate(xuv, listeners=[count])(x, weights, each)
        for each, count in zip((plan, late), counts, strict=True)
    )
    assert early.tobytes() == usual.tobytes()
    assert counts[0].result() == counts[1].result()  # the same matmuls, and every byte once


def test_products_begin_when_a_chunk_of_rows_is_there():
    plan = plan_of(256)
    begins = []
    for each in (plan, dataclasses.replace(plan, early_tiles=0)):
        timeline, _ = schedule(*launch_of(each, DTYPES["bf16"]))
        begins.append(next(slot.start_ns for slot in timeline.slots if slot.engine == "tensor"))
    assert begins[0] < 0.8 * begins[1]


def test_only_a_plain_first_product_of_transposed_input_begins_early():
    assert plan_of(256, transposed_input=False).early_tiles == 0
    assert plan_of(256, Projection.whole("compact", RANK)).early_tiles == 0
    assert plan_of(256, Projection.whole("uv", 128, groups=2)).early_tiles == 0
    assert plan_of(256, Projection.whole("uv", 130)).early_tiles == 1  # the ragged column tile is not one
    assert plan_of(256, layout=chain_layout(512, N, Projection.whole("uv", RANK))).early_tiles == 0
    assert plan_of(256, layout=int8_layout(chain_layout(K, N, Projection.whole("uv", RANK)))).early_tiles == 0
