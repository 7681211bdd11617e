"""Scheme `gather`: several ranks share the factors of a layer of one group, at the price of two collectives.

What a folder of one group needs on several ranks (the paper's form, published factors); a folder with groups
for the ranks needs none of this (`MLPLayer.share`). Both the rank dimension R and the intermediate channels
are dealt out cyclically: rank t of tp owns t, t + tp, t + 2 tp, ... With the pivots first (FORMAT.md) every
rank owns an equal share of pivots and of the rest, and the slice of z that it computes for an output-pivoted
matrix IS its slice of the output. Where tp does not divide R, each rank has ceil(R / tp) slots and the unused
ones hold zeros.

Per MLP, besides the all-reduce of y `[T, H]` that every tensor-parallel MLP ends with: one all-gather of the
local z of gate and up together, and one reduce-scatter of down's z `[T, R]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from neuronmlp_plugin.models.definition import Linear, Tensors, Weight, factors_of, plain_linear
from neuronmlp_plugin.models.factors import IN, OUT, Matrix


class Collectives:
    """What one rank of a tensor-parallel MLP may ask of the others: three operations on the last dimension.
    This base class is the single-rank case, where each is the identity.
    """

    rank: int = 0
    size: int = 1

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n]` of each rank -> `[..., tp n]`, in rank order."""
        return x

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of all ranks' `[..., tp n]`, of which this rank keeps its own `[..., n]`."""
        return x

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of all ranks' `[..., n]`."""
        return x


class ProcessGroup(Collectives):
    """The same over a torch.distributed group (gloo has no reduce-scatter, so there it is an all-reduce and a
    slice).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_reduce(x).chunk(self.size, dim=-1)[self.rank]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        # torch.distributed adds up in place, and the caller keeps x.
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank's part of a matrix of one group, in Linear layout `[out, in]`, int8 where the matrix is.

    `first` meets the input and `second` makes the output; a `dense` matrix has only `first` (gate, up) or
    only `second` (down). `pivots`: how many local channels are pivots, i.e. are themselves z. `slots`: length
    of the local z.
    """

    first: Weight | None
    second: Weight | None
    pivots: int = 0
    slots: int = 0


def slots_per_rank(count: int, tp: int) -> int:
    """ceil(count / tp): how long a rank's share of `count` dealt-out things can be."""
    return -(-count // tp)


def deal(x: torch.Tensor, tp: int, rank: int, dim: int) -> torch.Tensor:
    """The share `rank::tp` of `x` along `dim`."""
    return x[rank::tp] if dim == OUT else x[:, rank::tp]


def deal_padded(x: torch.Tensor, tp: int, rank: int, dim: int) -> torch.Tensor:
    """As `deal`, with zeros up to `slots_per_rank`."""
    share = deal(x, tp, rank, dim)
    missing = slots_per_rank(x.shape[dim], tp) - share.shape[dim]
    behind = (0, 0) * (x.dim() - 1 - dim)  # F.pad counts from the last dimension
    return F.pad(share, (*behind, 0, missing))


def gathered_order(x: torch.Tensor, tp: int, dim: int) -> torch.Tensor:
    """`x` along `dim` in the order in which an all-gather of dealt-out shares delivers it, padding
    included. Five on two ranks, which have three slots each:

    >>> gathered_order(torch.tensor([[10, 11, 12, 13, 14]]), tp=2, dim=IN).tolist()
    [[10, 12, 14, 11, 13, 0]]
    """
    return torch.cat([deal_padded(x, tp, rank, dim) for rank in range(tp)], dim=dim)


def gather_shard(matrix: Matrix, tensors: Tensors, tp: int, rank: int) -> Shard:
    """The share of `rank` in a matrix of one group. That of a down makes a summand of y `[..., H]`."""
    assert matrix.groups == 1
    first, second = factors_of(matrix, tensors)

    def dealt(weight: Weight, dim: int, how: Callable[..., torch.Tensor] = deal_padded) -> Weight:
        return weight.rearranged(lambda t: how(t, tp, rank, dim), dim)

    def gathered(weight: Weight, dim: int) -> Weight:
        return weight.rearranged(lambda t: gathered_order(t, tp, dim), dim)

    if first is None or second is None:
        # tp divides the channels wherever ranks gather (`MLPLayer.gathers`), so a dense matrix is dealt
        # without padding.
        return Shard(first and dealt(first, OUT, deal), second and dealt(second, IN, deal))
    # Pivots are the channels before those that the factor on the channels' side has rows or columns for:
    # channel R + j belongs to rank (R + j) % tp.
    start = (rank - matrix.pivots) % tp
    pivots, slots = len(range(rank, matrix.pivots, tp)), slots_per_rank(matrix.rank, tp)
    if matrix.is_down:
        columns = first.rearranged(lambda t: t[:, start::tp], IN)
        # z leaves rank after rank, since a reduce-scatter cuts it into contiguous parts.
        return Shard(gathered(columns, OUT), dealt(second, IN), pivots, slots)
    rows = second.rearranged(lambda t: t[start::tp], OUT)
    # z arrives rank after rank, as an all-gather joins it.
    return Shard(dealt(first, OUT), gathered(rows, IN), pivots, slots)


def all_gather_together(parts: list[torch.Tensor], collectives: Collectives) -> list[torch.Tensor]:
    """Each rank's `[..., n_i]` -> all ranks' `[..., tp n_i]` in rank order, for all parts in one
    collective.
    """
    if collectives.size == 1 or not parts:
        return parts
    widths = [part.shape[-1] for part in parts]
    # Rank by rank, each with its share of every part; then part by part, each with the shares of every rank.
    joined = collectives.all_gather(torch.cat(parts, dim=-1))
    by_rank = [chunk.split(widths, dim=-1) for chunk in joined.chunk(collectives.size, dim=-1)]
    return [torch.cat(chunks, dim=-1) for chunks in zip(*by_rank, strict=True)]


class GatherGateUp:
    """Gate and up of one rank: x `[..., H]` -> `[..., 2 I / tp]`, gate first."""

    def __init__(
        self,
        shards: Sequence[Shard],
        collectives: Collectives,
        make_linear: Callable[[torch.Tensor], Linear] = plain_linear,
    ) -> None:
        self.shards, self.collectives = shards, collectives
        firsts = [shard.first.expanded() for shard in shards if shard.first is not None]
        self.widths = [first.shape[0] for first in firsts]
        # Gate and up start from one x: a single product makes z, or a dense one's output, of both.
        self.first = make_linear(torch.cat(firsts))
        self.seconds = [
            None if shard.second is None else make_linear(shard.second.expanded().contiguous())
            for shard in shards
        ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(self.first(x).split(self.widths, dim=-1))
        outputs: list[torch.Tensor] = []
        for shard, second, part, z in zip(self.shards, self.seconds, parts, self._gather(parts), strict=True):
            # Not all of z: where tp does not divide R, the last slot of some ranks is padding and no channel.
            outputs += [part] if second is None else [part[..., : shard.pivots], second(z)]
        return torch.cat(outputs, dim=-1)

    def _gather(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """The whole z of each low-rank projection, from one collective."""
        low = [i for i, shard in enumerate(self.shards) if shard.second is not None]
        whole = list(parts)
        for i, z in zip(low, all_gather_together([parts[i] for i in low], self.collectives), strict=True):
            whole[i] = z
        return whole


class GatherDown:
    """Down of one rank: activation `[..., I / tp]` -> summand of y `[..., H]`."""

    def __init__(
        self,
        shard: Shard,
        collectives: Collectives,
        make_linear: Callable[[torch.Tensor], Linear] = plain_linear,
    ) -> None:
        assert shard.second is not None
        self.shard, self.collectives = shard, collectives
        self.first = None if shard.first is None else make_linear(shard.first.expanded().contiguous())
        self.second = make_linear(shard.second.expanded().contiguous())

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            return self.second(h)
        pivots, start = self.shard.pivots, self.collectives.rank * self.shard.slots
        z = self.first(h[..., pivots:])
        # This rank's pivots are the z of the first of its own slots; other ranks add nothing but products
        # there.
        z[..., start : start + pivots] += h[..., :pivots]
        return self.second(self.collectives.reduce_scatter(z))
