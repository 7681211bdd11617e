"""Chooses a tile plan from layout, token count and target. What it returns fits SBUF and PSUM by
construction.

The rule is `effort`: of all choices that fit, take the one that keeps TensorE (its waits included) and the
DMA queues busy for the shortest time; of those the fewest blocks, then the least memory for staging. A cost
model may try others through `build_plan`, which holds any choice to the same limits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from nki_kernels.arrival import early_group, early_tiles, keeps_apart, more_tiles
from nki_kernels.casts import Block, natural_stored, scalar_shares
from nki_kernels.effort import effort_us
from nki_kernels.layout import Layout, Projection, mlp_layout
from nki_kernels.placement import Room, largest, place, raw_slots
from nki_kernels.plan_file import own_choice
from nki_kernels.request import Request, z_is_natural
from nki_kernels.ring import INT8_SLOTS, MIN_SLOTS, SLOT_BYTES, deepest_ring, ring_loss
from nki_kernels.targets import PMAX, TRN1, Target
from nki_kernels.tile_plan import Plan
from nki_kernels.tiling import MOVING_COLS, SHARED, tile_count

TOKEN_GROUPS = (4, 8)  # half the PSUM banks, so that the other half can be emptied meanwhile; or all
SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a planner is free to decide."""

    block_tokens: int
    ring_slots: int = MIN_SLOTS
    ring_cols: int = 0  # 0: SLOT_BYTES[0]
    out_cols: int = 0  # 0: whole rows
    token_group: int = TOKEN_GROUPS[0]
    # input rows over staged output: less memory, but a block's load waits for the last one's stores
    shares_rows: bool = False
    # int8 scales of natural output spread piece by piece: less memory, but in every block again
    spreads_pieces: bool = False
    early_tiles: int = 0  # 0: as many as the place of staged output has room for


@dataclasses.dataclass(frozen=True)
class Declined:
    """No plan: `reason` says in one sentence what does not fit, by how much, and what would. Falsy."""

    reason: str

    def __bool__(self) -> bool:
        return False


def plan_mlp(
    hidden: int,
    intermediate: int,
    projections: tuple[Projection, Projection, Projection],
    tokens: int,
    dtype: np.dtype,
    norm_eps: float | None = None,
    residual: bool = False,
    target: Target = TRN1,
) -> Plan | Declined:
    """A plan for `svd_mlp`: gate, up and down in `projections`, `tokens` >= 1 per launch, RMSNorm in front if
    `norm_eps` is given.
    """
    layout = mlp_layout(hidden, intermediate, *projections)
    return plan_launch(Request(layout, tokens, np.dtype(dtype), norm_eps, residual), target)


def plan_launch(request: Request, target: Target = TRN1) -> Plan | Declined:
    """The plan that the user's own file names (`plan_file`) or, without one, that of least effort; or
    why there is none.
    """
    if request.dtype.name not in SUPPORTED_DTYPES:
        return Declined(
            f"dtype: expected one of {', '.join(SUPPORTED_DTYPES)}, found {request.dtype.name}; cast the "
            "weights."
        )
    if request.tokens < 1:
        return Declined(f"tokens: expected at least 1, found {request.tokens}.")
    fields = own_choice(request)
    own = build_plan(request, Choice(**fields), target) if fields else None
    if isinstance(own, Plan):
        return own
    plans = [(choice, build_plan(request, choice, target)) for choice in choices(request)]
    fitting = [(choice, plan) for choice, plan in plans if isinstance(plan, Plan)]
    if not fitting:
        return why_not(request, target)
    choice, plan = min(fitting, key=lambda item: _cost(item[1], target))
    return filled(request, choice, plan, target)[1]


def why_not(request: Request, target: Target) -> Declined:
    """Of a launch for which nothing fits: what the smallest plan lacks."""
    smallest = Choice(
        min(PMAX, request.tokens),
        MIN_SLOTS,
        SLOT_BYTES[-1] // request.dtype.itemsize,
        MOVING_COLS,
        shares_rows=True,
        spreads_pieces=offers_pieces(request),
    )
    declined = build_plan(request, smallest, target)
    assert isinstance(declined, Declined), "a launch whose smallest plan fits has a plan"
    return declined


def _cost(plan: Plan, target: Target) -> tuple[float, ...]:
    """Effort first; then what costs overlap: more blocks, whole PSUM in use, shared rows, input to wait for,
    short chunks, int8 scales spread piece by piece, short stores. Starved plans come last in decode.
    """
    shares = plan.at.rows == plan.at.output
    loss = ring_loss(plan, target)
    effort = effort_us(plan, target) * (1 + loss)
    overlap = (
        plan.token_group,
        shares,
        plan.input_wait(),
        -plan.ring_cols,
        plan.spreads_pieces,
        -plan.out_cols,
    )
    return plan.is_int8 and loss > 0 and plan.block_tokens <= PMAX, effort, plan.blocks(), *overlap


def choices(request: Request) -> Iterator[Choice]:
    """What `plan_launch` tries: balanced token blocks; rings that stream, hold a column tile of the last
    matrix, hold everything.
    """
    layout = request.layout
    last = layout.down_second
    staged = (0, 4 * MOVING_COLS, 2 * MOVING_COLS, MOVING_COLS) if last is not None else (0,)
    spreads = (False, True) if offers_pieces(request) else (False,)
    for slot_bytes in SLOT_BYTES:
        cols = min(slot_bytes // request.dtype.itemsize, layout.packed_cols)
        # A column tile of the last matrix, which begins in the middle of a chunk as a rule: one chunk more.
        tile_slots = MIN_SLOTS if last is None else tile_count(last.row_tiles() * last.tile_cols, cols) + 1
        least = INT8_SLOTS if layout.is_int8 else MIN_SLOTS
        rings = sorted(
            {MIN_SLOTS, least, tile_slots, len(chunk_bounds(layout, cols, request.tokens <= PMAX)) - 1}
        )
        for tokens, slots, out_cols in itertools.product(block_sizes(request), rings, staged):
            for group, shares, in_pieces in itertools.product(TOKEN_GROUPS, (False, True), spreads):
                yield Choice(tokens, slots, cols, out_cols, group, shares, in_pieces)


def offers_pieces(request: Request) -> bool:
    """Whether int8 scales may be spread piece by piece: decode has room, and casts to do meanwhile."""
    return request.layout.is_int8 and request.tokens > PMAX


def max_block_tokens(layout: Layout) -> int:
    """Two products side by side (gate and up) or one, each over at most 4 banks, so that half of PSUM is free
    for the next tile.
    """
    return 2 * MOVING_COLS if layout.gate_second is not None else 4 * MOVING_COLS


def block_sizes(request: Request) -> list[int]:
    """Multiples of 128 tokens, balanced so that the last block is not a stub; descending."""
    sizes = set()
    for limit in range(PMAX, max_block_tokens(request.layout) + 1, PMAX):
        blocks = tile_count(request.tokens, limit)
        size = tile_count(request.tokens, blocks)
        sizes.add(size if blocks == 1 else tile_count(size) * PMAX)
    return sorted(sizes, reverse=True)


def filled(request: Request, choice: Choice, plan: Plan, target: Target = TRN1) -> tuple[Choice, Plan]:
    """`choice`, which made `plan`, with what memory it leaves, and the plan of that."""
    fuller = _with_spare(choice, plan, target)
    found = build_plan(request, fuller, target)
    assert isinstance(found, Plan), "what is spare fits"
    return fuller, found


def _with_spare(choice: Choice, plan: Plan, target: Target) -> Choice:
    """`choice`, which made `plan`, with what SBUF has left: for a deeper ring, which has more transfers in
    flight, and then for more early tiles.
    """
    deepest = deepest_ring(plan, target)
    if not plan.early_tiles:
        return dataclasses.replace(choice, ring_slots=deepest)
    # Not the deepest at any price: in some rings two column tiles' weights for the same rows share a slot.
    slots = max((n for n in range(plan.ring_slots, deepest + 1) if keeps_apart(plan, n)), default=deepest)
    spare = target.sbuf_usable_bytes - plan.sbuf_bytes() - (slots - plan.ring_slots) * plan.slot_bytes
    return dataclasses.replace(choice, ring_slots=slots, early_tiles=more_tiles(plan, slots, spare))


def build_plan(request: Request, choice: Choice, target: Target = TRN1) -> Plan | Declined:
    """The plan that `choice` describes, or why it does not fit `target`."""
    request, choice = _pythons(request, choice)
    layout, itemsize = request.layout, request.dtype.itemsize
    bounds = chunk_bounds(layout, choice.ring_cols or SLOT_BYTES[0] // itemsize, request.tokens <= PMAX)
    # Equal pieces of at most 512: a stub would cost a matmul's turnaround for few tokens.
    moving_tokens = tile_count(choice.block_tokens, tile_count(choice.block_tokens, MOVING_COLS))
    out_cols = staged_cols(layout, choice.out_cols)
    ring_cols = max(end - start for start, end in itertools.pairwise(bounds))
    room = _room(request, choice, moving_tokens, out_cols, ring_cols)
    plan = Plan(
        products=layout.products,
        external_z=layout.external_z,
        tokens=request.tokens,
        itemsize=itemsize,
        block_tokens=choice.block_tokens,
        moving_tokens=moving_tokens,
        token_group=choice.token_group,
        out_cols=out_cols,
        ring_slots=min(choice.ring_slots, len(bounds) - 1),
        ring_cols=ring_cols,
        chunk_bounds=bounds,
        identity_col=layout.stored_cols,
        identity_size=_identity_size(request, choice.block_tokens),
        with_norm=request.norm_eps is not None,
        norm_eps=request.norm_eps or 0.0,
        with_residual=request.residual,
        silu=request.silu,
        transposed_input=request.transposed_input,
        **_casts(request, choice, moving_tokens, bounds, target),
        early_tiles=room.early_tiles,
        early_group=1,
        **_products(request),
        **place(room),
    )
    plan = dataclasses.replace(plan, early_group=early_group(plan))
    for declined in (_refuse_contradiction(plan), _refuse_oversize(plan, target)):
        if declined is not None:
            return declined
    return plan


def _room(request: Request, choice: Choice, moving_tokens: int, out_cols: int, ring_cols: int) -> Room:
    """What decides where the tensors of a plan lie."""
    shared = choice.shares_rows, choice.spreads_pieces
    room = Room(request, choice.block_tokens, moving_tokens, out_cols, ring_cols, *shared)
    return dataclasses.replace(room, early_tiles=early_tiles(choice.early_tiles, room))


def _products(request: Request) -> dict[str, Any]:
    """Which products the launch runs, the row tiles of their operands, and how weights and z come."""
    layout = request.layout
    last = layout.down_second
    return {
        "is_int8": layout.is_int8,
        "scale_cols": layout.scale_cols,
        "natural_z": z_is_natural(request.tokens, request.dtype),
        "hidden": layout.hidden,
        "intermediate": layout.intermediate,
        "x_tiles": tile_count(layout.hidden),
        "h_tiles": layout.h_tiles,
        "gate_z_tiles": layout.z_tiles("gate"),
        "up_z_tiles": layout.z_tiles("up"),
        "down_z_tiles": layout.z_tiles("down"),
        "runs_gate_first": layout.gate_first is not None,
        "runs_up_first": layout.up_first is not None,
        "runs_gated": layout.gate_second is not None,
        "runs_down_first": layout.down_first is not None,
        "natural_output": last is not None and last.tile_cols == MOVING_COLS,
    }


def _casts(
    request: Request, choice: Choice, moving_tokens: int, bounds: tuple[int, ...], target: Target
) -> dict[str, Any]:
    """How int8 weights come to the products: what is on its way, who casts how much of which chunk, how
    scales are spread (see Plan); nothing where the weights are not int8.
    """
    layout = request.layout
    if not layout.is_int8:
        fields = ("raw_slots", "scalar_share", "natural_share", "natural_chunk")
        return {**dict.fromkeys(fields, 0), "spreads_pieces": False}
    block = Block(choice.block_tokens, moving_tokens, request.norm_eps is not None, request.residual)
    scalar, natural = scalar_shares(layout, block, target)
    # Chunks that begin before the last matrix does: so the number of the first one that does not.
    chunk = sum(bound < layout.stored_cols - natural_stored(layout) for bound in bounds[:-1])
    return {
        "raw_slots": min(raw_slots(choice.block_tokens), len(bounds) - 1),
        "scalar_share": scalar,
        "natural_share": natural,
        "natural_chunk": chunk,
        "spreads_pieces": choice.spreads_pieces,
    }


def _pythons(request: Request, choice: Choice) -> tuple[Request, Choice]:
    """The same in Python's numbers: a compiler before nki 0.7 would read numpy's as None."""
    eps = None if request.norm_eps is None else float(request.norm_eps)
    numbers: dict[str, Any] = {name: int(n) for name, n in vars(choice).items() if not isinstance(n, bool)}
    return (
        dataclasses.replace(request, tokens=int(request.tokens), norm_eps=eps),
        dataclasses.replace(choice, **numbers),
    )


def _identity_size(request: Request, block_tokens: int) -> int:
    """Rows and columns of the identity that the launch reads: all where blocks are identities, z is turned
    round or scales are spread, else as many as a tile of tokens that is transposed.
    """
    turns = request.layout.down_second is None and z_is_natural(request.tokens, request.dtype)
    spreads = request.layout.is_int8
    return PMAX if request.layout.sums_identity or turns or spreads else min(PMAX, block_tokens)


def staged_cols(layout: Layout, out_cols: int) -> int:
    """Columns of natural output that are staged at a time; 0 where the output is transposed, or none."""
    last = layout.down_second
    if last is None or last.tile_cols != MOVING_COLS:
        return 0
    return min(out_cols or last.cols, last.cols)


def _refuse_contradiction(plan: Plan) -> Declined | None:
    """Options that the launch would have to ignore or cannot follow."""
    if plan.with_norm and (not plan.hidden or plan.transposed_input):
        return Declined(
            "norm_eps: expected a launch that starts from natural x, found one that does not; normalise "
            "before it."
        )
    last: Any = plan.products.down_second
    if plan.with_residual and (not plan.natural_output or plan.external_z):
        return Declined(
            "residual: expected a launch with natural output that is no summand, found another; add it after "
            "the launch."
        )
    if plan.silu and (plan.runs_gated or plan.with_residual or last is None):
        return Declined(
            "silu: expected a single projection without residual, found another launch; only xuv activates "
            "its result."
        )
    if plan.natural_output and plan.out_cols % MOVING_COLS and plan.out_cols < last.cols:
        return Declined(
            f"out_cols: expected a multiple of {MOVING_COLS} or whole rows of {last.cols}, found "
            f"{plan.out_cols}; round it."
        )
    return None


def _refuse_oversize(plan: Plan, target: Target) -> Declined | None:
    found, usable = plan.sbuf_bytes(), target.sbuf_usable_bytes
    if found > usable:
        held = ", ".join(f"{name} {size} B" for name, size in largest(plan))
        return Declined(
            f"SBUF of {target.name}: expected at most {usable} bytes per partition, found {found} for a "
            "block of "
            f"{plan.block_tokens} tokens ({held}); use fewer tokens per block or shard the layer over more "
            "cores."
        )
    products = 2 if plan.runs_gated else 1
    # A token group's sums are let go only when the next group's are there, and so are a column tile's.
    groups = min(2, tile_count(plan.block_tokens, PMAX * plan.token_group)) if plan.natural_output else 1
    banks = max(groups * plan.token_group, (products + 1) * tile_count(plan.block_tokens, plan.moving_tokens))
    if banks > target.psum_banks:
        return Declined(
            f"PSUM of {target.name}: expected at most {target.psum_banks} banks at once, found {banks}; use "
            "smaller blocks."
        )
    return None


@functools.lru_cache(maxsize=64)
def chunk_bounds(layout: Layout, ring_cols: int, halves_last: bool) -> tuple[int, ...]:
    """Ends of the chunks that the packed weights are read in: as many whole blocks as `ring_cols` (>= 512)
    hold. `halves_last`: nothing hides the products with the last chunk in decode, so it comes in two halves.
    """
    bounds, ends = [0], [0]
    end = 0
    for _, matrix, n, block, offset in layout.blocks():
        if block[3] == SHARED:
            continue
        end = offset + matrix.tile_width(n)
        # A block is never cut: a chunk ends before the one that it has no room for.
        if end - bounds[-1] > ring_cols:
            bounds.append(offset)
        ends.append(end)
    if halves_last:
        middle = max(found for found in ends if found <= (bounds[-1] + end) // 2)
        bounds += [middle] if middle > bounds[-1] else []
    bounds.append(end)
    return tuple(bounds)
