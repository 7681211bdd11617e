"""A gated MLP over tp ranks: the arithmetic and the collectives that join the shards of `models/sharding.py`.

Per MLP, besides the all-reduce of y `[T, H]` that every tensor-parallel MLP ends with:
`gather` - one all-gather of the local z of gate and up together, one reduce-scatter of down's z `[T, R]`;
`reduce` - one all-reduce of the partial sums `[T, 2 I]` of gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from neuronmlp_plugin.models.collectives import Collectives
from neuronmlp_plugin.models.sharding import Shard

Linear = Callable[[torch.Tensor], torch.Tensor]


def plain_linear(weight: torch.Tensor) -> Linear:
    """`x -> x weight^T`; what a serving engine's prepacked product must equal."""
    return lambda x: F.linear(x, weight)


def all_gather_together(parts: list[torch.Tensor], collectives: Collectives) -> list[torch.Tensor]:
    """Each rank's `[..., n_i]` -> all ranks' `[..., tp n_i]` in rank order, for all parts in one collective."""
    if collectives.size == 1 or not parts:
        return parts
    widths = [part.shape[-1] for part in parts]
    joined = collectives.all_gather(torch.cat(parts, dim=-1))
    by_rank = [chunk.split(widths, dim=-1) for chunk in joined.chunk(collectives.size, dim=-1)]
    return [torch.cat(chunks, dim=-1) for chunks in zip(*by_rank, strict=True)]


class GateUp:
    """Gate and up of one rank: x `[..., H]` -> `[..., 2 I_local]` (`gather`) or `[..., 2 I]` (`reduce`), gate
    first.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        intermediate_size: int,
        collectives: Collectives,
        scheme: str = "gather",
        make_linear: Callable[[torch.Tensor], Linear] = plain_linear,
    ) -> None:
        self.shards, self.intermediate_size = shards, intermediate_size
        self.collectives, self.scheme = collectives, scheme
        firsts = [shard.first for shard in shards if shard.first is not None]
        self.widths = [first.shape[0] for first in firsts]
        self.first = make_linear(torch.cat(firsts))
        self.seconds = [
            None if shard.second is None else make_linear(shard.second.contiguous()) for shard in shards
        ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(self.first(x).split(self.widths, dim=-1))
        if self.scheme == "reduce":
            return self.collectives.all_reduce(
                torch.cat([self._partial(i, z) for i, z in enumerate(parts)], dim=-1)
            )
        whole = self._gather(parts)
        outputs: list[torch.Tensor] = []
        for shard, second, part, z in zip(self.shards, self.seconds, parts, whole, strict=True):
            if second is None:
                outputs.append(part)
            elif shard.form == "compact":
                outputs += [part[..., : shard.pivots], second(z)]
            else:
                outputs.append(second(z))
        return torch.cat(outputs, dim=-1)

    def _gather(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """The whole z of each low-rank projection, from one collective."""
        low = [i for i, shard in enumerate(self.shards) if shard.second is not None]
        whole = list(parts)
        for i, z in zip(low, all_gather_together([parts[i] for i in low], self.collectives), strict=True):
            whole[i] = z
        return whole

    def _partial(self, index: int, z: torch.Tensor) -> torch.Tensor:
        """This rank's summand of the whole output `[..., I]` of one projection."""
        shard, second = self.shards[index], self.seconds[index]
        if second is not None and shard.form == "uv":
            return second(z)
        tp, rank = self.collectives.size, self.collectives.rank
        out = z.new_zeros((*z.shape[:-1], self.intermediate_size))
        if second is None:
            out[..., rank::tp] = z
            return out
        rest = second(z)
        count = self.intermediate_size - rest.shape[-1]
        out[..., rank:count:tp] = z
        out[..., count:] = rest
        return out


class Down:
    """Down of one rank: activation `[..., I_local]` (`gather`) or `[..., I]` (`reduce`) -> partial sum of y
    `[..., H]`.
    """

    def __init__(
        self,
        shard: Shard,
        collectives: Collectives,
        scheme: str = "gather",
        make_linear: Callable[[torch.Tensor], Linear] = plain_linear,
    ) -> None:
        assert shard.second is not None
        self.shard, self.collectives, self.scheme = shard, collectives, scheme
        self.first = None if shard.first is None else make_linear(shard.first.contiguous())
        self.second = make_linear(shard.second.contiguous())

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        tp, rank = self.collectives.size, self.collectives.rank
        if self.first is None:
            return self.second(h[..., rank::tp].contiguous() if self.scheme == "reduce" and tp > 1 else h)
        if self.scheme == "reduce":
            return self.second(self._whole_input_z(h, tp, rank))
        return self.second(self.collectives.reduce_scatter(self._local_input_z(h, rank)))

    def _local_input_z(self, h: torch.Tensor, rank: int) -> torch.Tensor:
        """This rank's summand of all of z, from its own channels."""
        assert self.first is not None
        pivots, start = self.shard.pivots, rank * self.shard.slots
        if self.shard.form == "uv":
            return self.first(h)
        z = self.first(h[..., pivots:])
        z[..., start : start + pivots] += h[..., :pivots]
        return z

    def _whole_input_z(self, h: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
        """This rank's share of z, from all channels."""
        assert self.first is not None and self.shard.first is not None
        if self.shard.form == "uv":
            return self.first(h)
        count = h.shape[-1] - self.shard.first.shape[1]
        return self.first(h[..., count:]) + h[..., rank:count:tp]
