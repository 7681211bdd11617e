"""The autotuner: as good as the planner's rule at least, cheap, and reproducible from its choice."""

import pytest

from nki_kernels.cost.launches import price_plan
from nki_kernels.cost.search import (
    MAX_TRIED,
    Found,
    dma_bound_us,
    fitting_plans,
    search,
    search_measured,
    tensor_bound_us,
    useful_flops,
)
from nki_kernels.layout import DENSE, Projection, chain_layout, mlp_layout
from nki_kernels.planner import Declined, Request, build_plan, plan_launch
from nki_kernels.targets import TRN1
from tests.nki_kernels.cost.programs import BF16

UV = Projection.whole("uv", 320)
REQUESTS = [
    Request(mlp_layout(576, 1536, UV, UV, UV), tokens, BF16) for tokens in (1, 64, 700)
] + [Request(chain_layout(1024, 2048, Projection.whole("uv", 512)), 1500, BF16, transposed_input=True)]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"T{r.tokens}")
def test_the_winner_is_no_slower_than_the_planners_rule_and_its_choice_makes_it(request_):
    found = search(request_)
    assert isinstance(found, Found) and 1 <= found.tried <= MAX_TRIED
    assert build_plan(request_, found.choice) == found.plan
    rule = price_plan(plan_launch(request_), BF16)
    assert found.estimate.simulated_us <= rule.simulated_us * 1.005
    assert found.estimate.simulated_us >= max(
        tensor_bound_us(request_.layout, request_.tokens), found.estimate.busy.dma
    )


def test_bounds_are_below_what_is_scheduled():
    request = REQUESTS[2]
    for _, plan in list(fitting_plans(request))[::9]:
        found = price_plan(plan, BF16)
        assert found.simulated_us >= dma_bound_us(plan) * 0.99 and found.simulated_us >= tensor_bound_us(
            request.layout, request.tokens
        )


def test_every_plan_that_is_ranked_fits_and_none_is_there_twice():
    plans = [plan for _, plan in fitting_plans(REQUESTS[3])]
    assert len(plans) == len(set(plans)) > 10
    assert all(plan.sbuf_bytes() <= TRN1.sbuf_usable_bytes for plan in plans)


def test_useful_work_is_what_is_stored():
    compact = Projection.whole("compact", 100)
    layout = mlp_layout(256, 640, compact, compact, compact)
    assert useful_flops(layout, 3) == 2 * 3 * 3 * 100 * (256 + 640 - 100)
    assert useful_flops(mlp_layout(256, 640, DENSE, DENSE, DENSE), 1) == 2 * 3 * 256 * 640


def test_a_device_may_measure_in_place_of_the_schedule():
    seen = []

    def measure(plan):
        seen.append(plan)
        return 100.0 - len(seen)

    found = search_measured(REQUESTS[0], measure)
    assert found.measured_us == 100.0 - len(seen) and found.plan == seen[-1] and found.tried == len(seen) > 1
    assert build_plan(REQUESTS[0], found.choice) == found.plan


def test_nothing_to_find_is_said_in_the_planners_words():
    huge = Request(mlp_layout(16384, 53248, DENSE, DENSE, DENSE), 512, BF16)
    for found in (search(huge), search_measured(huge, lambda plan: 1.0)):
        assert isinstance(found, Declined) and "SBUF of trn1" in found.reason
        assert found == plan_launch(huge)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"T{r.tokens}")
def test_traffic_is_compulsory(request_):
    """x is read once, y written once, weights read once per token block at most, and nothing in between
    crosses HBM.
    """
    found = search(request_)
    features = request_.layout.hidden or request_.layout.intermediate
    activations = request_.tokens * features * 2
    assert found.estimate.counters.hbm_write_bytes == request_.tokens * request_.layout.down_second.cols * 2
    assert (
        found.estimate.counters.hbm_read_bytes
        <= activations + found.plan.blocks() * request_.layout.packed_cols * 128 * 2
    )
    assert found.estimate.counters.hbm_read_bytes >= activations + request_.layout.stored_cols * 128 * 2
