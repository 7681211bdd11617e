"""Formulas of the layer model, against numbers worked out by hand and limits that must hold."""

import itertools
import json

import pytest

from nki_kernels.cost.constants import CALIBRATED, DOCUMENTED
from nki_kernels.cost.interconnect import HOP_US, MESH, MESH_US, RING
from nki_kernels.cost.mlp_forms import FORMS, dense, gather, groups, narrow
from nki_kernels.cost.models import MODELS, ModelShape, rank_at
from nki_kernels.cost.perfetto import trace_json
from nki_kernels.cost.tensor_parallel import Setting, collectives_us, mlp_time
from nki_kernels.cost.transformer import Step, amdahl, step_time
from nki_kernels.targets import TRN1
from nki_kernels.tiling import IDENTITY
from tests.nki_kernels.cost.programs import BF16, array, matmuls, slots_of

TINY = ModelShape("tiny", 256, 1024, 3, 4, 2, 64, 1000)


def on(tp=1, between=RING, constants=CALIBRATED):
    return Setting(TRN1, constants, between, tp)


def test_collectives_follow_the_ring():
    """8 cores: 7 steps of a hop and an eighth of the bytes; a trn1 core has 192 GB/s of its chip's link."""
    assert RING.gather_us(1.92e6, 8) == pytest.approx(7 * (HOP_US + 0.24e6 / 192e3))
    assert RING.all_reduce_us(1.92e6, 8) == 2 * RING.gather_us(1.92e6, 8)
    assert RING.gather_us(1e6, 1) == MESH.all_reduce_us(1e6, 1) == 0


def test_a_mesh_takes_as_long_on_two_cores_as_on_thirty_two():
    """But for the wire; a small all-reduce is one step, a large one two, by recursive doubling beyond 1
    MiB.
    """
    assert MESH.gather_us(0, 2) == MESH.gather_us(0, 32) == MESH_US
    assert MESH.all_reduce_us(19_200, 8) == pytest.approx(MESH_US + 7 * 19_200 / 192e3)
    assert MESH.all_reduce_us(1 << 20, 32) == 2 * MESH.gather_us(1 << 20, 32)
    assert MESH.all_reduce_us(1 << 22, 32) == pytest.approx(2 * (MESH_US + (1 << 22) * 31 / 32 / 192e3))
    assert MESH.gather_us(1000, 2) > RING.gather_us(1000, 2)  # the floor that a ring of two lacks
    assert MESH.gather_us(1000, 32) < RING.gather_us(1000, 32)


def test_amdahl_is_a_bound_and_a_formula():
    assert amdahl(0.5) == 2 and amdahl(0.5, 2) == pytest.approx(4 / 3) and amdahl(0.3, 1) == 1


@pytest.mark.parametrize("form", ["uv", "compact"])
def test_ranks_are_the_largest_within_the_budget(form):
    for shape in MODELS.values():
        h, i = shape.hidden, shape.intermediate
        rank = rank_at(h, i, form, 0.2)
        kept = [r * (h + i - (r if form == "compact" else 0)) for r in (rank, rank + 1)]
        assert kept[0] <= 0.8 * h * i < kept[1]
    assert rank_at(4096, 14336, "uv", 0.05) == 3026  # facts of the project: the exact k of 8B at 5 %
    assert (rank_at(2048, 8192, "uv", 0.2), rank_at(2048, 8192, "compact", 0.2)) == (1310, 1543)
    assert rank_at(2048, 8192, "uv", 0.9999) == 0


def parameters(blend):
    """Weights that a core holds, and what its launches compute with them, as a mean over the layers."""
    total = 0.0
    for share, core in blend:
        for layout in core.launches:
            for _, matrix, n, _ in layout.tiles():
                rows = sum(rows for _, _, rows, kind in matrix.blocks(n) if kind != IDENTITY)
                total += share * rows * matrix.tile_width(n)
    return total


@pytest.mark.parametrize("name", ["groups uv", "groups compact", "narrow"])
@pytest.mark.parametrize("tp", [1, 8, 32])
def test_what_ends_on_tiles_meets_the_budget_exactly(name, tp):
    """Ranks of a group are whole row tiles, and layers share them so that the parameters are those asked
    for.
    """
    shape = MODELS["Llama-3.1-8B"]
    blend = FORMS[name](shape, tp, 0.2)
    asked = 0.8 * 3 * shape.hidden * shape.intermediate / tp
    assert sum(share for share, _ in blend) == pytest.approx(1)
    assert parameters(blend) == pytest.approx(asked, rel=2e-3)
    for _, core in blend:
        (layout,) = core.launches
        assert all(m is None or m.rows % 64 == 0 for m in (layout.down_second, layout.gate_second))


def test_a_group_a_core_has_the_collectives_of_a_dense_mlp_and_gather_two_more():
    shape, hidden = MODELS["Llama-3.2-1B"], 2048
    for setting in (on(8), on(8, MESH)):
        reduce = setting.collectives.all_reduce_us(64 * hidden * 2, 8)
        for blend in (dense(shape, 8), groups(shape, 8, "compact", 0.2), narrow(shape, 8, 0.2)):
            assert all(collectives_us(core, hidden, 64, setting) == reduce for _, core in blend)
        ((_, core),) = gather(shape, 8, "uv", 0.2)
        assert len(core.launches) == 3
        z = 8 * 164  # R 1310 on 8 cores
        between = setting.collectives.gather_us(64 * 2 * z * 2, 8) + setting.collectives.gather_us(
            64 * z * 2, 8
        )
        assert collectives_us(core, hidden, 64, setting) == pytest.approx(reduce + between)
    assert mlp_time(dense(TINY, 1), 256, 64, BF16, on()).collectives_us == 0


def test_a_budget_below_a_tile_is_refused_in_words():
    for name in ("groups uv", "groups compact", "narrow"):
        with pytest.raises(ValueError, match="at least 128, a row tile, found 0; remove less"):
            FORMS[name](MODELS["Llama-3.2-1B"], 1, 0.9999)


def test_a_model_says_which_cores_do_not_divide_it():
    shape = MODELS["Llama-3.2-1B"]
    assert shape.why_not_on(32) is None
    assert "divisor of the 8192 channels" in shape.why_not_on(3)
    assert "divisor of the 32 heads" in shape.why_not_on(64)


def test_parts_of_a_step_add_up_and_no_kernel_beats_amdahl():
    whole, low = (
        step_time(TINY, blend, Step(4, 1, 512), on()) for blend in (dense(TINY, 1), narrow(TINY, 1, 0.3))
    )
    assert whole.total == pytest.approx(whole.mlp + whole.attention + whole.norms + whole.lm_head)
    assert (low.attention, low.norms, low.lm_head) == (whole.attention, whole.norms, whole.lm_head)
    assert whole.total / low.total == pytest.approx(amdahl(whole.mlp_share, whole.mlp / low.mlp))
    assert 1 < whole.total / low.total < amdahl(whole.mlp_share)


def test_decode_reads_every_weight_once():
    """The lm_head of one token at the documented rate, and a context that costs its K and V."""
    short, long = (
        step_time(TINY, dense(TINY, 1), Step(1, 1, context), on(constants=DOCUMENTED))
        for context in (1, 100_001)
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
