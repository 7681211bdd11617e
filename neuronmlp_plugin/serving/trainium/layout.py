"""Each projection as one or two tensors whose contiguous slices are the ranks' shards, since NxDI slices
contiguously.

A layer that fits the ranks (`MLPLayer.fits`) is stored that way already. Under `gather` the shards are those
of `models/gather.py` with one thing added: NxDI compiles a single graph for all ranks, so nothing in a
shard's shape may depend on the rank. Where tp does not divide the rank R of a `compact` matrix, some ranks
own one pivot more than others; that odd pivot is moved among the rest as a unit row (gate, up) or unit column
(down), which changes no value. A unit row has scale 1 where the matrix is int8; a unit column, whose rows
have scales of their own, asks for a matrix that is expanded (storage.py).
"""

from __future__ import annotations

import torch

from neuronmlp_plugin.models.definition import Tensors, Weight, factors_of, joined
from neuronmlp_plugin.models.factors import IN, OUT, Matrix
from neuronmlp_plugin.models.gather import Shard, gather_shard
from nki_kernels import staging

PARTS = ("first", "second")


def partition_dim(matrix: Matrix, part: str, gathers: bool) -> int:
    """Which dimension of `first` or `second` `[out, in]` is cut into tp slices."""
    return IN if matrix.is_down and (gathers or part == "second") else OUT


def even_pivots(matrix: Matrix, tp: int) -> int:
    """How many of a rank's leading channels are themselves its z under `gather`, the same for every rank."""
    return staging.even_pivots(matrix.pivots, tp)


def laid_out_shapes(matrix: Matrix, tp: int, gathers: bool) -> dict[str, tuple[int, int]]:
    """Part -> whole `[out, in]` shape, padding included; `dense` gate and up have no `second`, `dense` down
    no `first`.
    """
    if not gathers or not matrix.spec.is_low_rank:
        named = zip(PARTS, matrix.factor_shapes, strict=True)
        return {part: shape for part, shape in named if shape is not None}
    n_in, n_out = matrix.in_out
    padded, pivots = tp * staging.slots_per_core(matrix.rank, tp), tp * even_pivots(matrix, tp)
    if matrix.is_down:
        return {"first": (padded, n_in - pivots), "second": (n_out, padded)}
    return {"first": (padded, n_in), "second": (n_out - pivots, padded)}


def lay_out(matrix: Matrix, tensors: Tensors, tp: int, gathers: bool) -> dict[str, Weight]:
    """Part -> the tensor of `laid_out_shapes`, from one projection's tensors of FORMAT.md by suffix; int8
    with its scales, which are cut as the rows are.
    """
    if not gathers:
        named = zip(PARTS, factors_of(matrix, tensors), strict=True)
        return {part: weight for part, weight in named if weight is not None}
    shards = [_uniform(gather_shard(matrix, tensors, tp, rank), matrix, tp, rank) for rank in range(tp)]
    whole = {
        "first": [s.first for s in shards if s.first is not None],
        "second": [s.second for s in shards if s.second is not None],
    }
    return {
        part: joined(slices, partition_dim(matrix, part, True)) for part, slices in whole.items() if slices
    }


def _uniform(shard: Shard, matrix: Matrix, tp: int, rank: int) -> Shard:
    """The same shard with `even_pivots` pivots: an odd one becomes a unit row or column that picks its own
    slot of z.
    """
    even = even_pivots(matrix, tp)
    if shard.pivots == even:
        return shard
    assert shard.first is not None and shard.second is not None
    first, second = shard.first, shard.second
    unit = (first if matrix.is_down else second).values.new_zeros(tp * shard.slots)
    unit[rank * shard.slots + even] = 1
    if matrix.is_down:
        assert first.scale is None, "a unit column has no scale (storage.py)"
        first = Weight(torch.cat((unit[:, None], first.values), dim=1))
    else:
        scale = None if second.scale is None else torch.cat((second.scale.new_ones(1), second.scale))
        second = Weight(torch.cat((unit[None], second.values)), scale)
    return Shard(first, second, even, shard.slots)
