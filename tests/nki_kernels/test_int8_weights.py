"""int8 weights in the kernels: the same sums as of the dequantised weights, one byte a weight, casts on two
engines, and what is refused.
"""

import itertools

import numpy as np
import pytest

from nki_kernels import reference
from nki_kernels.backend import simulate
from nki_kernels.cases import (
    DTYPES,
    MAX_ERROR,
    MIXES,
    MLPCase,
    error,
    quantised,
    random_array,
    random_weights,
)
from nki_kernels.cost.estimate import schedule
from nki_kernels.cost.launches import launch_of
from nki_kernels.kernels.sharded import first_factors, last_factor, second_factors
from nki_kernels.kernels.svd_mlp import xuv
from nki_kernels.layout import (
    DENSE,
    Projection,
    chain_layout,
    first_stage,
    int8_layout,
    last_stage,
    mlp_layout,
    second_stage,
)
from nki_kernels.packing import factors_by_name, pack, pack_norm, pack_scales, unpack
from nki_kernels.planner import Choice, Request, build_plan, plan_launch
from nki_kernels.reference import SCALE
from nki_kernels.request import stage_request
from nki_kernels.simulator import isa as nisa
from nki_kernels.simulator import language as nl
from nki_kernels.simulator.rules import NkiValidationError
from nki_kernels.simulator.trace import SCALAR, VECTOR, Instruction
from tests.nki_kernels.harness import EPS, plan_case, run_svd_mlp, scales_by_name, without_scales

SIZES = {
    1: (640, (140, 300, 128)),
    2: (640, (37, 150, 130)),
    4: (1040, (130, 64, 20)),
    8: (1040, (1, 70, 33)),
}
FP32 = DTYPES["fp32"]


@pytest.mark.parametrize(
    ("groups", "forms"), [(1, mix) for mix in MIXES] + list(itertools.product((2, 4, 8), MIXES[::4]))
)
def test_the_product_is_that_of_the_scaled_integers(groups, forms):
    intermediate, ranks = SIZES[groups]
    for tokens, dtype in ((3, "fp32"), (300, "bf16")):
        case = MLPCase(tokens, 200, intermediate, forms, ranks, dtype, tokens > 3, tokens > 3, groups)
        found, expected = run_svd_mlp(case, weights=quantised(random_weights(case)))
        assert error(found, expected) <= MAX_ERROR[dtype], case


def test_the_reference_is_that_of_the_dequantised_weights():
    case = MLPCase(6, 200, 640, ("compact", "uv", "compact"), (140, 150, 130), "fp32", groups=2)
    weights = quantised(random_weights(case))
    wide = {
        name: {
            suffix: t * tensors[suffix + SCALE][:, None]
            for suffix, t in tensors.items()
            if SCALE not in suffix
        }
        for name, tensors in weights.items()
    }
    x = random_array(np.random.default_rng(1), (6, 200), FP32)
    assert error(reference.svd_mlp(x, weights, groups=2), reference.svd_mlp(x, wide, groups=2)) < 1e-6


@pytest.mark.parametrize("form", ["dense", "uv", "compact"])
@pytest.mark.parametrize(
    ("transposed_input", "transposed_output"), list(itertools.product((False, True), repeat=2))
)
@pytest.mark.parametrize("silu", [False, True])
def test_a_projection_by_itself(form, transposed_input, transposed_output, silu):
    case = MLPCase(130, 200, 392, (form,) * 3, (150,) * 3, "fp32")
    weights = quantised(random_weights(case))["down_proj"]
    layout = int8_layout(chain_layout(392, 200, case.projections[2], transposed_output))
    plan = plan_launch(Request(layout, 130, FP32, silu=silu, transposed_input=transposed_input))
    named = {"down_proj": weights}
    packed = pack(layout, factors_by_name(without_scales(named)))
    x = random_array(np.random.default_rng(2), (130, 392), FP32)
    given = np.ascontiguousarray(x.T) if transposed_input else x
    found = simulate(xuv)(given, packed, plan, scales=pack_scales(layout, scales_by_name(named)))
    expected = reference.xuv(x, weights, silu)
    assert error(found.T if transposed_output else found, expected) <= MAX_ERROR["fp32"]


@pytest.mark.parametrize("tokens", [5, 140])
def test_the_launches_between_collectives(tokens):
    """One core that owns all: three launches give what one gives."""
    case = MLPCase(tokens, 200, 392, ("uv", "compact", "compact"), (140, 150, 130), "fp32", True)
    weights = quantised(random_weights(case))
    whole = int8_layout(mlp_layout(200, 392, *case.projections))
    factors, scales = factors_by_name(without_scales(weights)), scales_by_name(weights)
    x = random_array(np.random.default_rng(3), (tokens, 200), FP32)
    norm = 1 + random_array(np.random.default_rng(4), (200,), FP32, 0.2)

    def launch(kernel, stage, *arrays):
        stage = int8_layout(stage)
        mine = {name: t for name, t in factors.items() if stage.matrix(name) is not None}
        plan = plan_launch(stage_request(stage, tokens, FP32, EPS))
        options = {"norm_weight": pack_norm(norm)} if plan.with_norm else {}
        options["scales"] = pack_scales(stage, {name: scales[name] for name in mine})
        return simulate(kernel)(*arrays, pack(stage, mine), plan, **options)

    z = launch(first_factors, first_stage(whole), x)
    zd = launch(second_factors, second_stage(whole), None, z, (140, 150, 130))
    found = launch(last_factor, last_stage(whole), zd)
    assert error(found, reference.svd_mlp(x, weights, (norm, EPS))) <= MAX_ERROR["fp32"]


def records(case, plan=None):
    events = []
    run_svd_mlp(case, plan, weights=quantised(random_weights(case)), listeners=[events.append])
    return [event for event in events if isinstance(event, Instruction)]


CASE = MLPCase(8, 512, 1024, ("compact", "uv", "compact"), (256, 256, 384), "bf16")


def test_weights_cross_hbm_as_one_byte_each():
    plan = plan_case(CASE, int8=True)
    weights = [r for r in records(CASE, plan) if r.op == "dma_copy" and r.writes[0].name.startswith("raw")]
    assert all(r.reads[0].dtype == r.writes[0].dtype == "int8" for r in weights)
    assert sum(r.transfer_bytes for r in weights) == 128 * plan.identity_col


def test_both_engines_cast_and_each_weight_once():
    plan = plan_case(CASE, int8=True)
    casts = [r for r in records(CASE, plan) if r.reads and r.reads[0].name.startswith("raw")]
    assert {r.engine for r in casts} == {SCALAR, VECTOR}
    assert sum(r.reads[0].free_elements for r in casts) == plan.identity_col
    by_scalar = sum(r.reads[0].free_elements for r in casts if r.engine == SCALAR)
    assert 0.4 < by_scalar / plan.identity_col < 0.7  # 1.4 to 1.12 GHz, and little else to do


def test_no_identity_is_multiplied_for_the_pivots_of_down():
    """They are added on the way out of PSUM: in the sum, the scale would spoil them."""
    layout = mlp_layout(512, 1024, *CASE.projections)
    down = int8_layout(layout).down_first
    assert any(kind == 2 for n in range(3) for *_, kind in layout.down_first.blocks(n))
    assert not any(kind == 2 for n in range(3) for *_, kind in down.blocks(n))
    assert [down.added_rows(n) for n in range(3)] == [128, 128, 128]


@pytest.mark.parametrize(("tokens", "ring"), [(300, 1), (300, 2), (140, 9)])
def test_any_ring_gives_the_right_answer(tokens, ring):
    case = MLPCase(tokens, 700, 1000, ("uv", "compact", "compact"), (150, 190, 160), "fp32", groups=2)
    layout = int8_layout(mlp_layout(case.hidden, case.intermediate, *case.projections))
    plan = build_plan(Request(layout, case.tokens, FP32), Choice(256, ring, 512, 512, 1))
    found, expected = run_svd_mlp(case, plan, quantised(random_weights(case)))
    assert error(found, expected) <= MAX_ERROR["fp32"]


@pytest.mark.parametrize("form", ["dense", "uv"])
def test_scales_spread_piece_by_piece_give_the_same_digits(form):
    """Dense down reads h to the end, so the spread scales lie beside it; those of uv lie over it."""
    case = MLPCase(300, 1100, 640, (form,) * 3, (150,) * 3, "bf16", norm=True, residual=True)
    layout = int8_layout(mlp_layout(case.hidden, case.intermediate, *case.projections))
    request = Request(layout, case.tokens, DTYPES["bf16"], EPS, residual=True)
    choices = [(512, False), (512, True), (1024, True), (0, True)]
    plans = [build_plan(request, Choice(128, 4, 512, cols, spreads_pieces=x)) for cols, x in choices]
    once, *pieces = (run_svd_mlp(case, plan, quantised(random_weights(case)))[0] for plan in plans)
    assert all(found.tobytes() == once.tobytes() for found in pieces)
    spread_bytes = [plan.at.small - plan.at.spread for plan in plans]
    assert spread_bytes == [4608, 2048, 4096, 4608]
    # The ones that spread them are made once a block: at every piece, TensorE would wait for VectorE.
    timelines = [schedule(*launch_of(plan, DTYPES["bf16"]))[0] for plan in plans]
    once, *others = (sum(slot.op == "memset" for slot in timeline.slots) for timeline in timelines)
    assert others == [once + plans[0].blocks() - 1] * 3


@pytest.mark.parametrize("form", ["uv", "dense"])
def test_int8_leaves_the_room_of_a_large_block(form):
    """Llama-3.1-8B, 0.20 removed: as many tokens a block as in bf16, and no ring more than it needs."""
    intermediate, part = (14336, Projection.whole("uv", 2550)) if form == "uv" else (11468, DENSE)
    layout = mlp_layout(4096, intermediate, part, part, part)
    plans = [plan_launch(stage_request(each, 2048, DTYPES["bf16"])) for each in (layout, int8_layout(layout))]
    assert [plan.block_tokens for plan in plans] == [512, 512]
    assert plans[1].spreads_pieces


@pytest.mark.parametrize("groups", SIZES)
def test_packing_and_unpacking_are_inverse(groups):
    intermediate, ranks = SIZES[groups]
    case = MLPCase(1, 96, intermediate, ("uv", "compact", "compact"), ranks, "fp32", groups=groups)
    layout = int8_layout(mlp_layout(case.hidden, case.intermediate, *case.projections))
    factors = factors_by_name(without_scales(quantised(random_weights(case))))
    packed = pack(layout, factors)
    assert packed.dtype == np.int8
    for name, tensor in unpack(layout, packed).items():
        np.testing.assert_array_equal(tensor, factors[name])


def test_scales_lie_where_their_columns_are():
    layout = int8_layout(mlp_layout(256, 640, *(Projection.whole("compact", 130, 2),) * 3))
    counts = {"gate_first": 260, "up_first": 260, "gate_second": 380, "up_second": 380, "down_first": 260}
    scales = {name: np.arange(1.0, count + 1) for name, count in counts.items()} | {
        "down_second": np.arange(256) + 7.0
    }
    packed = pack_scales(layout, scales)
    second = layout.gate_second
    assert packed.shape == (128, layout.scale_cols)
    # Channel 130 of the first group is its first that is no pivot; channel 320 + 130 the second group's.
    assert packed[2, second.scale_at + 1] == 1 and packed[2, second.scale_at + 3 + 1] == 191
    assert (packed[:, second.scale_at] == 1).all()
    assert packed[5, layout.down_second.scale_at + 1] == 128 + 5 + 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("up_first"), "up_first: expected 256 scales, found None"),
        (lambda s: s.update(gate_first=np.ones(3)), r"gate_first: expected 256 scales, found \(3,\)"),
    ],
)
def test_scales_that_do_not_fit_are_refused(change, words):
    scales = scales_by_name(quantised(random_weights(CASE)))
    change(scales)
    with pytest.raises(ValueError, match=words):
        pack_scales(int8_layout(mlp_layout(512, 1024, *CASE.projections)), scales)


def test_scales_must_be_given_and_only_then():
    case = MLPCase(3, 64, 96, ("dense",) * 3, (0,) * 3)
    weights = random_weights(case)
    with pytest.raises(AssertionError, match="scales: expected True by the plan, found False"):
        run_svd_mlp(case, plan_case(case, int8=True), weights)
    with pytest.raises(AssertionError, match="scales: expected False by the plan, found True"):
        plan = plan_case(case)
        packed = pack(mlp_layout(64, 96, *case.projections), factors_by_name(weights))
        simulate(xuv)(np.zeros((3, 64), np.float32), packed, plan, scales=np.ones((128, 2), np.float32))


def test_pivots_that_are_somewhere_in_z_are_refused():
    shifted = Projection("compact", 40, 10, 10, 20)
    with pytest.raises(
        ValueError, match="expected pivots that begin with the core's own, found a shift of 20"
    ):
        int8_layout(mlp_layout(64, 96, shifted, shifted, shifted))


def test_tensor_e_takes_no_integers():
    def kernel(x):
        tile = nl.ndarray((64, 64), dtype=nl.int8, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x)
        total = nl.ndarray((64, 64), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(total, tile, tile, accumulate=False)

    with pytest.raises(NkiValidationError, match=r"nc_matmul stationary dtype must be one of .*, got int8"):
        simulate(kernel)(np.ones((64, 64), np.int8))


def test_casts_are_exact():
    """Every int8 is a bf16."""

    def kernel(q):
        raw = nl.ndarray((128, 2), dtype=nl.int8, buffer=nl.sbuf)
        nisa.dma_copy(dst=raw, src=q)
        wide = nl.ndarray((128, 2), dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.activation(dst=wide[:, 0:1], op=nl.copy, data=raw[:, 0:1])
        nisa.tensor_copy(dst=wide[:, 1:2], src=raw[:, 1:2])
        out = nl.ndarray((128, 2), dtype=nl.bfloat16, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=wide)
        return out

    q = np.arange(-128, 128).astype(np.int8).reshape(2, 128).T.copy()
    np.testing.assert_array_equal(simulate(kernel)(q).astype(np.int32), q)
