"""Each projection as one or two tensors whose contiguous slices are the ranks' shards, since NxDI slices
contiguously.

A layer that fits the ranks (`MLPLayer.fits`) is stored that way already. Under `gather` the shards are those
of `models/gather.py` with one thing added: NxDI compiles a single graph for all ranks, so nothing in a
shard's shape may depend on the rank. Where tp does not divide the rank R of a `compact` matrix, some ranks
own one pivot more than others; that odd pivot is moved among the rest as a unit row (gate, up) or unit column
(down), which changes no value. A unit row has scale 1 where the matrix is int8; a unit column, whose rows
have scales of their own, asks for a matrix that is expanded.

How a path reads int8: as it is, one byte a weight, or expanded at load, and why. Torch operations multiply
each matrix by itself; a launch of the kernels reads one packed array, so there all three are int8 or none is.

And what the MLP needs from the machinery that shards it (`Parallel`): layers that hold a slice, the rank as
data, and collectives.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Protocol

import torch
from torch import nn

from neuronmlp_plugin.models.definition import Tensors, Weight, factors_of, joined, tensors_of
from neuronmlp_plugin.models.factors import IN, INT8, OUT, PROJECTIONS, Matrix, MLPLayer
from neuronmlp_plugin.models.gather import Collectives, Shard, gather_shard
from nki_kernels import request


def slice_size(size: tuple[int, ...], dim: int, parts: int) -> tuple[int, ...]:
    """Size of one of so many equal parts along `dim`."""
    return tuple(n // parts if axis == dim else n for axis, n in enumerate(size))


class RankModule(Protocol):
    """A module that holds the rank as a parameter, so that one graph can serve all ranks."""

    def get_rank(self) -> torch.Tensor:
        """`[1]`, int32."""


class Parallel(Collectives, abc.ABC):
    """Collectives over the last dimension, two over any, and a factory of sharded layers without bias.

    The layers compute on their own slice and communicate nothing: the module decides when to. `dtype`: of the
    model, and of every layer that is not int8.
    """

    dtype: torch.dtype

    def linear(self, size: tuple[int, int], dim: int) -> nn.Module:
        """A layer whose `weight` is a slice along `dim` of a whole `[out, in]` of this size."""
        n_out, n_in = size
        return self.column(n_in, n_out) if dim == OUT else self.row(n_in, n_out)

    @abc.abstractmethod
    def column(self, n_in: int, n_out: int) -> nn.Module:
        """`[..., n_in]` -> this rank's `[..., n_out / tp]`."""

    @abc.abstractmethod
    def row(self, n_in: int, n_out: int) -> nn.Module:
        """This rank's `[..., n_in / tp]` -> a summand of `[..., n_out]`."""

    @abc.abstractmethod
    def int8(self, size: tuple[int, int], dim: int, scale_size: tuple[int, ...]) -> nn.Module:
        """A module that multiplies nothing: `weight`, int8, is a slice along `dim` of a whole `[out, in]` of
        this size; `scale`, fp32 whatever the model's dtype, one along its first dimension where `dim` is OUT,
        and the whole of it where not.
        """

    @abc.abstractmethod
    def rank_module(self) -> RankModule:
        """A module whose one parameter `rank` is this rank's number."""

    @abc.abstractmethod
    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' x one after another along `dim`."""

    @abc.abstractmethod
    def scatter_sum(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Sum of all ranks' x, of which this rank keeps its slice along `dim`."""


PARTS = ("first", "second")


def partition_dim(matrix: Matrix, part: str, gathers: bool) -> int:
    """Which dimension of `first` or `second` `[out, in]` is cut into tp slices."""
    # Under `gather` a rank has some channels and needs all of z before the reduce-scatter: down's first
    # factor is cut along them, where whole groups would have it cut along its rows.
    return IN if matrix.is_down and (gathers or part == "second") else OUT


def even_pivots(matrix: Matrix, tp: int) -> int:
    """How many of a rank's leading channels are themselves its z under `gather`, the same for every rank."""
    return request.even_pivots(matrix.pivots, tp)


def laid_out_shapes(matrix: Matrix, tp: int, gathers: bool) -> dict[str, tuple[int, int]]:
    """Part -> whole `[out, in]` shape, padding included; `dense` gate and up have no `second`, `dense` down
    no `first`.
    """
    if not gathers or not matrix.spec.is_low_rank:
        named = zip(PARTS, matrix.factor_shapes, strict=True)
        return {part: shape for part, shape in named if shape is not None}
    n_in, n_out = matrix.in_out
    padded, pivots = tp * request.slots_per_core(matrix.rank, tp), tp * even_pivots(matrix, tp)
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
    # The pivot behind the even ones has that slot of this rank's share, in the rank-major order of z.
    unit[rank * shard.slots + even] = 1
    if matrix.is_down:
        assert first.scale is None, "a unit column has no scale"
        first = Weight(torch.cat((unit[:, None], first.values), dim=1))
    else:
        scale = None if second.scale is None else torch.cat((second.scale.new_ones(1), second.scale))
        second = Weight(torch.cat((unit[None], second.values)), scale)
    return Shard(first, second, even, shard.slots)


FLOATING, IN_PART, EXPANDED = "floating point", "int8 in part", "int8 expanded"


@dataclasses.dataclass(frozen=True)
class Reading:
    """`int8`: the projections that are read as int8; `why`: why others, stored so, are expanded, if any
    is.
    """

    int8: frozenset[str] = frozenset()
    why: str | None = None

    @property
    def weights(self) -> str:
        """In a word, for the log and /metrics: INT8 where all are, IN_PART where the others are stored in
        floating point.
        """
        if self.why:
            return EXPANDED
        if len(self.int8) == len(PROJECTIONS):
            return INT8
        return IN_PART if self.int8 else FLOATING

    def tensors(self, matrix: Matrix, stored: Tensors, dtype: torch.dtype) -> Tensors:
        """The tensors of FORMAT.md of one matrix as they are read: expanded to `dtype`, and then without
        scales, where it is int8 and cannot stay so.
        """
        if not matrix.spec.is_int8 or matrix.projection in self.int8:
            return stored
        factors = factors_of(matrix, stored)
        return tensors_of(matrix, *(None if w is None else w.expanded().to(dtype) for w in factors))


def kernel_reading(stored: MLPLayer, tp: int) -> Reading:
    """How the kernels of one of tp ranks read the layer."""
    int8, floating = _stored_int8(stored), [name for name, spec in stored.items() if not spec.is_int8]
    if not int8:
        return Reading()
    if floating:
        return Reading(
            why=f"{', '.join(floating)} in floating point beside, and a launch reads one kind of weights"
        )
    why = _odd_pivots(stored.matrix("down_proj"), tp, stored.gathers(tp))
    return Reading(why=why) if why else Reading(int8)


def torch_reading(stored: MLPLayer, tp: int, dtype: torch.dtype) -> Reading:
    """How torch operations of one of tp ranks read the layer, in a model of `dtype`."""
    int8 = _stored_int8(stored)
    if not int8:
        return Reading()
    if dtype is torch.float16:
        return Reading(why="unscaled products may leave the range of float16")
    down = stored.matrix("down_proj")
    why = _odd_pivots(down, tp, stored.gathers(tp)) if down.spec.is_int8 else None
    return Reading(int8 - {"down_proj"}, why) if why else Reading(int8)


def _stored_int8(stored: MLPLayer) -> frozenset[str]:
    return frozenset(name for name, spec in stored.items() if spec.is_int8)


def _odd_pivots(down: Matrix, tp: int, gathers: bool) -> str | None:
    """Under `gather` some ranks own one pivot more, which becomes a unit column: ones, in rows
    whose scales are others.
    """
    if not gathers or down.pivots % tp == 0:
        return None
    return (
        f"{tp} ranks share the {down.pivots} pivots of down_proj unevenly, and the odd ones have no scale; "
        f"compress with --tp {tp} to share groups out instead"
    )
