"""What a launch has to do, everything that a plan depends on besides the target; and which launches the MLP
of one tensor-parallel core is: the one rule that serving follows and that the cost model prices.

A layer whose groups the cores share out runs in one launch per core. A layer of one group on several cores
(scheme `gather`) runs in up to three, with an all-gather of z between the first two and a reduce-scatter of
down's z before the last.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nki_kernels.layout import DENSE, Layout, Projection, first_stage, last_stage, mlp_layout, second_stage
from nki_kernels.tiling import tile_count

Projections = tuple[Projection, Projection, Projection]


def slots_per_core(rank: int, tp: int) -> int:
    """ceil(R / tp): the slots of z that a core has; those beyond R hold zeros."""
    return tile_count(rank, tp)


def even_pivots(pivots: int, tp: int) -> int:
    """How many of a core's channels are pivots, the same for every core: one graph serves all of them, so the
    odd pivots that some cores own count as other channels. 417 pivots on 2 cores: 208 each.
    """
    return pivots // tp


def gathered_projection(form: str, rank: int, tp: int) -> Projection:
    """One core's share of a projection of one group."""
    if form == "dense":
        return DENSE
    slots = slots_per_core(rank, tp)
    return Projection(form, tp * slots, slots, even_pivots(rank, tp) if form == "compact" else 0)


def gathered_stages(hidden: int, channels: int, projections: Projections) -> dict[str, Layout]:
    """Launch -> what it computes, of a core's `channels` and its projections under `gather`: `first`,
    `second` and `last`, as far as the forms need them.
    """
    whole = mlp_layout(hidden, channels, *projections)
    stages = {}
    if whole.gate_first or whole.up_first:
        stages["first"] = first_stage(whole)
    stages["second"] = second_stage(whole)
    if whole.down_first:
        stages["last"] = last_stage(whole)
    return stages


# A row that leaves for a collective, or comes back from one, is at least this long: shorter ones cost a DMA
# queue as much [dma].
MIN_ROW_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Request:
    """One launch of `layout` over `tokens` tokens, weights and activations of `dtype`."""

    layout: Layout
    tokens: int
    dtype: np.dtype
    norm_eps: float | None = None
    residual: bool = False
    silu: bool = False
    transposed_input: bool = False


def z_is_natural(tokens: int, dtype: np.dtype) -> bool:
    """Whether z travels between collectives as `[T, channels]`: where rows of `[channels, T]` would be
    short.
    """
    return tokens * dtype.itemsize < MIN_ROW_BYTES


def stage_request(layout: Layout, tokens: int, dtype: np.dtype, norm_eps: float | None = None) -> Request:
    """What a launch of one tensor-parallel core has to do; `norm_eps` counts where it starts from x.

    The last one, which takes down's z from the reduce-scatter, finds it as `z_is_natural` says.
    """
    is_last = layout.hidden == 0 and layout.gate_second is None and layout.down_first is None
    return Request(
        layout,
        tokens,
        dtype,
        norm_eps if layout.hidden else None,
        transposed_input=is_last and not z_is_natural(tokens, dtype),
    )
