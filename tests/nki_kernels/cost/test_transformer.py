"""Formulas of the layer model, against numbers worked out by hand and limits that must hold."""

import itertools
import json

import pytest

from nki_kernels.cost.constants import DOCUMENTED, HOP_US
from nki_kernels.cost.models import MODELS, ModelShape, rank_at
from nki_kernels.cost.perfetto import trace_json
from nki_kernels.cost.tensor_parallel import all_reduce_us, gather_us, mlp_time, shard, stages
from nki_kernels.cost.transformer import Step, amdahl, step_time
from nki_kernels.layout import DENSE
from tests.nki_kernels.cost.programs import BF16, array, matmuls, slots_of

TINY = ModelShape("tiny", 256, 768, 3, 4, 2, 64, 1000)
LOW, FULL = (("uv", 100),) * 3, (("dense", 0),) * 3


def test_collectives_follow_the_ring():
    """8 cores: 7 steps of a hop and an eighth of the bytes; a trn1 core has 192 GB/s of its chip's link."""
    assert gather_us(1.92e6, 8) == pytest.approx(7 * (HOP_US + 0.24e6 / 192e3))
    assert all_reduce_us(1.92e6, 8) == 2 * gather_us(1.92e6, 8)
    assert gather_us(1e6, 1) == 0


def test_amdahl_is_a_bound_and_a_formula():
    assert amdahl(0.5) == 2 and amdahl(0.5, 2) == pytest.approx(4 / 3) and amdahl(0.3, 1) == 1


def test_ranks_never_exceed_the_budget():
    for shape in MODELS.values():
        rank = rank_at(shape, 0.2)
        kept = rank * (shape.hidden + shape.intermediate) / (shape.hidden * shape.intermediate)
        assert (
            kept <= 0.8 < kept + 2 * (shape.hidden + shape.intermediate) / (shape.hidden * shape.intermediate)
        )
    assert rank_at(MODELS["Llama-3.1-8B"], 0.05) == 3026  # facts of the project: the exact k of 8B at 5 %


def test_every_factor_shrinks_by_tp():
    """Bytes of one core over the whole: 1 / tp and a little padding, where replicating a factor would keep
    far more.
    """
    whole = sum(layout.stored_cols for layout in stages(2048, 8192, (shard("uv", 1310, 8192, 1),) * 3, 1))
    for tp in (2, 8, 32):
        mine = sum(
            layout.stored_cols for layout in stages(2048, 8192, (shard("uv", 1310, 8192, tp),) * 3, tp)
        )
        assert 1 / tp <= mine / whole < 1.25 / tp + 0.01
    assert len(stages(2048, 8192, (DENSE, DENSE, DENSE), 8)) == 1


def test_one_core_has_no_collectives_and_many_have_those_of_the_scheme():
    alone, eight = (mlp_time((1024, 4096), (("uv", 800),) * 3, 64, BF16, tp) for tp in (1, 8))
    assert alone.collectives_us == 0 and len(alone.launches) == 1 and len(eight.launches) == 3
    expected = gather_us(64 * 2 * 800 * 2, 8) + gather_us(64 * 800 * 2, 8) + all_reduce_us(64 * 1024 * 2, 8)
    assert eight.collectives_us == pytest.approx(expected)
    assert eight.kernels_us < alone.kernels_us


def test_parts_of_a_step_add_up_and_no_kernel_beats_amdahl():
    dense, low = (step_time(TINY, forms, Step(4, 1, 512)) for forms in (FULL, LOW))
    assert dense.total == pytest.approx(dense.mlp + dense.attention + dense.norms + dense.lm_head)
    assert (low.attention, low.norms, low.lm_head) == (dense.attention, dense.norms, dense.lm_head)
    assert dense.total / low.total == pytest.approx(amdahl(dense.mlp_share, dense.mlp / low.mlp))
    assert 1 < dense.total / low.total < amdahl(dense.mlp_share)


def test_decode_reads_every_weight_once():
    """The lm_head of one token at the documented rate, and a context that costs its K and V."""
    short, long = (
        step_time(TINY, FULL, Step(1, 1, context), constants=DOCUMENTED) for context in (1, 100_001)
    )
    assert short.lm_head == pytest.approx(256 * 1000 * 2 / 272e3)
    assert long.attention - short.attention == pytest.approx(3 * 100_000 * 2 * 2 * 64 * 2 / 272e3)


def test_a_timeline_is_valid_chrome_json_that_says_it_is_simulated():
    slots = slots_of(matmuls, array(128, 128), array(128, 512))
    trace = json.loads(trace_json(slots, "a test"))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert trace["otherData"]["origin"] == "simulated" and len(events) == len(slots)
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(slots[-1].end_ns / 1000)
    for track in {event["tid"] for event in events}:  # nothing overlaps on a track
        mine = sorted((event["ts"], event["dur"]) for event in events if event["tid"] == track)
        assert all(a + d <= b + 1e-9 for (a, d), (b, _) in itertools.pairwise(mine))
