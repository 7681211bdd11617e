"""Plans fit by construction, say what limits them, and are what the kernel then does."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels.cases import DTYPES, MODELS, MLPCase, random_weights
from nki_kernels.kernels.svd_mlp import svd_mlp
from nki_kernels.layout import DENSE, FORMS, Projection, chain_layout, first_stage, mlp_layout, second_stage
from nki_kernels.planner import Choice, Declined, Request, block_sizes, build_plan, plan_launch, plan_mlp
from nki_kernels.simulator import Placeholder, simulate
from nki_kernels.simulator.memory import Machine
from nki_kernels.simulator.trace import SBUF, Allocation
from nki_kernels.targets import TARGETS, TRN1
from nki_kernels.tile_plan import Plan
from tests.nki_kernels.harness import EPS, plan_case, run_svd_mlp

BF16 = DTYPES["bf16"]


class Peak:
    """Listens for the highest byte of SBUF that a tensor was put on, and the highest PSUM bank."""

    def __init__(self):
        self.sbuf_bytes, self.psum_banks = 0, 0

    def __call__(self, event):
        if not isinstance(event, Allocation):
            return
        end = event.address + event.bytes_per_partition
        if event.space == SBUF:
            self.sbuf_bytes = max(self.sbuf_bytes, end)
        self.psum_banks = max(self.psum_banks, event.banks[1])


def dry_run(plan: Plan, *listeners, target=TRN1) -> None:
    """Walk the kernel of a plan without arithmetic."""
    dtype = BF16 if plan.itemsize == 2 else DTYPES["fp32"]
    x = Placeholder((plan.tokens, plan.hidden), dtype)
    weights = Placeholder((128, plan.identity_col + 128), dtype)
    norm = Placeholder((128, plan.x_tiles), np.dtype(np.float32)) if plan.with_norm else None
    residual = x if plan.with_residual else None
    simulate(svd_mlp, target, listeners, dry=True)(x, weights, plan, norm_weight=norm, residual=residual)


@st.composite
def requests(draw):
    hidden, intermediate = draw(st.integers(2, 700)), draw(st.integers(2, 1500))
    projections = []
    for _ in range(3):
        form = draw(st.sampled_from(FORMS))
        rank = None if form == "dense" else draw(st.integers(1, min(hidden, intermediate) - 1))
        projections.append(Projection.whole(form, rank))
    return Request(
        mlp_layout(hidden, intermediate, *projections),
        draw(st.integers(1, 1500)),
        draw(st.sampled_from(list(DTYPES.values()))),
        draw(st.sampled_from([None, EPS])),
        draw(st.booleans()),
    )


@given(requests(), st.sampled_from(list(TARGETS.values())))
@settings(max_examples=40, deadline=None)
def test_a_plan_allocates_exactly_what_it_says_and_fits(request_, target):
    plan = plan_launch(request_, target)
    assert isinstance(plan, Plan), plan
    peak = Peak()
    dry_run(plan, peak, target=target)
    assert peak.sbuf_bytes == plan.sbuf_bytes() <= target.sbuf_usable_bytes
    assert peak.psum_banks <= target.psum_banks


@given(requests(), st.data())
@settings(max_examples=40, deadline=None)
def test_any_choice_that_is_accepted_fits(request_, data):
    choice = Choice(
        data.draw(st.one_of(st.sampled_from(block_sizes(request_)), st.integers(1, 2560))),
        data.draw(st.integers(1, 9)),
        data.draw(st.sampled_from([512, 1000, 4096])),
        data.draw(st.sampled_from([0, 512, 700, 1024])),
        data.draw(st.integers(1, 9)),
        data.draw(st.booleans()),
    )
    plan = build_plan(request_, choice)
    if isinstance(plan, Plan):
        peak = Peak()
        dry_run(plan, peak)
        assert peak.sbuf_bytes == plan.sbuf_bytes() <= TRN1.sbuf_usable_bytes
        assert peak.psum_banks <= TRN1.psum_banks
    else:
        assert "expected at most" in plan.reason or "out_cols: expected" in plan.reason


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_choice_gives_the_right_answer(data):
    request_ = dataclasses.replace(
        data.draw(requests()), tokens=data.draw(st.integers(1, 300)), dtype=DTYPES["fp32"]
    )
    layout = request_.layout
    matrices = (layout.gate_first, layout.up_first, layout.down_first)
    compact = (
        layout.gate_second.pivot_axis,
        layout.up_second.pivot_axis,
        layout.down_first.pivot_axis if layout.down_first else "",
    )
    forms = tuple(
        "dense" if m is None else "compact" if axis else "uv"
        for m, axis in zip(matrices, compact, strict=True)
    )
    ranks = tuple(0 if m is None else m.cols for m in matrices)
    norm, residual = request_.norm_eps is not None, request_.residual
    case = MLPCase(request_.tokens, layout.hidden, layout.intermediate, forms, ranks, "fp32", norm, residual)
    choice = Choice(
        data.draw(st.sampled_from(block_sizes(request_))),
        data.draw(st.integers(1, 4)),
        512,
        512,
        data.draw(st.integers(1, 8)),
    )
    plan = build_plan(request_, choice)
    assert isinstance(plan, Plan), plan
    found, expected = run_svd_mlp(case, plan, random_weights(case))
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= 1e-5 * scale, (case, choice)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [1, 128, 2048, 32768])
def test_models_get_plans_for_decode_and_for_long_prefill(model, tokens):
    hidden, intermediate, rank = MODELS[model]
    for form in FORMS:
        plan = plan_mlp(
            hidden,
            intermediate,
            (Projection.whole(form, rank if form != "dense" else None),) * 3,
            tokens,
            BF16,
            1e-5,
        )
        assert isinstance(plan, Plan), plan
        assert plan.blocks() * plan.block_tokens >= tokens


def test_a_ring_that_holds_everything_reads_the_weights_once():
    plan = plan_mlp(576, 1536, (Projection.whole("uv", 320),) * 3, 4096, BF16)
    assert plan.blocks() > 1 and plan.weight_cols_read() == plan.identity_col


def weight_cols_moved(plan: Plan) -> int:
    """Packed columns that a dry run reads."""
    moved = [0]

    def count(event):
        if getattr(event, "op", "") == "dma_copy" and event.writes[0].name.startswith("ring"):
            moved[0] += event.transfer_bytes // (128 * plan.itemsize)

    dry_run(plan, count)
    return moved[0]


@pytest.mark.parametrize(
    ("choice", "moved", "counted"),
    [
        (Choice(128, 1, 512), 9216, 9216),
        (Choice(128, 3, 512), 7680, 7680),
        (Choice(128, 4, 512), 4608, 4608),
        (Choice(128, 2, 1024), 6144, 6144),
        (Choice(128, 3, 1024), 2304, 2304),
        (Choice(256, 1, 512, token_group=2), 4608, 4608),
        (Choice(256, 1, 512, token_group=1), 4608, 5120),  # the second group finds one chunk still there
    ],
)
def test_weight_reads_are_counted_chunk_by_chunk(choice, moved, counted):
    uv = Projection.whole("uv", 128)
    plan = build_plan(Request(mlp_layout(256, 512, uv, uv, uv), 512, BF16), choice)
    assert (weight_cols_moved(plan), plan.weight_cols_read()) == (moved, counted)


def test_what_does_not_fit_is_declined_with_the_reason():
    declined = plan_mlp(16384, 53248, (DENSE,) * 3, 512, BF16)
    assert isinstance(declined, Declined) and not declined
    assert (
        "SBUF of trn1: expected at most 180224 bytes per partition, found" in declined.reason
        and "x, h and rows" in declined.reason
    )
    assert "shard the layer" in declined.reason
    assert "tokens: expected at least 1, found 0" in plan_mlp(64, 64, (DENSE,) * 3, 0, BF16).reason
    assert "dtype: expected one of" in plan_mlp(64, 64, (DENSE,) * 3, 1, np.dtype(np.int8)).reason
    too_many_banks = build_plan(
        Request(mlp_layout(64, 64, *(DENSE,) * 3), 2000, BF16), Choice(128, token_group=9)
    )
    assert "PSUM of trn1: expected at most 8 banks at once, found 9" in too_many_banks.reason


@pytest.mark.parametrize(("block_tokens", "banks"), [(1024, 6), (1025, 9), (1536, 9), (2048, 12)])
def test_sums_of_a_column_tile_are_counted_beside_those_of_the_next(block_tokens, banks):
    uv = Projection.whole("uv", 64)
    plan = build_plan(
        Request(mlp_layout(128, 256, uv, uv, uv), 2048, BF16), Choice(block_tokens, token_group=1)
    )
    if banks > TRN1.psum_banks:
        assert f"PSUM of trn1: expected at most 8 banks at once, found {banks}" in plan.reason
        return
    dry_run(plan)  # refuses a sum whose bank another one has taken


def test_staged_columns_are_whole_column_tiles_or_whole_rows():
    request_ = Request(mlp_layout(1024, 256, *(DENSE,) * 3), 64, BF16)
    declined = build_plan(request_, Choice(64, out_cols=700))
    assert "out_cols: expected a multiple of 512 or whole rows of 1024, found 700" in declined.reason
    narrow = dataclasses.replace(request_, layout=mlp_layout(700, 256, *(DENSE,) * 3))
    for accepted, cols in ((request_, 512), (request_, 5000), (narrow, 700)):
        dry_run(build_plan(accepted, Choice(64, out_cols=cols)))


def test_a_larger_chip_takes_blocks_at_least_as_large():
    arguments = (4096, 14336, (Projection.whole("uv", 2560),) * 3, 8192, BF16)
    small, large = (plan_mlp(*arguments, target=TARGETS[name]) for name in ("trn1", "trn3"))
    assert small.block_tokens <= large.block_tokens
    assert small.weight_cols_read() >= large.weight_cols_read()


def test_the_machine_keeps_the_same_count_as_the_listener():
    plan = plan_case(MLPCase(70, 200, 392, ("uv", "compact", "dense"), (70, 133, 150)))
    machines = []
    peak = Peak()
    original = Machine.__init__

    def spy(self, *args, **kwargs):
        machines.append(self)
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "__init__", spy)
        dry_run(plan, peak)
    assert machines[0].sbuf_peak_bytes == peak.sbuf_bytes == plan.sbuf_bytes()
    assert machines[0].psum_peak_banks <= peak.psum_banks == TRN1.psum_banks


@given(requests(), st.data())
@settings(max_examples=60, deadline=None)
def test_regions_that_are_alive_together_do_not_overlap(request_, data):
    """x and rows never do; h and rows only where z of down stands between; x and h only where x is used up
    first.
    """
    whole = request_.layout
    gated = dataclasses.replace(whole, down_first=None, down_second=None)
    layout = data.draw(st.sampled_from([whole, second_stage(whole), gated]))
    plan = build_plan(
        dataclasses.replace(request_, layout=layout, tokens=1500),
        Choice(data.draw(st.sampled_from([128, 512]))),
        TARGETS["trn3"],
    )
    if not isinstance(plan, Plan):
        return
    at, tile_bytes = plan.at, plan.block_tokens * plan.itemsize
    x_end, h_end = at.x + plan.x_tiles * tile_bytes, at.h + plan.h_tiles * tile_bytes
    assert x_end <= at.output
    assert h_end <= at.output or (plan.runs_down_first and plan.x_tiles)
    assert x_end <= at.h or not layout.x_outlives_firsts
    assert at.gate_z + plan.gate_z_tiles * tile_bytes <= at.up_z
    assert max(h_end, at.rows, at.output) <= at.gate_z <= at.z_rows <= at.activated < at.identity < at.ring


def test_the_numbers_of_a_plan_are_pythons():
    """The compilers before nki 0.7 turn numpy's integers into None without a word."""
    tokens, rank = np.int64(700), np.int32(96)
    layout = mlp_layout(np.int64(256), np.int64(512), *(Projection.whole("compact", rank),) * 3)
    plan = plan_launch(Request(layout, tokens, BF16, np.float32(1e-5), residual=True))
    for value in numbers_of(plan):
        assert type(value) in (int, float, str, bool), (value, type(value))


def numbers_of(value: object) -> list:
    """Every leaf of a plan."""
    if dataclasses.is_dataclass(value):
        return [leaf for field in vars(value).values() for leaf in numbers_of(field)]
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in numbers_of(item)]
    return [] if value is None else [value]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_prefill_of_32768_tokens_runs_block_by_block_within_all_limits(model):
    """Dry: every instruction of the launch is checked; weights are read once per block, activations once."""
    hidden, intermediate, rank = MODELS[model]
    case = MLPCase(
        32768, hidden, intermediate, ("uv", "compact", "uv"), (rank,) * 3, norm=True, residual=True
    )
    plan = plan_case(case)
    moved = [0]

    def count(event):
        moved[0] += getattr(event, "transfer_bytes", 0)

    dry_run(plan, count)
    norm_and_identity = 128 * plan.x_tiles * 4 + 128 * 128 * 2
    assert moved[0] == plan.weight_cols_read() * 128 * 2 + 3 * case.tokens * hidden * 2 + norm_and_identity


UV = Projection.whole("uv", 40)
CHAIN = chain_layout(200, 130, UV)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(CHAIN, 4, BF16, norm_eps=EPS), "norm_eps: expected a launch that starts from natural x"),
        (
            Request(mlp_layout(64, 96, *(DENSE,) * 3), 4, BF16, norm_eps=EPS, transposed_input=True),
            "norm_eps: expected",
        ),
        (
            Request(chain_layout(200, 130, DENSE, True), 4, BF16, residual=True),
            "residual: expected a launch with natural output",
        ),
        (
            Request(CHAIN, 4, BF16, residual=True, silu=True),
            "silu: expected a single projection without residual",
        ),
        (
            Request(mlp_layout(64, 96, *(DENSE,) * 3), 4, BF16, silu=True),
            "silu: expected a single projection",
        ),
        (
            Request(first_stage(mlp_layout(64, 96, *(UV,) * 3)), 4, BF16, silu=True),
            "silu: expected a single projection",
        ),
        (
            Request(second_stage(mlp_layout(64, 96, UV, UV, DENSE)), 4, BF16, residual=True),
            "residual: expected a launch with natural output",
        ),
    ],
)
def test_options_that_a_launch_would_ignore_are_declined(request_, words):
    assert words in plan_launch(request_).reason


@pytest.mark.parametrize(("norm", "residual"), [(True, False), (False, True)])
def test_operands_must_be_those_of_the_plan(norm, residual):
    """Neither an operand that would be ignored nor one that is missing passes in silence."""
    planned, given = (
        MLPCase(3, 64, 96, ("dense",) * 3, (0,) * 3),
        MLPCase(3, 64, 96, ("dense",) * 3, (0,) * 3, norm=norm, residual=residual),
    )
    for case, plan in ((given, plan_case(planned)), (planned, plan_case(given))):
        with pytest.raises(AssertionError, match="plan and operands must agree"):
            run_svd_mlp(case, plan)
