"""What one rank of a tensor-parallel MLP may ask of the others."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Collectives:
    """Three operations on the last dimension. This base class is the single-rank case, where each is the
    identity.
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
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total
