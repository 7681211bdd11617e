"""Each projection as one or two tensors whose contiguous slices are the ranks' shards, since NxDI slices
contiguously.

The shards are those of `models/sharding.py` with one thing added: NxDI compiles a single graph for all ranks,
so nothing in a shard's shape may depend on the rank. Where tp does not divide the rank R of a `compact`
matrix, some ranks own one pivot more than others; that odd pivot is moved among the rest as a unit row (gate,
up) or unit column (down), which changes no value.

Scheme `reduce` stores `compact` as the `uv` that it stands for: a rank's z would have to be scattered to
channels that depend on the rank.
"""

from __future__ import annotations

import torch

from neuronmlp_plugin.models.projection import MLPShape, ProjectionSpec
from neuronmlp_plugin.models.sharding import (
    Shard,
    Weights,
    gathered_order,
    shard_down,
    shard_gate_up,
    slots_per_rank,
)

COLUMN, ROW = 0, 1


def partition_dim(projection: str, part: str, scheme: str) -> int:
    """Which dimension of `first` or `second` `[out, in]` is cut into tp slices: COLUMN cuts `out`, ROW cuts
    `in`.
    """
    if scheme == "reduce":
        return COLUMN if part == "first" else ROW
    return ROW if projection == "down_proj" else COLUMN


def even_pivots(spec: ProjectionSpec, tp: int, scheme: str) -> int:
    """How many of a rank's leading channels are themselves its z, the same for every rank."""
    return (spec.rank or 0) // tp if spec.form == "compact" and scheme == "gather" else 0


def laid_out_shapes(
    projection: str, spec: ProjectionSpec, shape: MLPShape, tp: int, scheme: str
) -> dict[str, tuple[int, int]]:
    """Part -> whole `[out, in]` shape, padding included; `dense` gate and up have no `second`, `dense` down
    no `first`.
    """
    n_in, n_out = shape.in_out(projection)
    down = projection == "down_proj"
    if spec.form == "dense":
        return {"second" if down else "first": (n_out, n_in)}
    padded = tp * slots_per_rank(spec.rank or 0, tp)
    pivots = tp * even_pivots(spec, tp, scheme)
    if down:
        return {"first": (padded, n_in - pivots), "second": (n_out, padded)}
    return {"first": (padded, n_in), "second": (n_out - pivots, padded)}


def lay_out(
    projection: str, spec: ProjectionSpec, weights: Weights, tp: int, scheme: str
) -> dict[str, torch.Tensor]:
    """Part -> the tensor of `laid_out_shapes`, from one projection's tensors of FORMAT.md by suffix."""
    if scheme == "reduce":
        return _lay_out_reduce(projection, spec, weights, tp)
    shard = shard_down if projection == "down_proj" else shard_gate_up
    shards = [_uniform(shard(spec, weights, tp, rank), projection, spec, tp, rank) for rank in range(tp)]
    dim = partition_dim(projection, "first", scheme)
    whole = {
        "first": [s.first for s in shards if s.first is not None],
        "second": [s.second for s in shards if s.second is not None],
    }
    return {part: torch.cat(slices, dim=dim) for part, slices in whole.items() if slices}


def _uniform(shard: Shard, projection: str, spec: ProjectionSpec, tp: int, rank: int) -> Shard:
    """The same shard with `even_pivots` pivots: an odd one becomes a unit row or column that picks its own
    slot of z.
    """
    even = even_pivots(spec, tp, "gather")
    if shard.form != "compact" or shard.pivots == even:
        return shard
    assert shard.first is not None and shard.second is not None
    unit = shard.second.new_zeros(tp * shard.slots)
    unit[rank * shard.slots + even] = 1
    if projection == "down_proj":
        return Shard(
            shard.form, torch.cat((unit[:, None], shard.first), dim=1), shard.second, even, shard.slots
        )
    return Shard(shard.form, shard.first, torch.cat((unit[None], shard.second)), even, shard.slots)


def _lay_out_reduce(
    projection: str, spec: ProjectionSpec, weights: Weights, tp: int
) -> dict[str, torch.Tensor]:
    """R in slices; the channels, whole at every rank, in the order in which an all-gather of dealt-out
    channels delivers them.
    """
    down = projection == "down_proj"
    if spec.form == "dense":
        part = "second" if down else "first"
        return {part: gathered_order(weights["weight"], tp, partition_dim(projection, part, "reduce"))}
    u, v = _as_uv(projection, spec, weights)
    channels_in_order = gathered_order(u, tp, 1) if down else gathered_order(v, tp, 0)
    u, v = (channels_in_order, v) if down else (u, channels_in_order)
    return {"first": gathered_order(u, tp, 0), "second": gathered_order(v, tp, 1)}


def _as_uv(projection: str, spec: ProjectionSpec, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    if spec.form == "uv":
        return weights["u.weight"], weights["v.weight"]
    c = weights["c.weight"]
    unit = torch.eye(spec.rank or 0, dtype=c.dtype)
    if projection == "down_proj":
        return torch.cat((unit, c), dim=1), weights["v.weight"]
    return weights["u.weight"], torch.cat((unit, c))
