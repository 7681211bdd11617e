"""What TensorE waits for at both ends of a block of tokens: rows that arrive, and results on their way out
which the rows of the next block queue behind.

A launch that takes rows in and gives rows out, on few of many cores, loses a fifth of its time here, and how
much of it hangs on the plan: how many tokens a block has, and how many columns are stored at a time.
"""

from __future__ import annotations

from nki_kernels.targets import PMAX, PSUM_BANKS, TURNAROUND_CYCLES, Target, row_share
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import MOVING_COLS, pieces, tile_count

# From the end of an instruction to the first byte of a transfer: its result, after 200 cycles of ScalarE
# [perf], and 1.3 us from semaphore to first byte [dma].
START_US = 1.5
EVICT_US = 0.5  # 512 columns of PSUM by VectorE
PREFETCHED_ROWS = 2  # row tiles of the next block that have places of their own


def copy_us(rows: int, row_bytes: int, target: Target) -> float:
    """All DMA engines with `rows` rows of `row_bytes`."""
    return rows * row_bytes / (target.dma_achieved_gbps * row_share(row_bytes)) / 1000


def is_by_rows(plan: Plan) -> bool:
    """Whether the launch takes rows in and gives rows out, and is no decode: there TensorE waits for weights
    and both ends are short.
    """
    return plan.natural_output and plan.row_bytes > 0 and plan.tokens > PMAX


def transfers_us(plan: Plan, target: Target) -> float:
    """The DMA queues with input and output."""
    if not is_by_rows(plan):
        return 0.0
    cols = plan.products.down_second.cols
    stored = sum(copy_us(plan.tokens, n * plan.itemsize, target) for _, n in pieces(cols, plan.out_cols))
    return copy_us(plan.tokens, plan.row_bytes, target) + stored


def turn_us(plan: Plan, target: Target) -> float:
    """TensorE with the transposes of a tile of 128 rows."""
    tokens = min(PMAX, plan.block_tokens)
    tiles = tile_count(plan.row_bytes // plan.itemsize)
    return tiles * (tokens + TURNAROUND_CYCLES) / target.tensor_ghz / 1000


def turns_us(plan: Plan, target: Target) -> float:
    """TensorE with all transposes of rows."""
    return tile_count(plan.tokens) * turn_us(plan, target) if is_by_rows(plan) else 0.0


def idle_us(plan: Plan, natural_us: float, target: Target) -> float:
    """How long TensorE waits in the whole launch; natural_us: its time for the natural last product of a tile
    of 128 tokens.
    """
    if not is_by_rows(plan):
        return 0.0
    tiles = tile_count(plan.block_tokens)
    row = copy_us(min(PMAX, plan.block_tokens), plan.row_bytes, target)
    turn = turn_us(plan, target)
    late = max(0.0, row - turn)  # a row tile behind the transposes of the one before
    inside, evicted, stored = _stores_us(plan, natural_us, target)
    if plan.at.rows == plan.at.output:
        between = stored + START_US + row + (tiles - 1) * late
    elif tiles <= PREFETCHED_ROWS:
        # The last transpose is evicted before the first product.
        between = max(EVICT_US, evicted - tiles * turn)
    else:
        queued = stored + START_US + row - PREFETCHED_ROWS * turn
        between = max(late, queued) + (tiles - PREFETCHED_ROWS - 1) * late
    first = START_US + row + (tiles - 1) * late
    return first + plan.blocks() * inside + (plan.blocks() - 1) * between + stored


def _stores_us(plan: Plan, natural_us: float, target: Target) -> tuple[float, float, float]:
    """Of a block of tokens: how long TensorE waits for places of the stage that are still being stored; how
    long after the last product the last result is evicted, and stored.

    A tile is evicted where that of the piece before was staged, so it waits for it to be stored; as many
    products as PSUM has banks for go on meanwhile.
    """
    cols = plan.products.down_second.cols
    groups = pieces(tile_count(plan.block_tokens), plan.token_group)
    row_tokens = min(PMAX, plan.block_tokens)
    free = [0.0] * tile_count(plan.block_tokens)
    now = worked = evicted = stored = 0.0
    for _, count in pieces(cols, plan.out_cols):
        width = min(MOVING_COLS, count)
        before = (count - width) / cols * natural_us * len(free)
        now, worked = now + before, worked + before
        for first, size in groups:
            step = width / cols * natural_us * size
            now, worked = now + step, worked + step
            evicted = max(now, evicted)
            for i in range(first, first + size):
                evicted = max(evicted, free[i]) + EVICT_US
                stored = max(stored, evicted + START_US) + copy_us(row_tokens, count * plan.itemsize, target)
                free[i] = stored
            now = max(now, evicted - (PSUM_BANKS / size - 1) * step)
    return now - worked, evicted - now, stored - now


def spread_us(plan: Plan, target: Target) -> float:
    """TensorE with products of ones that spread the scales of natural output over the partitions, in fp32:
    once, or, if that is done piece by piece, in every block of tokens.
    """
    if not plan.is_int8 or not plan.natural_output:
        return 0.0
    times = plan.blocks() if plan.spreads_pieces else 1
    columns = 4 * PMAX + TURNAROUND_CYCLES
    return times * tile_count(plan.products.down_second.cols) * columns / target.tensor_ghz / 1000
