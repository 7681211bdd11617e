"""What the planner says of waits is what the schedule shows, and so it finds the plan that the schedule likes."""

import dataclasses

import pytest

from nki_kernels.cases import DTYPES
from nki_kernels.cost.launches import price_plan
from nki_kernels.effort import effort_us, natural_us, tensor_us
from nki_kernels.layout import DENSE, int8_layout, mlp_layout
from nki_kernels.planner import Choice, build_plan, plan_launch
from nki_kernels.request import Request
from nki_kernels.targets import TRN1
from nki_kernels.waits import idle_us, spread_us, transfers_us

BF16 = DTYPES["bf16"]
LAYOUT = mlp_layout(2048, 512, DENSE, DENSE, DENSE)  # Llama-3.2-1B on 16 cores
SIZES = [(128, 0), (256, 0), (256, 1024), (512, 0), (512, 512), (768, 1024), (1024, 0), (1024, 512)]
REQUEST = Request(LAYOUT, 2048, BF16)


def plan_of(tokens, out_cols, request=REQUEST, **options):
    return build_plan(request, Choice(tokens, 8, 4096, out_cols, **options))


def simulated_us(plan):
    return price_plan(plan, BF16).simulated_us


def test_work_and_waits_are_what_the_schedule_takes():
    """Within an eighth, where the work alone is up to a third too little."""
    plans = [plan_of(*size) for size in SIZES]
    work = [tensor_us(plan, TRN1) for plan in plans]
    waits = [idle_us(plan, natural_us(plan, TRN1), TRN1) for plan in plans]
    ratios = [simulated_us(p) / (a + b) for p, a, b in zip(plans, work, waits, strict=True)]
    assert min(ratios) > 0.95 and max(ratios) < 1.125
    assert max(simulated_us(p) / a for p, a in zip(plans, work, strict=True)) > 1.3


@pytest.mark.parametrize("layout", [LAYOUT, int8_layout(LAYOUT)], ids=["bf16", "int8"])
def test_the_plan_is_the_fastest_of_all_sizes(layout):
    request = Request(layout, 2048, BF16)
    found = simulated_us(plan_launch(request))
    assert found <= 1.01 * min(simulated_us(plan_of(*size, request)) for size in SIZES)


def test_rows_over_staged_output_wait_for_it():
    apart, shared = (plan_of(512, 1024, shares_rows=shares) for shares in (False, True))
    found, expected = (
        simulated_us(shared) - simulated_us(apart),
        effort_us(shared, TRN1) - effort_us(apart, TRN1),
    )
    assert found > 0 and 0.5 * found < expected < 1.5 * found
    alone = dataclasses.replace(shared, tokens=512), dataclasses.replace(apart, tokens=512)
    assert effort_us(alone[0], TRN1) == effort_us(alone[1], TRN1)  # there is no next block


def test_scales_spread_piece_by_piece_are_products_of_every_block():
    once, often = (
        plan_of(512, 512, Request(int8_layout(LAYOUT), 2048, BF16), spreads_pieces=x) for x in (False, True)
    )
    assert spread_us(often, TRN1) == 4 * spread_us(once, TRN1) > 0
    assert spread_us(plan_of(512, 512), TRN1) == 0
    busy = [price_plan(plan, BF16).busy.tensor for plan in (once, often)]
    assert busy[1] - busy[0] == pytest.approx(3 * spread_us(once, TRN1), rel=0.01)


def test_nothing_is_known_of_the_waits_of_other_launches():
    """What they read and write comes and goes in other ways, such as rows of x^T."""
    plan = build_plan(Request(LAYOUT, 2048, BF16, transposed_input=True), Choice(512, 8, 4096))
    assert idle_us(plan, natural_us(plan, TRN1), TRN1) == transfers_us(plan, TRN1) == 0


@pytest.mark.parametrize("channels", [896, 1024])
def test_an_int8_prefill_of_4b_on_eight_cores_is_no_longer_than_in_bf16(channels):
    """Narrow by a fifth: rows are not put over staged output, and scales are spread once."""
    layout = mlp_layout(2560, channels, DENSE, DENSE, DENSE)
    plans = [plan_launch(Request(each, 2048, BF16)) for each in (int8_layout(layout), layout)]
    assert plans[0].at.rows != plans[0].at.output and not plans[0].spreads_pieces
    int8, bf16 = (simulated_us(plan) for plan in plans)
    assert int8 <= 1.02 * bf16
