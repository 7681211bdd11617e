"""Chooses a tile plan from layout, token count and target. What it returns fits SBUF and PSUM by construction.

The rule here is traffic alone: of all token blocks that fit, take the one that reads the fewest weight bytes, and of those the largest.
A cost model may try other plans through `build_plan`, which holds any choice to the same limits.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nki_kernels.layout import Layout, Projection, mlp_layout
from nki_kernels.plan import Plan, output_stage_cols, z_tiles
from nki_kernels.targets import PMAX, TRN1, Target
from nki_kernels.tiling import MOVING_COLS, tile_count

SLOT_BYTES = 8 * 1024  # per partition: a chunk of 1 MiB, twice what saturates a DMA queue
MIN_SLOTS = 3  # one in use, one arriving, one asked for
MAX_SLOTS = 8
TOKEN_GROUP = 4  # half the PSUM banks, so that the other half can be evicted meanwhile
SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a launch has to do; everything a plan depends on besides the target."""

    layout: Layout
    tokens: int
    dtype: np.dtype
    norm_eps: float | None = None
    silu: bool = False
    transposed_input: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a planner is free to decide."""

    block_tokens: int
    ring_slots: int = MIN_SLOTS
    ring_cols: int = 0  # 0: SLOT_BYTES
    out_cols: int = 0  # 0: whole rows
    token_group: int = TOKEN_GROUP


@dataclasses.dataclass(frozen=True)
class Declined:
    """No plan: `reason` says in one sentence what does not fit, by how much, and what would."""

    reason: str

    def __bool__(self) -> bool:
        return False


def plan_mlp(
    hidden: int,
    intermediate: int,
    projections: tuple[Projection, Projection, Projection],
    tokens: int,
    dtype: np.dtype,
    target: Target = TRN1,
    norm_eps: float | None = None,
) -> Plan | Declined:
    """A plan for `svd_mlp`: gate, up and down in `projections`, `tokens` >= 1 per launch, RMSNorm in front if `norm_eps` is given."""
    return plan_launch(Request(mlp_layout(hidden, intermediate, *projections), tokens, np.dtype(dtype), norm_eps), target)


def plan_launch(request: Request, target: Target = TRN1) -> Plan | Declined:
    """The plan of least weight traffic, or why there is none."""
    if request.dtype.name not in SUPPORTED_DTYPES:
        return Declined(f"dtype: expected one of {', '.join(SUPPORTED_DTYPES)}, found {request.dtype.name}; cast the weights.")
    if request.tokens < 1:
        return Declined(f"tokens: expected at least 1, found {request.tokens}.")
    fitting = [plan for plan in _candidates(request, target) if isinstance(plan, Plan)]
    if not fitting:
        return build_plan(request, Choice(min(PMAX, request.tokens), out_cols=MOVING_COLS), target)
    best = min(fitting, key=lambda plan: (plan.weight_passes, plan.blocks, -plan.out_cols))
    return _with_spare_ring(request, best, target)


def _candidates(request: Request, target: Target) -> list[Plan | Declined]:
    """Every balanced token block, with whole and with short staged rows, streaming the weights and holding them all."""
    found = []
    for block_tokens in _block_sizes(request):
        for out_cols in (0, 4 * MOVING_COLS, MOVING_COLS):
            streaming = build_plan(request, Choice(block_tokens, out_cols=out_cols), target)
            found.append(streaming)
            if isinstance(streaming, Plan):
                chunks = len(streaming.chunk_bounds) - 1
                found.append(build_plan(request, Choice(block_tokens, chunks, out_cols=out_cols), target))
    return found


def max_block_tokens(layout: Layout) -> int:
    """Two products side by side (gate and up) or one, each over at most 4 banks, so that half of PSUM is free for the next tile."""
    return 2 * MOVING_COLS if layout.gate_second is not None else 4 * MOVING_COLS


def _block_sizes(request: Request) -> list[int]:
    """Multiples of 128 tokens, balanced so that the last block is not a stub; descending."""
    sizes = set()
    for limit in range(PMAX, max_block_tokens(request.layout) + 1, PMAX):
        blocks = tile_count(request.tokens, limit)
        size = tile_count(request.tokens, blocks)
        sizes.add(size if blocks == 1 else tile_count(size) * PMAX)
    return sorted(sizes, reverse=True)


def _with_spare_ring(request: Request, plan: Plan, target: Target) -> Plan:
    """Deepen the ring with what SBUF has left: more transfers in flight."""
    chunks = len(plan.chunk_bounds) - 1
    spare = (target.sbuf_usable_bytes - plan.sbuf_bytes()) // (plan.ring_cols * plan.itemsize)
    slots = min(plan.ring_slots + spare, max(MAX_SLOTS, plan.ring_slots), chunks)
    return dataclasses.replace(plan, ring_slots=max(1, slots))


def build_plan(request: Request, choice: Choice, target: Target = TRN1) -> Plan | Declined:
    """The plan that `choice` describes, or why it does not fit `target`."""
    layout, itemsize = request.layout, request.dtype.itemsize
    moving = tile_count(choice.block_tokens, tile_count(choice.block_tokens, MOVING_COLS))
    ring_cols = min(choice.ring_cols or SLOT_BYTES // itemsize, layout.packed_cols)
    bounds = chunk_bounds(layout, ring_cols)
    placed = _place_arenas(request, choice)
    plan = Plan(
        layout, request.tokens, itemsize, choice.block_tokens, moving, choice.token_group, ring_slots=choice.ring_slots,
        ring_cols=max(end - start for start, end in zip(bounds, bounds[1:], strict=False)), chunk_bounds=bounds, norm_eps=request.norm_eps,
        silu=request.silu, transposed_input=request.transposed_input, **placed,
    )  # fmt: skip
    return _refuse_oversize(plan, target) or plan


def _refuse_oversize(plan: Plan, target: Target) -> Declined | None:
    found, usable = plan.sbuf_bytes(), target.sbuf_usable_bytes
    if found > usable:
        parts = {"wide": plan.wide_cols, "narrow": plan.narrow_cols, "ring": plan.ring_slots * plan.ring_cols}
        held = ", ".join(f"{name} {cols * plan.itemsize} B" for name, cols in sorted(parts.items(), key=lambda item: -item[1]))
        return Declined(
            f"SBUF of {target.name}: expected at most {usable} bytes per partition, found {found} for a block of {plan.block_tokens} tokens "
            f"({held}); use fewer tokens per block or shard the layer over more cores."
        )
    widest = max(plan.token_group, tile_count(plan.block_tokens, plan.moving_tokens) * (2 if plan.layout.gate_second else 1))
    if widest > target.psum_banks:
        return Declined(f"PSUM of {target.name}: expected at most {target.psum_banks} banks at once, found {widest}; use smaller blocks.")
    return None


def _place_arenas(request: Request, choice: Choice) -> dict[str, int]:
    """Offsets and sizes of the arenas (see Plan), in elements."""
    layout, tokens = request.layout, choice.block_tokens
    x_cols, h_cols = tile_count(layout.hidden) * tokens, tile_count(layout.intermediate) * tokens
    h_offset = x_cols if layout.x_outlives_firsts else 0
    # Rows may lie over h where h is dead by the time that results are staged, and must leave x alone for the next block's load.
    rows_offset = x_cols if layout.hidden and (layout.down_first or not layout.down_second) else h_offset + h_cols
    out_cols = _staged_cols(layout, choice)
    width = layout.hidden or layout.intermediate
    input_rows = 0 if request.transposed_input or layout.external_only else width * (2 if request.norm_eps is None else 3)
    rows_end = rows_offset + output_stage_cols(layout, tokens, out_cols) + input_rows
    first_z = (z_tiles(layout, "gate") + z_tiles(layout, "up")) * tokens
    return {
        "out_cols": out_cols,
        "h_offset": h_offset,
        "rows_offset": rows_offset,
        "wide_cols": max(1, h_offset + h_cols, rows_end),
        "narrow_cols": max(1, first_z, z_tiles(layout, "down") * tokens),
    }


def _staged_cols(layout: Layout, choice: Choice) -> int:
    """Columns of natural output staged at a time; none where the output is transposed."""
    last = layout.down_second
    if last is None or last.tile_cols != MOVING_COLS:
        return 0
    return min(choice.out_cols or last.cols, last.cols)


def chunk_bounds(layout: Layout, ring_cols: int) -> tuple[int, ...]:
    """Ends of the chunks that the packed weights are read in: as many whole blocks as `ring_cols` hold."""
    bounds = [0]
    end = 0
    for _, matrix, n, _, offset in layout.blocks():
        end = offset + matrix.tile_width(n)
        if end - bounds[-1] > ring_cols:
            bounds.append(offset)
    bounds.append(end)
    return tuple(bounds)
