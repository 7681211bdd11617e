"""The autotuner: the tile plan that the cost model likes best, without scheduling everything.

Plans that do not fit SBUF or PSUM are never built (`planner.build_plan`). The rest are ranked by arithmetic
on their traffic and matmuls, and the first few are scheduled; one whose lower bound is not below the
best latency found is left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

from nki_kernels.cost.constants import CALIBRATED, FP32_PASSES, Constants
from nki_kernels.cost.estimate import Estimate
from nki_kernels.cost.launches import PlanRuns, z_rows
from nki_kernels.effort import OVERLAP_LOSS, tensor_us
from nki_kernels.layout import MATRICES, Layout, layout_of
from nki_kernels.planner import Choice, Declined, Request, build_plan, choices, filled, why_not
from nki_kernels.targets import PMAX, TRN1, TURNAROUND_CYCLES, Target
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import MOVING_COLS, tile_count

MAX_TRIED = 4  # a schedule takes up to 2 s; a search should stay below 10 s
Measure = Callable[[Plan], float]


@dataclasses.dataclass(frozen=True)
class Found:
    """The winner, with the choice that makes it (`build_plan(request, choice)`), and how many plans were
    scheduled of how many that fit.
    """

    choice: Choice
    plan: Plan
    estimate: Estimate
    tried: int
    fitting: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """As `Found`, by a device's clock: `measured_us` of the winner, and how many plans were measured of how
    many that fit.
    """

    choice: Choice
    plan: Plan
    measured_us: float
    tried: int
    fitting: int


def useful_flops(layout: Layout, tokens: int) -> int:
    """2 x the stored parameters of every matrix x tokens: identities and padding are no work."""
    parameters = 0
    for name in MATRICES:
        matrix = layout.matrix(name)
        if matrix is not None:
            held = matrix.pivots * (matrix.rows if matrix.pivot_axis == "cols" else matrix.cols)
            parameters += matrix.rows * matrix.cols - held
    return 2 * parameters * tokens


def tensor_bound_us(layout: Layout, tokens: int, target: Target = TRN1, itemsize: int = 2) -> float:
    """Useful FLOPs in matmuls of the most columns, turnarounds included: 81.6 TFLOP/s on trn1 in bf16."""
    columns = MOVING_COLS * (FP32_PASSES if itemsize == 4 else 1) + TURNAROUND_CYCLES
    matmul_flops = 2 * PMAX * PMAX * MOVING_COLS
    return useful_flops(layout, tokens) / matmul_flops * columns / target.tensor_ghz / 1000


def _dma_us(size_bytes: float, row_bytes: int, target: Target, constants: Constants) -> float:
    engine = target.dma_achieved_gbps / target.dma_engines
    return size_bytes / row_bytes * constants.descriptor_ns(row_bytes, engine) / target.dma_engines / 1000


def dma_bound_us(plan: Plan, target: Target = TRN1, constants: Constants = CALIBRATED) -> float:
    """The plan's weight traffic, in rows as long as its ring's slots, and each activation once, at the set's
    rates.
    """
    size = plan.itemsize
    weight = 1 if plan.is_int8 else size
    weights = _dma_us(plan.weight_cols_read() * PMAX * weight, plan.ring_cols * weight, target, constants)
    layout = layout_of(plan.products, plan.external_z)
    given = sum(z_rows(layout, name) for name in ("gate", "up"))
    # What comes in: z of another launch, x or, where there is neither, the h that down starts from.
    features = given + (plan.hidden or (0 if given else plan.intermediate))
    input_row = (plan.block_tokens if plan.transposed_input else features) * size
    inputs = _dma_us(plan.tokens * features * size, input_row, target, constants)
    last = layout.down_second
    if last is None:
        return weights + inputs
    output_row = (plan.out_cols if plan.natural_output else plan.block_tokens) * size
    return weights + inputs + _dma_us(plan.tokens * last.cols * size, output_row, target, constants)


def _deepest(request: Request, choice: Choice, target: Target) -> tuple[Choice, Plan] | None:
    """The choice with what memory it leaves, and its plan."""
    plan = build_plan(request, choice, target)
    return filled(request, choice, plan, target) if isinstance(plan, Plan) else None


def _behaviour(plan: Plan) -> Plan:
    """The plan without differences that no instruction sees: groups beyond the block's token tiles, a place
    for rows that are not there.
    """
    at = dataclasses.replace(plan.at, rows=0) if plan.transposed_input else plan.at
    return dataclasses.replace(plan, token_group=min(plan.token_group, tile_count(plan.block_tokens)), at=at)


def fitting_plans(request: Request, target: Target = TRN1) -> Iterator[tuple[Choice, Plan]]:
    """Every plan that fits, once."""
    seen = set()
    for choice in choices(request):
        found = _deepest(request, choice, target)
        if found is not None:
            same = _behaviour(found[1])
            if same not in seen:
                seen.add(same)
                yield found


def search(
    request: Request, target: Target = TRN1, constants: Constants = CALIBRATED, tp: int = 1
) -> Found | Declined:
    """The best plan of those tried, for one of `tp` cores."""
    ranked = _ranked(request, target, constants)
    if not ranked:
        return why_not(request, target)
    runs = functools.cache(lambda plan: PlanRuns(plan, request.dtype, target, constants, tp))
    tried = _try(ranked, lambda plan: runs(plan).rough_us())
    _, choice, plan = min(tried, key=lambda item: item[0])
    return Found(choice, plan, runs(plan).estimate(), len(tried), len(ranked))


def search_measured(
    request: Request, measure: Measure, target: Target = TRN1, constants: Constants = CALIBRATED
) -> Measured | Declined:
    """As `search`, where a device is at hand: `measure` gives us instead of the schedule. The model still
    says which plans to try.
    """
    ranked = _ranked(request, target, constants)
    if not ranked:
        return why_not(request, target)
    tried = _try(ranked, measure)
    measured_us, choice, plan = min(tried, key=lambda item: item[0])
    return Measured(choice, plan, measured_us, len(tried), len(ranked))


def _ranked(request: Request, target: Target, constants: Constants) -> list[tuple[float, Choice, Plan]]:
    """(lower bound in us, choice, plan) of all that fit, the most promising first."""
    guessed = []
    for choice, plan in fitting_plans(request, target):
        work_us, traffic_us = tensor_us(plan, target), dma_bound_us(plan, target, constants)
        guessed.append((_guess_us(plan, work_us, traffic_us), max(work_us, traffic_us), choice, plan))
    return [item[1:] for item in sorted(guessed, key=lambda item: item[0])]


def _try(ranked: list[tuple[float, Choice, Plan]], time_us: Measure) -> list[tuple[float, Choice, Plan]]:
    """(us, choice, plan) of the first MAX_TRIED, without those whose bound is not below the best so far."""
    tried: list[tuple[float, Choice, Plan]] = []
    for bound_us, choice, plan in ranked[:MAX_TRIED]:
        if not tried or bound_us < min(item[0] for item in tried):
            tried.append((time_us(plan), choice, plan))
    return tried


def _guess_us(plan: Plan, work_us: float, traffic_us: float) -> float:
    """Block by block the larger of work and traffic, plus a little of the smaller. A ragged last block reads
    as much as a full one.
    """
    full, rest = divmod(plan.tokens, plan.block_tokens)
    block_dma = traffic_us / plan.blocks()
    total = 0.0
    for count, tokens in ((full, plan.block_tokens), (1, rest)):
        low, high = sorted((work_us * tokens / plan.tokens, block_dma))
        total += count * (high + OVERLAP_LOSS * low) if tokens else 0.0
    return total
