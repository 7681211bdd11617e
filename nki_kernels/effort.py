"""How long a plan keeps its engines and the DMA queues at work: what the planner compares plans by.

A matmul of n moving columns takes n cycles and a turnaround of 64 [perf], so narrow token blocks are dear;
every block of tokens reads the weights that the ring does not hold, so they are cheap in SBUF only. What
TensorE waits for at both ends of a block is in `waits`.
"""

from __future__ import annotations

import functools

from nki_kernels.layout import Layout, layout_of
from nki_kernels.targets import PMAX, TURNAROUND_CYCLES, Target
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import MOVING_COLS, pieces
from nki_kernels.waits import idle_us, is_by_rows, spread_us, transfers_us, turns_us

# Of two plans with one bound, prefer the one with less of the other resource. A schedule loses 0.01 to 0.05
# of it: more than that would buy less traffic with narrower matmuls.
OVERLAP_LOSS = 0.05


@functools.lru_cache(maxsize=64)
def matmul_counts(layout: Layout) -> tuple[int, int]:
    """Matmuls for one moving tile of tokens in transposed products, and moving columns for one tile of 128
    tokens in the natural last one, identities included.
    """
    transposed = natural = 0
    for _, matrix, n, _ in layout.tiles():
        blocks = len(matrix.blocks(n))
        if matrix.tile_cols == MOVING_COLS:
            natural += blocks * (matrix.tile_width(n) + TURNAROUND_CYCLES)
        else:
            transposed += blocks
    return transposed, natural


def _passes(plan: Plan) -> int:
    """TensorE takes fp32 apart and goes over the columns four times [perf]."""
    return 4 if plan.itemsize == 4 else 1


def tensor_us(plan: Plan, target: Target) -> float:
    """TensorE's time for all matmuls, back to back."""
    transposed, natural = matmul_counts(layout_of(plan.products, plan.external_z))
    passes = _passes(plan)
    cycles = 0
    for _, tokens in pieces(plan.tokens, plan.block_tokens):
        for _, width in pieces(tokens, plan.moving_tokens):
            cycles += transposed * (passes * width + TURNAROUND_CYCLES)
        cycles += natural * passes * len(pieces(tokens, PMAX))
    return cycles / target.tensor_ghz / 1000 + spread_us(plan, target) + turns_us(plan, target)


def natural_us(plan: Plan, target: Target) -> float:
    """TensorE's time for the natural last product of a tile of 128 tokens."""
    _, natural = matmul_counts(layout_of(plan.products, plan.external_z))
    return natural * _passes(plan) / target.tensor_ghz / 1000


def weights_us(plan: Plan, target: Target) -> float:
    """The weights that cross HBM in the whole launch."""
    return _arrival_us(plan, plan.weight_cols_read(), target)


def _arrival_us(plan: Plan, columns: int, target: Target) -> float:
    """Packed columns of weights, at the documented rate of long rows; where they are int8, no less than
    ScalarE and VectorE take to cast them, a column a cycle.
    """
    if not plan.is_int8:
        return columns * PMAX * plan.itemsize / target.dma_achieved_gbps / 1000
    arriving = columns * PMAX / target.dma_achieved_gbps / 1000
    return max(arriving, columns / (target.scalar_ghz + target.vector_ghz) / 1000)


def effort_us(plan: Plan, target: Target) -> float:
    """The larger of two times and a little of the smaller: TensorE with what it waits for, and the DMA queues
    with weights, input and output.
    """
    tensor = tensor_us(plan, target)
    idle = idle_us(plan, natural_us(plan, target), target)
    if is_by_rows(plan):
        # The first block has all weights to wait for, whatever the ring keeps for those behind.
        worked = (tensor - turns_us(plan, target)) / plan.blocks()
        idle += max(0.0, _arrival_us(plan, plan.chunk_bounds[-1], target) - worked)
    low, high = sorted((tensor + idle, weights_us(plan, target) + transfers_us(plan, target)))
    return high + OVERLAP_LOSS * low
