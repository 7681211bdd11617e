"""Ranks as threads: the collectives of `models/gather.py` in one process, with a count of calls and
bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from neuronmlp_plugin.models.gather import Collectives


class ThreadGroup:
    """`size` ranks that meet at a barrier; `log` holds (operation, bytes a rank puts in) of rank 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[torch.Tensor] = [torch.empty(0)] * size
        self.log: list[tuple[str, int]] = []

    def run(self, work: Callable[[Collectives], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, [_Rank(self, rank) for rank in range(self.size)]))

    def exchange(self, name: str, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.slots[rank] = x.clone()
        if rank == 0:
            self.log.append((name, x.numel() * x.element_size()))
        self.barrier.wait(timeout=60)
        parts = list(self.slots)
        self.barrier.wait(timeout=60)
        return parts


class _Rank(Collectives):
    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.group.exchange("all_gather", self.rank, x), dim=-1)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.stack(self.group.exchange("reduce_scatter", self.rank, x)).sum(0)
        return total.chunk(self.size, dim=-1)[self.rank]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.group.exchange("all_reduce", self.rank, x)).sum(0)
